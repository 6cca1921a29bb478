"""Runs a user's module, or the part of it that was converted, and a Flax network beside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.config import Branch, Config, walk
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.cpu.switch import compiler_options
from flax_resblock.nn.resnet import Model, ResNet
from flax_resblock.parity.taps import as_array

Size = tuple[int, int]
"""Height and width of images."""


@dataclass(frozen=True)
class NetworkPlace:
    """Where in a module the converted network is.

    Attributes:
      prefix: Of its tensors; only used where others were left out.
      left_out: Names of the modules whose tensors were left out.
      inputs: What these modules were given in the latest run.
    """

    prefix: str
    left_out: tuple[str, ...]
    inputs: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, module: torch.nn.Module, source: OpenedCheckpoint) -> NetworkPlace:
        """Finds the prefix as the state dict was read: wrappers first, then the backbone."""
        keys, is_key = {key: key for key in module.state_dict()}, lambda key: isinstance(key, str)
        stripped = unwrap(keys, is_tensor=is_key, source="the module").state
        name_of_array = {id(array): key for key, array in source.record.tensors.items()}
        own = [(key, name_of_array.get(id(array))) for key, array in source.tensors.items()]
        used = {key: stripped[name] for key, name in own if name is not None}
        prefixes = [name.removesuffix(key) for key, name in used.items() if name.endswith(key)]
        prefix = prefixes[0] if prefixes else ""
        left = [name for name in stripped.values() if name not in set(used.values())]
        return cls(prefix, tuple(dict.fromkeys(key.rpartition(".")[0] for key in left)))

    def subject(self, module: torch.nn.Module) -> torch.nn.Module:
        """What is run: the module, or the part of it that was converted."""
        return module.get_submodule(self.prefix.rstrip(".")) if self.left_out else module

    @contextmanager
    def tapped(self, module: torch.nn.Module) -> Iterator[None]:
        """Within it ``inputs`` receives what the modules whose tensors were left out are given."""

        def record(_: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.inputs.extend(value for value in args if isinstance(value, torch.Tensor))

        parts = [module.get_submodule(name) for name in self.left_out if name]
        handles = [part.register_forward_pre_hook(record) for part in parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def tensors_in(output: Any) -> list[torch.Tensor]:
    """Every tensor in a module's output; only the logits where it names them."""
    if isinstance(output, torch.Tensor):
        return [output]
    is_mapping = isinstance(output, Mapping)
    logits = output.get("logits") if is_mapping else getattr(output, "logits", None)
    if isinstance(logits, torch.Tensor):
        return [logits]
    parts = output.values() if is_mapping else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def as_shape(tensor: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray | None:
    """The tensor in Flax's layout; None where it does not have the shape.

    Pooled features may keep two axes of length one."""
    if tensor.ndim == 4 and len(shape) == 2 and tuple(tensor.shape[2:]) == (1, 1):
        tensor = tensor.flatten(1)
    array = as_array(tensor)
    return array if array.shape == shape else None


def cpu_device() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names other platforms only
        return jax.local_devices()[0]


@functools.cache
def compiled_outputs(cpu: bool) -> Callable[..., tuple[jax.Array, ...]]:
    """Runs a split model, compiled once per architecture; ``cpu`` tells the two lowerings apart."""
    del cpu

    def outputs(graphdef: Any, state: Any, images: jax.Array) -> tuple[jax.Array, ...]:
        model: Model = nnx.merge(graphdef, state)
        if isinstance(model, ResNet) and model.head is None:
            *_, last = model.features(images).values()
            return model.pooled(last), last
        return (model(images),)

    return jax.jit(outputs, static_argnums=0, compiler_options=compiler_options())


def odd_size(size: Size) -> Size:
    return size[0] + 3, size[1] + 1


def shown_size(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def relative_max(ours: np.ndarray, exact: np.ndarray) -> float:
    with np.errstate(all="ignore"):
        return float(np.max(np.abs(ours - exact)) / np.max(np.abs(exact)))


def by_use(config: Config, sizes: Sequence[Size]) -> list[Size]:
    """Sizes of images in the order in which they are tried.

    A size that leaves a last feature map of a single pixel comes last, because global average and
    max pooling are the same there."""
    reduction = math.prod(one.stride for one in walk(config) if one.branch is not Branch.SHORTCUT)
    return sorted(sizes, key=lambda size: min(size) <= reduction)
