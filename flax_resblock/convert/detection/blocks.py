"""Finds residual blocks in the tree of names of a state dict, whatever these names are."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, permutations

from flax_resblock.errors import some

_MOST_NODES = 2000
"""Modules that are tried in every order of their layers, for a message."""
_LONGEST = 9
"""Digits of a number that sorts names; a file may hold anything."""
SAY = "Say it with `naming=flax_resblock.Naming(...)`."


@dataclass(frozen=True)
class FoundLayer:
    """A module with tensors: name, kind (conv, norm or linear) and the shape of its weight."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def out(self) -> int:
        """Output channels."""
        return self.shape[0]

    @property
    def size(self) -> int:
        """Of a kernel, in pixels."""
        return self.shape[-1]


@dataclass(frozen=True)
class Block:
    """A residual block: its prefix, and the modules of its places by their whole names."""

    prefix: str
    places: Mapping[str, FoundLayer]
    defines_norm_first: bool = False
    """Whether a norm is defined before the convolutions."""
    norm_first: bool | None = None
    """Whether the norms have the channels that the convolutions take, as in pre-activation order,
    and not those that they give; None where both are the same."""

    @property
    def inside(self) -> int:
        """Input channels; of a grouped convolution, those of one group."""
        return self.places["conv1"].shape[1]

    @property
    def out(self) -> int:
        """Output channels."""
        return self.places["conv3" if "conv3" in self.places else "conv2"].out

    @property
    def layers(self) -> list[FoundLayer]:
        """Its modules."""
        return list(self.places.values())

    def relative(self, prefix: str) -> dict[str, str]:
        """Names of its places below a prefix."""
        return {place: one.name[len(prefix) + 1 :] for place, one in self.places.items()}


@dataclass
class Node:
    """A module that holds others."""

    name: str
    children: dict[str, Node] = field(default_factory=dict)
    layers: list[FoundLayer] = field(default_factory=list)
    """Of the whole subtree, in order."""


def tree_of(layers: list[FoundLayer], joints: str = ".") -> Node:
    """The tree of the names, whose parts any of ``joints`` separates."""
    root = Node("")
    for one in layers:
        node = root
        node.layers.append(one)
        ends = [place for place, letter in enumerate(one.name) if letter in joints]
        for name in (one.name[:end] for end in (*ends, None)):
            node = node.children.setdefault(name, Node(name))
            node.layers.append(one)
    return root


