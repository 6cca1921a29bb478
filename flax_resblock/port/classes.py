"""Finds which modules are instances of one emitted class, and what its arguments are."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from itertools import combinations
from typing import TYPE_CHECKING, Any

from flax_resblock import nn
from flax_resblock.port.parts import (
    Body,
    ContainerPart,
    LayerPart,
    ModulePart,
    ParameterPart,
    Part,
    parts_of,
)  # fmt: skip

if TYPE_CHECKING:
    from flax_resblock.port.body import Reader
    from flax_resblock.port.layers import Layer

Slot = tuple[Any, ...]
"""A place in the code of a class that holds a number: the attribute path, then the argument."""


@dataclass(eq=False)
class EmittedClass:
    """A class of the emitted code.

    Attributes:
      name: Unique in the file.
      bodies: Its instances in the network.
      slots: What each instance has in each place.
      arguments: Of ``__init__``: name -> value in each instance.
      names: The places that hold an argument.
      defaults: Of the arguments that have one.
      optional: Children that some instances lack -> whether each instance has it.
      conditions: The same children -> code that tells it.
    """

    name: str
    bodies: list[Body]
    slots: list[dict[Slot, Any]] = field(default_factory=list)
    arguments: dict[str, list[Any]] = field(default_factory=dict)
    names: dict[Slot, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    optional: dict[str, list[bool]] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)

    @property
    def main(self) -> Body:
        """An instance that has everything."""
        return self.bodies[0]

    def literal(self, slot: Slot) -> Any:
        """What every instance has in a place."""
        return next(one[slot] for one in self.slots if slot in one)


def classes_of(reader: Reader, root: Body) -> list[EmittedClass]:
    """The classes of a network, each behind those that it uses; the network's own is the last."""
    found: list[EmittedClass] = []
    for bodies in _in_layers(root):
        groups: dict[Any, list[Body]] = {}
        for body in bodies:
            groups.setdefault(_skeleton(body), []).append(body)
        for group, optional in _with_optional_children(reader, list(groups.values())):
            made = EmittedClass(group[0].cls.__name__, group, optional=optional)
            for body in group:
                body.group = made
            made.slots = [dict(_slots_of(body)) for body in group]
            _find_arguments(made)
            _find_conditions(made)
            found.append(made)
    _make_unique(found)
    return found


def _in_layers(root: Body) -> list[list[Body]]:
    """The bodies in groups, each behind those that its members use, of one PyTorch class if
    possible.
    """
    inside: dict[int, tuple[Body, list[Body]]] = {}

    def visit(body: Body) -> None:
        if id(body) not in inside:
            children = list(_bodies_in(parts_of(body)))
            inside[id(body)] = (body, children)
            for child in children:
                visit(child)

    visit(root)
    uses: dict[Any, set[Any]] = {}
    for body, children in inside.values():
        uses.setdefault(body.cls, set()).update(child.cls for child in children)
    try:
        order: list[Any] = list(TopologicalSorter(uses).static_order())
        key_of = {id(body): order.index(body.cls) for body, _ in inside.values()}
    except CycleError:  # a class that is a part of itself, such as a tree
        key_of = {}

        def height(body: Body) -> int:
            children = inside[id(body)][1]
            key_of[id(body)] = 1 + max((height(child) for child in children), default=0)
            return key_of[id(body)]

        height(root)
    layers: dict[int, list[Body]] = {}
    for body, _ in inside.values():
        layers.setdefault(key_of[id(body)], []).append(body)
    return [layers[key] for key in sorted(layers)]


def _bodies_in(parts: Mapping[str, Part]) -> Iterator[Body]:
    for part in parts.values():
        if isinstance(part, ModulePart):
            yield part.body
        elif isinstance(part, ContainerPart):
            yield from _bodies_in(part.items)


def _with_optional_children(
    reader: Reader, groups: list[list[Body]]
) -> list[tuple[list[Body], dict[str, list[bool]]]]:
    """Joins groups that differ in children which some instances lack, such as a projection."""
    groups = sorted(groups, key=lambda group: -len(group[0].parts))
    joined: list[tuple[list[Body], dict[str, list[bool]]]] = []
    for group in groups:
        for other, optional in joined:
            main = other[0]
            lacking = [name for name in main.parts if name not in group[0].parts]
            if (
                main.cls is group[0].cls
                and lacking
                and main.sequence is None
                and not any(isinstance(main.parts[name], ParameterPart) for name in lacking)
                and _skeleton(_without(reader, main, lacking)) == _skeleton(group[0])
            ):
                for name in {*optional, *lacking}:
                    flags = optional.setdefault(name, [True] * len(other))
                    flags += [name not in lacking] * len(group)
                other += group
                break
        else:
            joined.append((group, {}))
    return joined


