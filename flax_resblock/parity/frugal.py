"""The reference models of a checkpoint, without a wide copy of every tensor on PyTorch's side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flax_resblock.checkpoint.torch_file import from_numpy
from flax_resblock.parity.pair import Precision
from flax_resblock.parity.reference import ReferencePair, torch_dtype


class FrugalPair(ReferencePair):
    """A pair whose PyTorch side keeps its tensors in the memory of ``state``. Each layer widens its
    own, which is exact, while it computes. For forward passes in evaluation mode.
    """

    def torch(self, precision: Precision) -> torch.nn.Module:
        """The PyTorch module, which computes in ``precision.storage``."""
        state = {key: from_numpy(value) for key, value in self.state.items()}
        return computing_in(torch_dtype(precision), self.holding(state))


def computing_in(dtype: torch.dtype, module: torch.nn.Module) -> torch.nn.Module:
    """The module, each of whose layers has parameters and buffers of this dtype while it runs."""
    narrow: dict[int, list[torch.Tensor]] = {}

    def widen(layer: torch.nn.Module, _: Any) -> None:
        narrow[id(layer)] = [tensor.data for tensor in _own(layer)]
        for tensor in _own(layer):
            tensor.data = tensor.data.to(dtype)

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