def without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def numbered(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by their numbers: ``"block.2"`` before ``"block.10"``."""
    return [
        (int(part), "") if part.isdecimal() and len(part) <= _LONGEST else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]


def _by_number(layers: list[FoundLayer]) -> list[FoundLayer]:
    """The layers in the order in which they were defined, and those whose names differ in their
    numbers alone in the order of the numbers: ``conv2`` runs after ``conv1``."""
    families: dict[str, list[FoundLayer]] = {}
    for one in layers:
        families.setdefault(without_numbers(one.name), []).append(one)
    queues = {
        name: iter(sorted(family, key=lambda one: numbered(one.name)))
        for name, family in families.items()
    }
    return [next(queues[without_numbers(one.name)]) for one in layers]


def covered(node: Node, rivals: list[str]) -> tuple[list[Block], list[FoundLayer]]:
    """The smallest blocks below a node, and its convolutions and products outside them.

    ``rivals`` receives a sentence on every block that has several readings."""
    blocks: list[Block] = []
    rest = [one for one in node.layers if one.name == node.name and one.kind != "norm"]
    for child in node.children.values():
        inner, left = covered(child, rivals)
        blocks += inner
        rest += left
    if node.children and any(one.kind == "conv" for one in rest):
        block = _block(node, rivals)
        if block is not None:
            return [block], []
    return blocks, rest


def _block(node: Node, rivals: list[str]) -> Block | None:
    """The node as one block; None where its layers are not those of one, or are in several ways."""
    if not 4 <= len(node.layers) <= 8:
        return None
    layers = _by_number(node.layers)
    convs = [one for one in layers if one.kind == "conv"]
    norms = [one for one in layers if one.kind == "norm"]
    bare = len(convs) - len(norms)  # projections of pre-activation order, which have no norm
    if bare not in (0, 1) or len(convs) + len(norms) < len(layers):
        return None
    readings = [
        reading
        for main in (2, 3)
        for shortcut in (convs if bare else (None, *convs))
        if (reading := _reading(convs, main, shortcut)) is not None
    ]
    if len(readings) > 1:
        # a projection may have the shape of a convolution of the main path, and another name
        regular = [reading for reading in readings if _is_regular(reading)]
        if len(regular) != 1:
            rivals.append(_rivals(node.name, readings))
        readings = regular
    if len(readings) != 1:
        return None
    (places,) = readings
    paired = _with_norms(places, convs, norms)
    if paired is None:
        return None
    found, norm_first = paired
    return Block(node.name, found, node.layers[0].kind == "norm", norm_first)


def _rivals(block: str, readings: Iterable[Mapping[str, FoundLayer]]) -> str:
    """A sentence on several readings of one block."""
    shown = [
        ", ".join(f"{place} = {one.name}" for place, one in reading.items()) for reading in readings
    ]
    return f"{block} can be read as {'; or as '.join(shown)}. {SAY}"


def why_no_block(layers: list[FoundLayer]) -> str:
    """A sentence on modules that would be blocks if their layers ran in another order; or empty."""
    found = []
    for node in islice(_nodes(tree_of(layers)), _MOST_NODES):
        convs = [one for one in node.layers if one.kind == "conv"]
        norms = [one for one in node.layers if one.kind == "norm"]
        if len(convs) not in (2, 3, 4) or len(norms) != len(convs):
            continue
        orders = [list(order) for order in permutations(convs)]
        widths = sorted(one.out for one in convs), sorted(one.out for one in norms)
        if widths[0] == widths[1] and any(
            _reading(order, main, shortcut) is not None
            for order in orders
            for main in (2, 3)
            for shortcut in (None, *order)
        ):
            found.append(node.name)
    if not found:
        return ""
    return (
        f"{some(found)} would be residual blocks if their layers did not run in the order in which "
        f"they are defined. {SAY}"
    )


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children.values():
        yield from _nodes(child)


def _is_regular(places: Mapping[str, FoundLayer]) -> bool:
    """Whether the main path's names differ in their numbers alone, and the projection's in more."""
    names = {place: without_numbers(one.name) for place, one in places.items()}
    shortcut = names.pop("shortcut.conv", None)
    return len(set(names.values())) == 1 and shortcut not in names.values()


def _reading(
    convs: list[FoundLayer], main: int, shortcut: FoundLayer | None
) -> dict[str, FoundLayer] | None:
    """The convolutions as a main path and a projection, if their shapes and sizes are right."""
    path = [one for one in convs if one is not shortcut]
    if len(path) != main or (shortcut is not None and shortcut.size not in (1, 3)):
        return None
    sizes = [one.size for one in path]
    if sizes != ([3, 3] if main == 2 else [1, 3, 1]):
        return None
    if any(one.shape[2] != one.shape[3] for one in convs):
        return None
    first, last = path[0], path[-1]
    if main == 3:
        if last.out != 4 * path[1].out and last.out <= path[1].out:
            return None  # the projection taken for the last convolution
        if path[1].out != last.shape[1] or path[1].out % path[1].shape[1]:
            return None
    elif last.out != first.out or first.out % last.shape[1]:
        return None
    if shortcut is not None and (shortcut.out != last.out or shortcut.shape[1] % first.shape[1]):
        return None
    places = {f"conv{i}": one for i, one in enumerate(path, 1)}
    return places if shortcut is None else {**places, "shortcut.conv": shortcut}


def _with_norms(
    places: Mapping[str, FoundLayer], convs: list[FoundLayer], norms: list[FoundLayer]
) -> tuple[dict[str, FoundLayer], bool | None] | None:
    """The places with the norm of each convolution: its only sibling, else the one in the same
    place of the order in which they are defined; and :attr:`Block.norm_first`."""
    left, found = list(norms), dict(places)
    waiting, main = [], places
    if bare := len(norms) < len(convs):
        main = {place: one for place, one in places.items() if place != "shortcut.conv"}
    for place, conv in sorted(main.items(), key=lambda item: convs.index(item[1])):
        parent = conv.name.rpartition(".")[0]
        near = [one for one in norms if one.name.rpartition(".")[0] in (parent, conv.name)]
        alone = sum(c.name.rpartition(".")[0] == parent for c in main.values()) == 1
        inside = [one for one in near if one.name.startswith(f"{conv.name}.")]
        chosen = inside or (near if alone else [])
        if len(chosen) == 1 and chosen[0] in left:
            found[place.replace("conv", "norm")] = chosen[0]
            left.remove(chosen[0])
        else:
            waiting.append(place)
    if len(waiting) != len(left):
        return None
    found |= {p.replace("conv", "norm"): one for p, one in zip(waiting, left, strict=True)}
    pairs = [(found[p.replace("conv", "norm")].shape, p, c) for p, c in main.items()]
    after = all(shape == (conv.out,) for shape, _, conv in pairs)
    # a convolution in groups takes what the one before it gives
    takes = {"conv1": places.get("shortcut.conv", places["conv1"]).shape[1]}
    takes |= {f"conv{i + 1}": places[f"conv{i}"].out for i in (1, 2) if f"conv{i}" in places}
    before = "shortcut.norm" not in found and all(shape == (takes[p],) for shape, p, _ in pairs)
    if not before and (bare or not after):
        return None
    return found, None if after and before else before
