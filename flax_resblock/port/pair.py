"""A user's module and what it was ported to, as a pair that is verified like any other."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import from_numpy, state_to_numpy
from flax_resblock.config import Path
from flax_resblock.convert.state_map import Entry
from flax_resblock.errors import InputError, some
from flax_resblock.nn.variables import flat_arrays, variable_at
from flax_resblock.parity.module_run import copied_module, inner
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision
from flax_resblock.parity.taps import as_tensor
from flax_resblock.port.network import PortedNetwork
from flax_resblock.port.proof import FLOOR
from flax_resblock.port.random_off import drop_nothing, no_functional_dropout, switch_off
from flax_resblock.port.side_by_side import FlatModule, FlatNetwork
from flax_resblock.port.weight_norm import without_hooks

NET = "net"
"""The network inside the modules that put its outputs in one array."""


class _TorchOutputs(FlatModule):
    """The module with what it returns in evaluation mode as one tensor; in training mode without
    what auxiliary heads return. It draws no random numbers."""

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        with no_functional_dropout():
            found = super().parts(x)
        self.count = self.count or len(found)
        return found


class PortedPair(Pair):
    """A module and a model of the network that it was ported to.

    Slots have the names of the user's modules. Several inputs are one array, see
    :mod:`flax_resblock.port.inputs`, and so are several outputs; random layers are switched off on
    both sides.

    Args:
      module: The user's own; not modified.
      model: The port, whose code may have been edited; not modified.
      ported: The table between their tensors.
      copy_weights: Compare with the module's tensors on both sides, instead of each side's own.
    Raises:
      InputError: The two do not have the tensors of the table.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        model: nnx.Module,
        ported: PortedNetwork,
        *,
        copy_weights: bool = False,
    ) -> None:
        self.title = f"{type(inner(module)).__name__} against its port"
        self.gradient_floor = FLOOR
        net = copied_module(inner(module)).cpu().requires_grad_(True)
        without_hooks(net)
        switch_off(net)
        values = ported.table.to_flax(state_to_numpy(net.state_dict()))
        own = flat_arrays(model)
        wrong = [
            ".".join(map(str, path))
            for path, value in values.items()
            if path not in own or own[path].shape != value.shape
        ]
        if wrong:
            raise InputError(
                f"{type(model).__name__} is not the port of {type(net).__name__}: {some(wrong)} "
                f"differ. Port the module again, or give both the same arguments."
            )
        self._values = values if copy_weights else {path: own[path] for path in values}
        self._torch, self._flax = _TorchOutputs(net, ported.inputs), model
        idle = self._run(ported.images())
        self._slots = {name: path for name, path in ported.slots.items() if name not in idle}
        rows = {one.flax_path: one for one in reversed(ported.table.entries) if not one.unused}
        self.entries = tuple(
            Entry((NET, *path), f"{NET}.{one.torch_key}", one.codec, "weight", values[path].shape)
            for path, one in reversed(rows.items())
        )

    def _run(self, images: np.ndarray) -> set[str]:
        """Counts the outputs of the module, and returns the names of those parts of it that hand on
        the very tensor that they are given: its gradient is not theirs alone."""
        idle: set[str] = set()

        def watch(name: str, part: torch.nn.Module) -> None:
            part.register_forward_hook(
                lambda _, given, made: idle.add(name) if given and made is given[0] else None
            )

        flat: Any = copy.deepcopy(self._torch).float().eval()
        for name, part in flat.net.named_modules():
            watch(name, part)
        with torch.no_grad():
            flat(as_tensor(images, PRECISIONS["float32"]))
        self._torch.count = flat.count
        return idle

    @property
    def flax_slots(self) -> Mapping[str, Path]:
        """Attribute path of every module of the user's that can be compared."""
        return {name: (NET, *path) for name, path in self._slots.items()}

    @property
    def torch_slots(self) -> Mapping[str, str]:
        """Name of the same modules."""
        return {name: f"{NET}.{name}" for name in self._slots}

    def name_of(self, entry: Entry) -> str:
        """The user's module, and the tensor's name in Flax."""
        holder = entry.torch_key.rpartition(".")[0].removeprefix(NET).removeprefix(".")
        return f"{holder}/{entry.flax_path[-1]}".removeprefix("/")

    def torch(self, precision: Precision) -> torch.nn.Module:
        """A copy in ``precision.storage``."""
        return copy.deepcopy(self._torch).to(from_numpy(np.zeros((), precision.storage)).dtype)

    def flax(self, precision: Precision) -> nnx.Module:
        """A copy in ``precision.storage``; layers that have a ``dtype`` compute in
        ``precision.compute``."""
        model = nnx.clone(self._flax)
        for path, value in self._values.items():
            floating = jnp.issubdtype(value.dtype, jnp.floating)
            dtype = precision.storage if floating else None
            variable_at(model, path).set_value(jnp.asarray(value, dtype))
        drop_nothing(model)
        for _, part in nnx.iter_modules(model):
            layer: Any = part
            if hasattr(part, "dtype"):
                layer.dtype = precision.compute
        return FlatNetwork(model, self._torch.shapes, self._torch.count)
