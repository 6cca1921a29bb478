"""What a class of the emitted code is made of, and how its instances differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flax_resblock.convert.codecs import Codec
from flax_resblock.port.axes import Order, Shape
from flax_resblock.port.layers import Layer
from flax_resblock.port.table import PlacedTensor
from flax_resblock.port.values import Constant

Key = tuple[Any, ...]
"""Equal for instances of one class."""


@dataclass
class LayerPart:
    """A layer of ``flax_resblock.nn``.

    Attributes:
      layer: Which, with its arguments.
      prefix: Of the names of its tensors in the state dict.
    """

    layer: Layer
    prefix: str


@dataclass
class ParameterPart:
    """A parameter or buffer that the forward pass uses itself.

    Attributes:
      name: In the module that it is a part of.
      shape: As PyTorch has it.
      order: In which it is stored; None until its first use decides.
      trained: Whether it is a parameter.
      initial: Code of the value that it starts with; ``{}`` is its shape.
      tied: Whether another part has its place in the state dict.
    """

    name: str
    shape: Shape
    order: Order | None
    trained: bool
    initial: str = "jnp.zeros({})"
    tied: bool = False


@dataclass
class ContainerPart:
    """Modules in a row or under names.

    Attributes:
      kind: ``"Sequential"``, ``"List"`` or ``"Dict"``.
      items: By their names in PyTorch.
    """

    kind: str
    items: dict[str, Part]


@dataclass
class ModulePart:
    """A module of a class that is emitted too."""

    body: Body


Part = LayerPart | ParameterPart | ContainerPart | ModulePart


@dataclass
class Body:
    """One instance of a class of the user's.

    Attributes:
      path: Where in the network it is.
      cls: Its class in PyTorch.
      parts: Its attributes.
      arguments: Of ``__call__``: name and shape for the docstring.
      lines: Of ``__call__``; ``\\x01INDEX\\x02`` is a constant.
      constants: Of the lines.
      outputs: Order and PyTorch shape of each tensor that it returns.
      is_tuple: Whether it returns several tensors.
      list_input: Whether its only argument is a list of tensors.
      sequence: If it does nothing but call modules in a row, those.
      result: What is returned, with a hole for every tensor.
      training_result: The same in training mode, if that is more.
      training_outputs: Order and PyTorch shape of each tensor of it.
      ties: Assignments of ``__init__`` that make one variable of two: target and value.
      group: The class that it is emitted as.
    """

    path: str
    cls: type
    parts: dict[str, Part] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    input_shapes: list[Shape] = field(default_factory=list)
    outputs: list[tuple[Shape, Order]] = field(default_factory=list)
    is_tuple: bool = False
    list_input: bool = False
    sequence: ContainerPart | None = None
    result: str = "{}"
    training_result: str = ""
    training_outputs: list[tuple[Shape, Order]] = field(default_factory=list)
    ties: list[tuple[str, str]] = field(default_factory=list)
    group: Any = None


def tensors_of(
    parts: Mapping[str, Part], prefix: str = "", path: tuple[Any, ...] = ()
) -> list[PlacedTensor]:
    """Every tensor of a module's parts."""
    found: list[PlacedTensor] = []
    for name, part in parts.items():
        found += _tensors(part, (*path, name), prefix)
    return found


def _tensors(part: Part, path: tuple[Any, ...], prefix: str) -> list[PlacedTensor]:
    if isinstance(part, LayerPart):
        return [
            PlacedTensor(f"{part.prefix}{torch}", (*path, ours), codec)
            for torch, (ours, codec) in part.layer.tensors.items()
        ]
    if isinstance(part, ParameterPart):
        if part.tied:
            return []
        moved = part.order not in (None, tuple(range(len(part.shape))))
        codec = Codec("axes moved", part.order) if moved else Codec("as is")
        return [PlacedTensor(f"{prefix}{part.name}", path, codec)]
    if isinstance(part, ModulePart):
        body, inside = part.body, f"{part.body.path}."
        if body.sequence is None:
            return tensors_of(body.parts, inside, path)
        return _tensors(body.sequence, path, inside)
    return [
        tensor
        for place, (key, item) in enumerate(part.items.items())
        for tensor in _tensors(item, (*path, *STEPS[part.kind](place, key)), prefix)
    ]


def parts_of(body: Body) -> dict[str, Part]:
    """The attributes of a class, or the modules of one that is a sequence."""
    return body.parts if body.sequence is None else body.sequence.items


STEPS: Mapping[str, Any] = {
    "Sequential": lambda place, key: ("layers", place),
    "List": lambda place, key: (place,),
    "Dict": lambda place, key: (key,),
}
"""What leads from a container to one of its items, by kind: place and key to a path."""
