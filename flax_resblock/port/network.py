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
from flax_resblock.convert.own import PORTED_FROM, carry
from flax_resblock.errors import InputError, some
from flax_resblock.nn.variables import KEPT, flat_arrays, on_device, set_values
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.port.inputs import Shapes, random_inputs
from flax_resblock.port.table import Table


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
        """The network with the weights of the module, in evaluation mode. It carries
        :attr:`carried`, with which :func:`flax_resblock.save`, :func:`flax_resblock.to_torch`,
        :func:`flax_resblock.load_run` and :func:`flax_resblock.training.fit` know its tensors.
        """
        return filled(self.network, self.values, self.carried)

    @cached_property
    def carried(self) -> Table:
        """:attr:`table` with what it says of the network, and the tensors that are never used."""
        about = {
            **self.table.about,
            "network": self.name,
            "image_size": list(self.image_size),
            "channels": self.channels,
            "inputs": [list(shape) for shape in self.inputs],
            "slots": {name: list(path) for name, path in self.slots.items()},
        }
        return self.table.with_content(about=about, unused=self.unused)

    def __repr__(self) -> str:
        return f"PortedNetwork({self.name}, {len(self.table.entries)} tensors, of {self.origin})"

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
        return self.table.to_torch(self.carried.whole(flat_arrays(model)), copy=True)


def ported_of(model: Any) -> PortedNetwork | None:
    """What a model was ported from, without its weights; None if it was not."""
    return getattr(model, PORTED_FROM, None)


def described(table: Table) -> PortedNetwork:
    """What a model of a network knows about itself that was read from a folder: neither its weights
    nor its source."""
    about = table.about
    slots = {name: tuple(path) for name, path in about["slots"].items()}
    inputs = tuple(tuple(shape) for shape in about["inputs"])
    name, size = str(about["network"]), tuple(about["image_size"])
    return PortedNetwork(
        "", name, table, {}, table.unused, name, size, about["channels"], slots, inputs
    )


class _Uncounted(nnx.RngStream):
    """Hands out the same key every time, which does where only shapes are asked for. To count in a
    traced variable costs milliseconds each time: jax words an error that flax then ignores."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def filled(
    network: Callable[..., nnx.Module],
    values: Mapping[Path, np.ndarray],
    table: Table | None = None,
) -> nnx.Module:
    """A network with these values, in evaluation mode.

    Args:
      network: The class of the network in a ported file, called with ``rngs``.
      values: By attribute path.
      table: What the model carries.
    Raises:
      InputError: They are not the values of this network.
    """

    def shapes_alone() -> nnx.Module:
        rngs: Any = nnx.Rngs(0)
        rngs.default = _Uncounted(0, tag="default")
        return network(rngs=rngs)

    model = nnx.eval_shape(shapes_alone)
    state = nnx.state(model, KEPT)
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
        if isinstance(node, _Uncounted):
            object.__setattr__(node, "__class__", nnx.RngStream)  # in the model, streams count
        elif isinstance(node, nnx.RngKey):
            node.set_value(jax.random.key(place))
        elif isinstance(node, nnx.RngCount):
            node.set_value(jnp.zeros((), jnp.uint32))
    model.eval()
    if table is not None:
        carry(model, table)
    return model


def executed(source: str, name: str) -> types.ModuleType:
    """The source as a module whose code tracebacks show."""
    module = types.ModuleType(name)
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec"), module.__dict__)
    return module
