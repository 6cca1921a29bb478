"""The reference models of a checkpoint, which compute in float64 from one copy of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flax_resblock.checkpoint.torch_file import from_numpy
from flax_resblock.config import Path
from flax_resblock.convert import StateMap
from flax_resblock.convert.opened import OpenedCheckpoint
from flax_resblock.nn.resnet import Model, build
from flax_resblock.nn.variables import fill
from flax_resblock.parity.pair import Precision, Side
from flax_resblock.parity.reference import ReferencePair, torch_dtype


@dataclass(frozen=True)
class FrugalPair(ReferencePair):
    """A pair whose two models hold the same memory: Flax's tensors, which PyTorch sees transposed.
    They are widened, which is exact, while they are computed with. For forward passes in evaluation
    mode, which leave a model as it is: each is made once.

    Attributes:
      values: The tensors by attribute path in Flax; ``state`` are views of them.
    """

    values: Mapping[Path, np.ndarray] = field(default_factory=dict)
    _made: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, source: OpenedCheckpoint) -> FrugalPair:
        """The reference models of an opened checkpoint."""
        # a copy of its own, so that the file's memory can be let go, and jax takes it as it is
        values = source.state_map.to_flax(source.tensors, in_one_block=True)
        state = {
            entry.torch_key: entry.codec.seen_by_torch(values[entry.flax_path])
            for entry in StateMap(source.config, "torchvision").entries
            if entry.flax_path in values
        }
        return cls(source.config, state, source.norm_options, values=values)

    def _once(self, side: Side, precision: Precision, make: Callable[[], Any]) -> Any:
        if (side, precision.name) not in self._made:
            self._made[side, precision.name] = make()
        return self._made[side, precision.name]

    def torch(self, precision: Precision) -> torch.nn.Module:
        """The PyTorch module, which computes in ``precision.storage``."""

        def make() -> torch.nn.Module:
            state = {key: from_numpy(value) for key, value in self.state.items()}
            return computing_in(torch_dtype(precision), self.holding(state))

        return self._once("torch", precision, make)

    def flax(self, precision: Precision) -> Model:
        """The nnx model; :func:`flax_resblock.parity.taps.trace_flax` widens its tensors."""

        def make() -> Model:
            model = build(self.config, rngs=None, **self.norm_options, dtype=precision.compute)
            fill(model, self.values)
            return model

        return self._once("flax", precision, make)


def computing_in(dtype: torch.dtype, module: torch.nn.Module) -> torch.nn.Module:
    """The module, each of whose layers has parameters and buffers of this dtype while it runs."""
    narrow: dict[int, list[torch.Tensor]] = {}

    def widen(layer: torch.nn.Module, _: Any) -> None:
        narrow[id(layer)] = [tensor.data for tensor in _own(layer)]
        for tensor in _own(layer):
            tensor.data = tensor.data.to(dtype, memory_format=torch.contiguous_format)

    def restore(layer: torch.nn.Module, *_: Any) -> None:
        for tensor, data in zip(_own(layer), narrow.pop(id(layer)), strict=True):
            tensor.data = data

    for layer in module.modules():
        if any(True for _ in _own(layer)):
            layer.register_forward_pre_hook(widen)
            layer.register_forward_hook(restore)
    return module


def _own(layer: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Floating parameters and buffers of a layer itself."""
    for tensor in (*layer.parameters(recurse=False), *layer.buffers(recurse=False)):
        if tensor.is_floating_point():
            yield tensor
