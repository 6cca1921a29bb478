"""Finds which modules are instances of one emitted class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any

from flax_resblock.port.arguments import (
    EmittedClass,
    find_arguments,
    find_conditions,
    slots_of,
)  # fmt: skip
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


def classes_of(reader: Reader, root: Body) -> list[EmittedClass]:
    """The classes of a network, each behind those that it uses; the network's own is the last."""
    found: list[EmittedClass] = []
    for bodies in _in_layers(root):
        groups: dict[Any, list[Body]] = {}
        for body in bodies:
            groups.setdefault(_skeleton(body), []).append(body)
        joined = _with_optional_children(reader, list(groups.values()))
        names = list(dict.fromkeys(group[0].cls.__name__ for group, _ in joined))
        joined.sort(key=lambda one: (names.index(one[0][0].cls.__name__), -len(one[0])))
        for group, optional in joined:
            made = EmittedClass(group[0].cls.__name__, group, optional=optional)
            for body in group:
                body.group = made
            made.slots = [dict(slots_of(body)) for body in group]
            find_arguments(made)
            find_conditions(made)
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
    uses: dict[Any, dict[Any, None]] = {}  # ordered, so that the file is the same every time
    for body, children in inside.values():
        uses.setdefault(body.cls, {}).update(dict.fromkeys(child.cls for child in children))
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
                for name in dict.fromkeys([*optional, *lacking]):
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


def _make_unique(found: Sequence[EmittedClass]) -> None:
    """Numbers the classes of one name, in the order in which they stand in the file."""
    taken = {one.name for one in found}
    counts: Counter[str] = Counter()
    for one in found:
        name = one.name
        counts[name] += 1
        while counts[name] > 1 and f"{name}{counts[name]}" in taken:
            counts[name] += 1
        one.name = name if counts[name] == 1 else f"{name}{counts[name]}"
        taken.add(one.name)
