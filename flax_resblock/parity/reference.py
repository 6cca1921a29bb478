"""The reference models: one network in both frameworks and in any precision, from one checkpoint;
and how its output depends on the assumptions that were made in reading it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

import torch_ref
from flax_resblock.checkpoint.torch_file import from_numpy, state_to_numpy
from flax_resblock.config import BlockConfig, Branch, Config, ResNetConfig, name_of, walk
from flax_resblock.convert import Naming, StateMap
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.convert.state_map import Entry, is_floating, transcode
from flax_resblock.nn.resnet import Model, build
from flax_resblock.nn.variables import fill
from flax_resblock.parity.inputs import randomised_norm_state
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision
from flax_resblock.parity.taps import as_tensor
from torch_ref.layers import FrozenBatchNorm2d


def torch_reference(
    config: Config, norm_options: Mapping[str, Any] | None = None
) -> torch.nn.Module:
    """The reference module of ``torch_ref`` for a network or bare block, freshly initialised.

    Args:
      norm_options: ``eps`` and ``momentum`` of every norm.
    """
    network = isinstance(config, ResNetConfig)
    module = torch_ref.ResNet(**asdict(config)) if network else _torch_block(config)
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.GroupNorm | FrozenBatchNorm2d):
            for name, value in (norm_options or {}).items():
                setattr(layer, name, value)
    return module


def _torch_block(config: BlockConfig) -> torch.nn.Module:
    options = {"dilation": config.dilation, **config.shared_options}
    if config.kind == "basic":
        del options["stride_on"]
    block = torch_ref.BasicBlock if config.kind == "basic" else torch_ref.Bottleneck
    return block(config.in_channels, config.planes, config.stride, **options)


@dataclass(frozen=True)
class ReferencePair(Pair):
    """A residual network or block of this library, in both frameworks.

    Attributes:
      naming: Naming scheme of ``state``, or the name of a known one.
      module: The PyTorch side; None: the reference of ``torch_ref``, which has torchvision's names.
    """

    config: Config
    state: Mapping[str, np.ndarray]
    norm_options: Mapping[str, Any]
    naming: str | Naming = "torchvision"
    module: torch.nn.Module | None = None

    @classmethod
    def of(cls, source: OpenedCheckpoint) -> ReferencePair:
        """The reference models of an opened checkpoint."""
        state_map = StateMap(source.config, "torchvision")
        state = transcode(source.state_map, state_map, source.tensors)
        return cls(source.config, state, source.norm_options)

    @classmethod
    def random(cls, config: Config, seed: int = 0, **norm_options: Any) -> ReferencePair:
        """ReferencePair with PyTorch's default weights and batch norms that look trained.

        Args:
          **norm_options: ``eps`` and ``momentum``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            state = state_to_numpy(torch_reference(config).state_dict())
        return cls(config, randomised_norm_state(state, seed), norm_options)

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Name of the architecture."""
        return name_of(self.config)

    @cached_property
    def state_map(self) -> StateMap:
        """PyTorch names to Flax paths."""
        return StateMap(self.config, self.naming)

    @property
    def entries(self) -> tuple[Entry, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Those of the state map."""
        return self.state_map.entries

    @cached_property
    def flax_slots(self) -> dict[str, tuple[Any, ...]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Attribute path of every slot."""
        return {slot.name: slot.path for slot in walk(self.config)}

    @cached_property
    def torch_slots(self) -> dict[str, str]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Module name of every slot that the PyTorch side has as a module."""
        if self.module is None:
            return self.state_map.modules
        there = dict(self.module.named_modules())
        found = {slot: name for slot, name in self.state_map.modules.items() if name in there}
        for slot in walk(self.config):
            if slot.role in self.state_map.naming.matrices:
                found.pop(slot.name, None)  # it gives a vector, and Flax an image of one pixel
            # timm's norms go on with dropout, here none, and their activation
            if slot.normalises and (inside := f"{found.get(slot.name)}.drop") in there:
                found[slot.name] = inside
            # a head that is a convolution gives an image of one pixel
            if (
                slot.name == "head"
                and (flat := found["head"].rpartition(".")[0] + ".flatten") in there
            ):
                found["head"] = flat
        return found

    @property
    def branches(self) -> dict[str, Branch]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The branch of every slot."""
        return {slot.name: slot.branch for slot in walk(self.config)}

    def specification(self) -> ReferencePair | None:
        """The same network with the reference of ``torch_ref`` as its PyTorch side; None where it
        already is."""
        if self.module is None:
            return None
        state_map = StateMap(self.config, "torchvision")
        state = transcode(self.state_map, state_map, self.state)
        return ReferencePair(self.config, state, self.norm_options)

    def torch(self, precision: Precision) -> torch.nn.Module:
        """The PyTorch module with its weights in ``precision.storage``."""
        state = {key: from_numpy(_cast(value, precision)) for key, value in self.state.items()}
        dtype = torch_dtype(precision)
        if self.module is None:
            return self.holding(state).to(dtype)  # what no state dict holds
        module = copy.deepcopy(self.module).to(dtype)
        module.load_state_dict(state, strict=True)
        return module

    def holding(self, state: Mapping[str, torch.Tensor]) -> torch.nn.Module:
        """The reference of ``torch_ref`` with these tensors for its own."""
        with _NothingDrawn():
            module = torch_reference(self.config, self.norm_options)
        module.load_state_dict(state, strict=True, assign=True)
        return module

    def flax(self, precision: Precision) -> Model:
        """The nnx model with its weights in ``precision.storage``."""
        options: dict[str, Any] = {**self.norm_options, "dtype": precision.compute}
        model = build(self.config, rngs=None, **options)
        for entry in self.entries:  # one at a time, so that none is in memory three times
            moved = entry.codec.to_flax(self.state[entry.torch_key])
            fill(model, {entry.flax_path: _cast(moved, precision)})
        return model


_DRAWING = ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_")


class _NothingDrawn(TorchFunctionMode):
    """Within it layers leave their new parameters as they found the memory, where every one is
    about to be replaced."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def torch_dtype(precision: Precision) -> torch.dtype:
    """``precision.storage`` as torch calls it."""
    return from_numpy(np.zeros((), precision.storage)).dtype


def _cast(value: np.ndarray, precision: Precision) -> np.ndarray:
    """A copy in C order, numbers with a fraction in ``precision.storage``."""
    dtype = precision.storage if is_floating(value.dtype) else np.int64
    return value.astype(dtype, order="C")


@dataclass(frozen=True)
class Consequence:
    """How the output would change under another assumption.

    Attributes:
      argument: What selects it, ``"`stride_on='1x1'`"``.
      difference: Relative L2 difference of the output, evaluation mode, float64.
    """

    argument: str
    meaning: str
    difference: float

    @property
    def note(self) -> str:
        """One line for the terminal."""
        return (
            f"with {self.argument} ({self.meaning}) the output would differ by "
            f"{self.difference:.1e} (relative, evaluation mode); the tensors fit both"
        )


def consequences(source: OpenedCheckpoint, images: np.ndarray) -> Iterator[Consequence]:
    """Runs every alternative to an assumption of ``source`` in PyTorch, in float64, on images
    ``(N, H, W, C)``."""
    pair = ReferencePair.of(source)
    for assumption in source.assumed.choices:
        made = _output(pair, images)
        for value, config in assumption.alternatives.items():
            other = _output(ReferencePair(config, pair.state, pair.norm_options), images)
            rule = assumption.rule
            difference = relative_l2(other, made)
            yield Consequence(rule.argument(value), rule.choices[value], difference)


def _output(pair: ReferencePair, images: np.ndarray) -> Any:
    precision = PRECISIONS["float64"]
    with torch.no_grad():
        return pair.torch(precision).eval()(as_tensor(images, precision)).numpy()
