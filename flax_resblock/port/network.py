"""A ported network: its source, its weights, and the table between the two frameworks."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import Path
from flax_resblock.nn.variables import fill, flat_arrays
from flax_resblock.port import axes
from flax_resblock.port.body import Reader
from flax_resblock.port.classes import classes_of
from flax_resblock.port.parts import Tensor, tensors_of
from flax_resblock.port.source import source_of
from flax_resblock.port.tracing import trace
from flax_resblock.port.values import BATCH


@dataclass(frozen=True)
class PortedNetwork:
    """A network as Flax source.

    Attributes:
      source: Of the Python file.
      name: Of the class of the network in it.
      tensors: Where every tensor of the state dict is.
    """

    source: str
    name: str
    tensors: tuple[Tensor, ...]

    @cached_property
    def module(self) -> types.ModuleType:
        """The executed source."""
        return executed(self.source, f"ported_{self.name}")

    def values(self, state: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
        """The tensors of a state dict as Flax has them."""
        return {
            one.path: one.codec.to_flax(state[one.key])
            for one in self.tensors
            if one.path is not None
        }

    def create(self, values: Mapping[Path, np.ndarray]) -> nnx.Module:
        """The network with these values."""
        made = getattr(self.module, self.name)
        model = nnx.eval_shape(lambda: made(rngs=nnx.Rngs(0)))
        fill(model, values)
        _seed(model)
        return model

    def state_dict(
        self, model: nnx.Module, unused: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The state dict of PyTorch.

        Args:
          model: The network.
          unused: The tensors that the forward pass never uses.
        """
        arrays = flat_arrays(model)
        return {
            one.key: unused[one.key] if one.path is None else one.codec.to_torch(arrays[one.path])
            for one in self.tensors
        }


def _seed(model: nnx.Module) -> None:
    """Gives random layers a key each."""
    for place, (_, node) in enumerate(nnx.iter_graph(model)):
        if isinstance(node, nnx.RngKey):
            node.set_value(jax.random.key(place))
        elif isinstance(node, nnx.RngCount):
            node.set_value(jnp.zeros((), jnp.uint32))


def executed(source: str, name: str) -> types.ModuleType:
    """The source as a module, whose code tracebacks can show."""
    module = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module


def port_module(module: torch.nn.Module, images: torch.Tensor) -> PortedNetwork:
    """The source of a module.

    Args:
      module: In evaluation mode.
      images: Its input, ``(N, C, H, W)``.
    Raises:
      InputError: It cannot be traced, or has an operator that is not supported.
    """
    shape = (BATCH, *images.shape[1:])
    reader = Reader(trace(module, [images]))
    body = reader.body("", [(shape, axes.channels_last(len(shape)))])
    classes = classes_of(reader, body)
    name = type(module).__name__
    source = source_of(classes, f"{name} in Flax, ported from PyTorch.")
    placed = {one.key: one for one in tensors_of(body.parts)}
    keys = module.state_dict()
    tensors = [placed.get(key) or _tied(module, key, placed) for key in keys]
    return PortedNetwork(source, classes[-1].name, tuple(tensors))


def _tied(module: torch.nn.Module, key: str, placed: Mapping[str, Tensor]) -> Tensor:
    """A tensor that is the same as another one, or that the forward pass never uses."""
    from dataclasses import replace

    held = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    for other, one in placed.items():
        if held.get(other) is held.get(key) and key in held:
            return replace(one, key=key)
    from flax_resblock.convert.codecs import AS_IS

    return Tensor(key, None, AS_IS)


def arrays_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    """The state dict of a module as numpy arrays."""
    return state_to_numpy(module.state_dict())
