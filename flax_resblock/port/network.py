"""A ported network: its source, and the table between the tensors of the two frameworks.

Needs no torch."""

from __future__ import annotations

import linecache
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.config import BlockConfig, Path
from flax_resblock.convert.codecs import Codec, folded
from flax_resblock.errors import InputError, some
from flax_resblock.nn.variables import PORTED_FROM, flat_arrays, on_device, set_values
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.port.inputs import Shapes, random_inputs


@dataclass(frozen=True)
class Tensor:
    """A tensor of the state dict and where the Flax model has it.

    Attributes:
      key: In the state dict.
      path: In the model; None for what the forward pass never uses.
      codec: Between the two memory layouts.
    """

    key: str
    path: Path | None
    codec: Codec


@dataclass(frozen=True)
class Table:
    """The map between a state dict and a Flax model, read in both directions.

    Attributes:
      tensors: One row for every tensor of the state dict.
    """

    tensors: tuple[Tensor, ...]

    def to_flax(self, state: Mapping[str, np.ndarray]) -> dict[Path, np.ndarray]:
        """A state dict as the Flax model has it.

        Raises:
          InputError: It has other tensors than the network.
        """
        keys = {one.key for one in self.tensors}
        missing, unexpected = sorted(keys - state.keys()), sorted(state.keys() - keys)
        if missing or unexpected:
            lines = ["The state dict is not that of the ported network."]
            lines += [f"  missing     {some(missing)}"] if missing else []
            lines += [f"  unexpected  {some(unexpected)}"] if unexpected else []
            raise InputError("\n".join(lines))
        return {
            one.path: one.codec.to_flax(state[one.key])
            for one in self.tensors
            if one.path is not None
        }

    def to_torch(
        self, arrays: Mapping[Path, np.ndarray], unused: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """The state dict, in the order that PyTorch has it in.

        Args:
          arrays: Of the model, by attribute path.
          unused: The tensors that the forward pass never uses, by their keys.
        """
        return {
            one.key: unused[one.key] if one.path is None else one.codec.to_torch(arrays[one.path])
            for one in self.tensors
        }

    def rows(self) -> list[dict[str, Any]]:
        """As JSON has it."""
        return [
            {
                "torch": one.key,
                "flax": None if one.path is None else list(one.path),
                "axes": None if one.codec.axes is None else list(one.codec.axes),
            }
            | ({"columns": list(one.codec.columns)} if one.codec.columns is not None else {})
            for one in self.tensors
        ]

    @classmethod
    def of_rows(cls, rows: Any) -> Table:
        """From JSON.

        Raises:
          InputError: It is no such table.
        """
        tensors = []
        for row in rows if isinstance(rows, list) else [None]:
            read = row if isinstance(row, dict) else {}
            key, path, axes, columns = map(read.get, ("torch", "flax", "axes", "columns"))
            sound = isinstance(key, str) and all(isinstance(p, int | str) for p in path or [])
            if not sound or (axes is not None and sorted(axes) != list(range(len(axes)))):
                raise InputError(f"the table of tensors is damaged at {str(row)[:120]!r}.")
            codec = Codec("as is") if axes is None else Codec("axes moved", tuple(axes))
            if columns is not None:
                sizes = isinstance(columns, list) and all(isinstance(c, int) for c in columns)
                if not sizes or len(columns) != 3 or axes != [1, 0]:
                    raise InputError(f"the table of tensors is damaged at {str(row)[:120]!r}.")
                codec = folded((columns[0], columns[1], columns[2]))
            tensors.append(Tensor(str(key), None if path is None else tuple(path), codec))
        return cls(tuple(tensors))


@dataclass(frozen=True, eq=False, repr=False)
class PortedNetwork:
    """A network of the user's as Flax source, with its weights.

    Attributes:
      source: The Python file; empty if the network was loaded from a folder.
      name: The class of the network in it.
      table: Where every tensor of the state dict is.
      values: The weights, by attribute path.
      unused: Tensors that the forward pass never uses, by their PyTorch keys.
      origin: The module's class, as the certificate names it.
      image_size: Height and width of the images that it was traced with.
      channels: Of these images.
      slots: Paths of the layers whose outputs can be compared, by their names in PyTorch.
      inputs: Shapes of its inputs, if they are something else than one batch of images.
      figures: What the comparison with the module measured; see
        :class:`flax_resblock.port.proof.Proof`.
      notes: What you should know about the result.
    """

    source: str
    name: str
    table: Table
    values: Mapping[Path, np.ndarray]
    unused: Mapping[str, np.ndarray]
    origin: str
    image_size: tuple[int, int]
    channels: int
    slots: Mapping[str, Path] = field(default_factory=dict)
    inputs: Shapes = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def network(self) -> Callable[..., nnx.Module]:
        """What creates the network, called with ``rngs``: the class in the executed source.

        Models of the class know this description, see :func:`ported_of`."""
        made = getattr(executed(self.source, f"ported_{self.name.lower()}"), self.name)
        if isinstance(made, type):
            setattr(made, PORTED_FROM, replace(self, values={}))
        return made

    def create(self) -> nnx.Module:
        """The network with the weights of the module, in evaluation mode."""
        return filled(self.network, self.values)

    def __repr__(self) -> str:
        return f"PortedNetwork({self.name}, {len(self.table.tensors)} tensors, of {self.origin})"

    def pair_with(self, module: Any, model: nnx.Module, *, copy_weights: bool = False) -> Any:
        """A :class:`flax_resblock.port.pair.PortedPair` of the module and a model of this network,
        to be compared; needs torch."""
        from flax_resblock.port.pair import PortedPair

        return PortedPair(module, model, self, copy_weights=copy_weights)

    def images(self) -> np.ndarray:
        """Random images of the size that it was traced with, ``(3, H, W, C)``; several inputs in
        one array, see :mod:`flax_resblock.port.inputs`."""
        if self.inputs:
            return random_inputs(self.inputs, batch=3)
        height, width = self.image_size
        config = BlockConfig(in_channels=self.channels, out_channels=self.channels)
        return adversarial_images(config, batch=3, height=height, width=width)

    def to_torch(self, model: nnx.Module) -> dict[str, np.ndarray]:
        """The state dict of a model of this network, as ``load_state_dict(strict=True)`` takes it
        once :func:`torch.from_numpy` has made tensors of its arrays.
        """
        return self.table.to_torch(flat_arrays(model), self.unused)


def ported_of(model: Any) -> PortedNetwork | None:
    """What a model was ported from, without its weights; None if it was not."""
    return getattr(model, PORTED_FROM, None)


def filled(network: Callable[..., nnx.Module], values: Mapping[Path, np.ndarray]) -> nnx.Module:
    """A network with these values, in evaluation mode.

    Args:
      network: The class of the network in a ported file, called with ``rngs``.
      values: By attribute path.
    Raises:
      InputError: They are not the values of this network.
    """
    model = nnx.eval_shape(lambda: network(rngs=nnx.Rngs(0)))
    state = nnx.state(model, (nnx.Param, nnx.BatchStat))
    flat: Any = dict(nnx.to_flat_state(state))
    shapes: dict[Path, tuple[int, ...]] = {path: tuple(one.shape) for path, one in flat.items()}
    wrong = [
        ".".join(map(str, path))
        for path in {**shapes, **values}
        if path not in values or shapes.get(path) != tuple(values[path].shape)
        if not (path not in values and path[-1] == "num_batches_tracked")
    ]
    if wrong:
        name = getattr(network, "__name__", "the network")
        raise InputError(
            f"The weights are not those of {name}: {some(sorted(wrong))} differ. "
            f"Was the file edited after it was ported?"
        )
    complete = dict(values)
    for path in shapes:
        complete.setdefault(path, np.zeros((), np.int64))  # counters that PyTorch does not have
    set_values(model, on_device(complete))
    for place, (_, node) in enumerate(nnx.iter_graph(model)):
        if isinstance(node, nnx.RngKey):
            node.set_value(jax.random.key(place))
        elif isinstance(node, nnx.RngCount):
            node.set_value(jnp.zeros((), jnp.uint32))
    model.eval()
    return model


def executed(source: str, name: str) -> types.ModuleType:
    """The source as a module whose code tracebacks show."""
    module = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module
