"""The arguments of an emitted class: the numbers in which its instances differ."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from flax_resblock import nn
from flax_resblock.port.layer import Layer
from flax_resblock.port.parts import (
    Body,
    ContainerPart,
    LayerPart,
    ModulePart,
    ParameterPart,
    Part,
    parts_of,
)  # fmt: skip

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


def slots_of(body: Body) -> Iterator[tuple[Slot, Any]]:
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


def find_arguments(made: EmittedClass) -> None:
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
        if absent in row or len({repr(value) for value in row}) > 1:
            rows[slot] = row
    vectors: list[tuple[list[Any], list[Slot]]] = []
    for slot, row in sorted(rows.items(), key=lambda pair: absent in pair[1]):
        differ = len({repr(value) for value in row if value is not absent}) > 1
        for known, slots in vectors:
            alike = differ or any(one[-1] == slot[-1] for one in slots)
            if alike and all(
                b is absent or repr(a) == repr(b) for a, b in zip(known, row, strict=True)
            ):
                slots.append(slot)
                break
        else:
            if differ:
                common = next(value for value in row if value is not absent)
                vectors.append(([common if value is absent else value for value in row], [slot]))
    taken: set[str] = {*parts_of(made.main), "self", "rngs"}
    widths = [_width_name(made, values, slots) for values, slots in vectors]
    widths = ["" if name in taken else name for name in widths]
    taken |= {*widths, *(["in_channels", "out_channels"] if "channels" in widths else [])}
    for width, (values, slots) in zip(widths, vectors, strict=True):
        name = width or _argument_name(slots, taken)
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


def find_conditions(made: EmittedClass) -> None:
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
    if name.startswith(("in_", "channels", "num_features")):
        return 0
    if name.startswith("out_"):
        return 1
    return 2 if "channels" in name or "features" in name else 3


def _width_name(made: EmittedClass, values: Sequence[Any], slots: Sequence[Slot]) -> str:
    """``"in_channels"`` for those of the maps that instances take, ``"out_channels"`` for those of
    the maps that they return, ``"channels"`` for both; empty for other numbers.
    """
    bodies = [body for body in made.bodies if body.input_shapes and body.outputs]
    roles = {slot[-1] for slot in slots}
    if len(bodies) < len(values) or not roles & {"in_channels", "out_channels"}:
        return ""
    taken = [body.input_shapes[0][-1] for body in bodies] == list(values)
    returned = [body.outputs[0][0][body.outputs[0][1][-1]] for body in bodies] == list(values)
    side = "" if taken and returned else "in_" if taken else "out_"
    return f"{side}channels" if taken or returned else ""


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