def _without(reader: Reader, body: Body, names: Sequence[str]) -> Body:
    """The body as it would be if these children returned their input."""
    from flax_resblock.port.body import BodyReader

    return BodyReader(reader, body.path, reader.inputs[body.path], frozenset(names)).read()


def _skeleton(body: Body) -> Any:
    """Equal for bodies that differ in numbers only."""
    parts = tuple((name, _shape_of_part(part)) for name, part in parts_of(body).items())
    if body.sequence is not None:
        return body.cls, "sequence", parts
    return body.cls, parts, tuple(body.arguments), tuple(body.lines), body.result, body.list_input


def _shape_of_part(part: Part) -> Any:
    if isinstance(part, LayerPart) and not part.layer.stateful:
        return "function"
    if isinstance(part, LayerPart):
        return part.layer.call, len(part.layer.positional)
    if isinstance(part, ParameterPart):
        return part.name, len(part.shape), part.order, part.trained
    if isinstance(part, ModulePart):
        return ("class", id(part.body.group))
    return part.kind, tuple((key, _shape_of_part(one)) for key, one in part.items.items())


def _slots_of(body: Body) -> Iterator[tuple[Slot, Any]]:
    for name, part in parts_of(body).items():
        yield from _slots(part, (name,))
    if body.sequence is None:
        for place, constant in enumerate(body.constants):
            yield (f"\x01{place}\x02", constant.hint), constant.value


def _slots(part: Part, path: Slot) -> Iterator[tuple[Slot, Any]]:
    if isinstance(part, LayerPart) and not part.layer.stateful:
        yield (*path, "function"), Written(function_text(part.layer))
    elif isinstance(part, LayerPart):
        names = argument_names(part.layer.call)
        for name, value in zip(names, part.layer.positional, strict=False):
            yield (*path, name), value
        for name, value in part.layer.options.items():
            yield (*path, name), value
    elif isinstance(part, ParameterPart):
        order = part.order or range(len(part.shape))
        for place, axis in enumerate(order):
            yield (*path, place), part.shape[axis]
    elif isinstance(part, ModulePart):
        emitted: EmittedClass = part.body.group
        place = next(i for i, one in enumerate(emitted.bodies) if one is part.body)
        for name, values in emitted.arguments.items():
            yield (*path, name), values[place]
    else:
        for key, item in part.items.items():
            yield from _slots(item, (*path, key))


def _parameters(call: str) -> Mapping[str, inspect.Parameter]:
    """Of a layer or function of ``flax_resblock.nn``, without ``self`` or ``x``."""
    called = getattr(nn, call.removeprefix("nn."))
    made_by = called.__init__ if isinstance(called, type) else called
    return dict(list(inspect.signature(made_by).parameters.items())[1:])


@dataclass(frozen=True)
class Written:
    """A value that is written as this code."""

    text: str

    def __repr__(self) -> str:
        return self.text


def function_text(layer: Layer) -> str:
    """A layer without state as a function of one array: ``partial(nn.max_pool, kernel_size=3)``."""
    given = dict(zip(argument_names(layer.call), layer.positional, strict=False))
    given.update(layer.options)
    text = "".join(f", {name}={value!r}" for name, value in given.items())
    return f"partial({layer.call}{text})" if text else layer.call


def argument_names(call: str) -> list[str]:
    """The names of the arguments of a layer; a function's first, the array, is left out."""
    return list(_parameters(call))


def default_of(call: str, name: str) -> Any:
    """The default of an argument of a layer."""
    return _parameters(call)[name].default


def _find_arguments(made: EmittedClass) -> None:
    """Gives a name to every number that differs between instances."""
    places = dict.fromkeys(slot for one in made.slots for slot in one)
    defaults = _default_slots(made, places)
    absent = object()
    rows: dict[Slot, list[Any]] = {}
    for slot in places:
        row = [
            one.get(slot, absent if _lacks(made, slot, place) else defaults.get(slot))
            for place, one in enumerate(made.slots)
        ]
        if len({repr(value) for value in row if value is not absent}) > 1:
            rows[slot] = row
    vectors: list[tuple[list[Any], list[Slot]]] = []
    for slot, row in sorted(rows.items(), key=lambda pair: absent in pair[1]):
        for known, slots in vectors:
            if all(b is absent or repr(a) == repr(b) for a, b in zip(known, row, strict=True)):
                slots.append(slot)
                break
        else:
            common = next(value for value in row if value is not absent)
            vectors.append(([common if value is absent else value for value in row], [slot]))
    taken: set[str] = {*parts_of(made.main), "self", "rngs"}
    for values, slots in vectors:
        name = _argument_name(slots, taken)
        taken.add(name)
        made.names.update(dict.fromkeys(slots, name))
        made.arguments[name] = values
    _order_arguments(made)


def _lacks(made: EmittedClass, slot: Slot, place: int) -> bool:
    """Whether an instance lacks the child that a place is in."""
    return slot[0] in made.optional and not made.optional[slot[0]][place]


def _order_arguments(made: EmittedClass) -> None:
    """Channels first; what has a default last."""
    for name, values in made.arguments.items():
        (common, count), *_ = Counter(map(repr, values)).most_common(1)
        if 2 * count >= len(values) and "channels" not in name and "features" not in name:
            made.defaults[name] = next(value for value in values if repr(value) == common)
    order = sorted(made.arguments, key=lambda name: (name in made.defaults, _rank(name)))
    made.arguments = {name: made.arguments[name] for name in order}


def _find_conditions(made: EmittedClass) -> None:
    """Says which instances have an optional child: by their arguments, or by one more."""
    channels = [name for name in made.arguments if "channels" in name]
    strides = [f"{name} != 1" for name in made.arguments if "stride" in name]
    pairs = [f"{a} != {b}" for a, b in combinations(channels, 2)]
    candidates = [*strides, *pairs, *(f"{a} or {b}" for a in strides for b in pairs)]
    for child, flags in made.optional.items():
        for condition in candidates:
            instances = range(len(made.bodies))
            told = [
                {name: values[place] for name, values in made.arguments.items()}
                for place in instances
            ]
            if [bool(eval(condition, {}, one)) for one in told] == flags:
                made.conditions[child] = condition
                break
        else:
            name = f"with_{child}"
            made.arguments[name] = list(flags)
            made.defaults[name] = Counter(flags).most_common(1)[0][0]
            made.conditions[child] = name


def _default_slots(made: EmittedClass, everywhere: Mapping[Slot, None]) -> dict[Slot, Any]:
    """The defaults of arguments that some instances have."""
    found: dict[Slot, Any] = {}
    for slot in everywhere:
        part: Any = parts_of(made.main).get(slot[0])
        for step in slot[1:-1]:
            part = part.items[step] if isinstance(part, ContainerPart) else None
        if isinstance(part, LayerPart) and part.layer.stateful:
            found[slot] = default_of(part.layer.call, slot[-1])
    return found


def _rank(name: str) -> int:
    if name.startswith(("in_", "num_features")):
        return 0
    return 1 if "channels" in name or "features" in name else 2


def _argument_name(slots: Sequence[Slot], taken: set[str]) -> str:
    roles = [str(slot[-1]) for slot in slots]
    if "function" in roles:
        roles = ["activation"]
    first = slots[0]
    base = "_".join(str(step) for step in first[:-1] if "\x01" not in str(step))
    base = base if base.isidentifier() else f"_{base}".replace(".", "_") if base else ""
    own = [role for role in roles if not role.isdigit()]
    if any(role == "in_channels" for role in roles) and not any(r == "out_channels" for r in roles):
        candidates = ["in_channels"]
    elif any(role == "out_channels" for role in roles):
        last = [slot for slot in slots if slot[-1] == "out_channels"][-1]
        candidates = ["out_channels", f"{'_'.join(map(str, last[:-1]))}_channels"]
    elif own:
        candidates = [own[0], f"{base}_{own[0]}".strip("_")]
    else:
        candidates = ["channels", f"{base}_size"]
    for name in candidates:
        name = name if name.isidentifier() else f"n_{name}"
        if name.isidentifier() and name not in taken:
            return name
    number = 2
    while f"{candidates[-1]}_{number}" in taken:
        number += 1
    name = f"{candidates[-1]}_{number}"
    return name if name.isidentifier() else f"n_{name}"


def _make_unique(found: Sequence[EmittedClass]) -> None:
    """Numbers the classes of one name, the one that most modules are instances of first."""
    by_name: dict[str, list[EmittedClass]] = {}
    for one in found:
        by_name.setdefault(one.name, []).append(one)
    taken = set(by_name)
    for name, group in by_name.items():
        for place, one in enumerate(sorted(group, key=lambda one: -len(one.bodies))):
            number = place + 1
            one.name = name if place == 0 else f"{name}{number}"
            while place and one.name in taken:
                number += 1
                one.name = f"{name}{number}"
            taken.add(one.name)
