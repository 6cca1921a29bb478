"""Learns a naming scheme from the tensors, where no known one fits: names are labels.

The tree of names gives the blocks, shapes give the roles, and the order in which the layers are
defined decides between layers of equal shape. The result is an ordinary
:class:`~flax_resblock.convert.naming.Naming`, which the detection then uses like any other: it must
name every tensor, with the right shape, or it is not used.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flax_resblock.convert.detection.assumptions import LEARNED
from flax_resblock.convert.detection.configuration import TensorInfos
from flax_resblock.convert.naming import Naming

_NORM = {"weight", "bias", "running_mean", "running_var"}
_MOST_TENSORS, _DEEPEST, _LONGEST = 20_000, 30, 9
"""Tensors, parts of a name and digits of a number beyond which nothing is learned: no network has
so many, and a file may hold anything."""


@dataclass(frozen=True)
class _Layer:
    """A module with tensors.

    Attributes:
      name: Of the module.
      kind: ``"conv"``, ``"norm"`` or ``"linear"``.
      shape: Of its weight.
    """

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
class _Block:
    """A residual block: its prefix, and the modules of its places by their whole names."""

    prefix: str
    places: Mapping[str, _Layer]

    @property
    def inside(self) -> int:
        """Input channels; of a grouped convolution, those of one group."""
        return self.places["conv1"].shape[1]

    @property
    def out(self) -> int:
        """Output channels."""
        return self.places["conv3" if "conv3" in self.places else "conv2"].out

    def relative(self, prefix: str) -> dict[str, str]:
        """Names of its places below a prefix."""
        return {place: one.name[len(prefix) + 1 :] for place, one in self.places.items()}


@dataclass
class _Node:
    """A module that holds others."""

    name: str
    children: dict[str, _Node] = field(default_factory=dict)
    layers: list[_Layer] = field(default_factory=list)
    """Of the whole subtree, in order."""


def learn_naming(found: TensorInfos) -> Naming | None:
    """The naming scheme of a residual network whose names are its author's own; None where the
    tensors are not those of one, or where order alone would have to decide and is not known.

    Args:
      found: Shape and dtype of every tensor.
    """
    layers = _layers(found) if len(found) <= _MOST_TENSORS else None
    if layers is None:
        return None
    is_sorted = list(found) == sorted(found)  # as safetensors files are
    if is_sorted:
        layers.sort(key=lambda one: _numbered(one.name))
    blocks, rest = _covered(_tree(layers))
    owned = {one.name for block in blocks for one in block.places.values()}
    stem = [one for one in rest if one.kind == "conv"]
    norms = [one for one in layers if one.kind == "norm" and one.name not in owned]
    heads = [one for one in rest if one.kind == "linear"]
    if not blocks or len(stem) != 1 or len(norms) != 1 or len(heads) > 1:
        return None
    order = {one.name: place for place, one in enumerate(layers)}

    def first_layer(block: _Block) -> int:
        return min(order[one.name] for one in block.places.values())

    blocks = sorted(blocks, key=first_layer)
    if not is_sorted and order[stem[0].name] > first_layer(blocks[0]):
        return None
    if norms[0].shape != (stem[0].out,) or not _chained(stem[0].out, blocks):
        return None
    if heads and heads[0].shape[1] != blocks[-1].out:
        return None
    aligned = _aligned(blocks)
    if aligned is None:
        return None
    prefixes, places = aligned
    if is_sorted and not _tell_their_order(blocks, prefixes):
        return None
    modules = {"stem.conv": stem[0].name, "stem.norm": norms[0].name, **places}
    if heads:
        modules["head"] = heads[0].name
    stages = tuple(_stages(blocks, prefixes))
    return Naming(LEARNED, "", modules, "learned from the tensors", blocks=stages)


def _layers(found: TensorInfos) -> list[_Layer] | None:
    """Every module with tensors, in order; None where one is no layer of a residual network."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in found.items():
        module, _, tensor = key.rpartition(".")
        modules.setdefault(module, {})[tensor] = info.shape
    layers = []
    for name, tensors in modules.items():
        weight = tensors.get("weight", ())
        own = set(tensors) - {"num_batches_tracked"}
        if len(weight) == 4 and own == {"weight"}:
            layers.append(_Layer(name, "conv", weight))
        elif len(weight) == 1 and own == _NORM:
            layers.append(_Layer(name, "norm", weight))
        elif len(weight) == 2 and own == {"weight", "bias"}:
            layers.append(_Layer(name, "linear", weight))
        else:
            return None
        if name.count(".") > _DEEPEST:
            return None
    return layers


def _numbered(name: str) -> list[tuple[int, str]]:
    """A key that sorts names by their numbers: ``"block.2"`` before ``"block.10"``."""
    return [
        (int(part), "") if part.isdecimal() and len(part) <= _LONGEST else (-1, part)
        for part in re.split(r"(\d+)", name)
    ]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _differ_in_numbers(names: Iterable[str]) -> bool:
    return len(set(map(_without_numbers, names))) <= 1


def _tell_their_order(blocks: list[_Block], prefixes: list[str]) -> bool:
    """Whether the numbers in the names of blocks and convolutions give their order; in a file that
    is sorted by name, nothing else does."""
    paths = (
        [one.name for place, one in block.places.items() if place.startswith("conv")]
        for block in blocks
    )
    return _differ_in_numbers(prefixes) and all(map(_differ_in_numbers, paths))


def _tree(layers: list[_Layer]) -> _Node:
    root = _Node("")
    for one in layers:
        node, parts = root, one.name.split(".")
        node.layers.append(one)
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            node = node.children.setdefault(name, _Node(name))
            node.layers.append(one)
    return root


def _covered(node: _Node) -> tuple[list[_Block], list[_Layer]]:
    """The smallest blocks below a node, and its convolutions and products outside them."""
    blocks: list[_Block] = []
    rest = [one for one in node.layers if one.name == node.name and one.kind != "norm"]
    for child in node.children.values():
        inner, left = _covered(child)
        blocks += inner
        rest += left
    if node.children and any(one.kind == "conv" for one in rest):
        block = _block(node)
        if block is not None:
            return [block], []
    return blocks, rest


def _block(node: _Node) -> _Block | None:
    """The node as one block; None where its layers are not those of one."""
    convs = [one for one in node.layers if one.kind == "conv"]
    norms = [one for one in node.layers if one.kind == "norm"]
    if len(convs) not in (2, 3, 4) or not len(convs) == len(norms) == len(node.layers) / 2:
        return None
    if node.layers[0] is norms[0]:
        return None  # a norm before its convolution: pre-activation
    readings = [
        reading
        for main in (2, 3)
        for shortcut in (None, *convs)
        if (reading := _reading(convs, main, shortcut)) is not None
    ]
    if len(readings) > 1:
        # a projection may have the shape of a convolution of the main path, and another name
        readings = [reading for reading in readings if _is_regular(reading)]
    if len(readings) != 1:
        return None
    (places,) = readings
    paired = _with_norms(places, norms)
    return None if paired is None else _Block(node.name, paired)


def _is_regular(places: Mapping[str, _Layer]) -> bool:
    """Whether the main path's names differ in their numbers alone, and the projection's in more."""
    names = {place: _without_numbers(one.name) for place, one in places.items()}
    shortcut = names.pop("shortcut.conv", None)
    return len(set(names.values())) == 1 and shortcut not in names.values()


def _reading(convs: list[_Layer], main: int, shortcut: _Layer | None) -> dict[str, _Layer] | None:
    """The convolutions as a main path and a projection, if their shapes and sizes are right."""
    path = [one for one in convs if one is not shortcut]
    if len(path) != main or (shortcut is not None and shortcut.size != 1):
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


def _with_norms(places: Mapping[str, _Layer], norms: list[_Layer]) -> dict[str, _Layer] | None:
    """The places with the norm of each convolution: its only sibling, else the one in the same
    place of the order."""
    left, found = list(norms), dict(places)
    waiting = []
    for place, conv in places.items():
        parent = conv.name.rpartition(".")[0]
        near = [one for one in norms if one.name.rpartition(".")[0] in (parent, conv.name)]
        alone = sum(c.name.rpartition(".")[0] == parent for c in places.values()) == 1
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
    ok = all(found[p.replace("conv", "norm")].shape == (c.out,) for p, c in places.items())
    return found if ok else None


def _chained(channels: int, blocks: list[_Block]) -> bool:
    """Whether each block takes what the one before it gives."""
    for block in blocks:
        seen = block.places.get("shortcut.conv", block.places["conv1"]).shape[1]
        if channels % seen or (seen != channels and "shortcut.conv" in block.places):
            return False
        channels = block.out
    return True


def _aligned(blocks: list[_Block]) -> tuple[list[str], dict[str, str]] | None:
    """Prefixes under which the places have the same names in every block, and these names."""
    largest = max(blocks, key=lambda block: len(block.places))
    names = largest.relative(largest.prefix)
    prefixes = []
    for block in blocks:
        prefix = block.prefix
        while True:
            own = block.relative(prefix) if prefix else {}
            if own and all(names.get(place) == name for place, name in own.items()):
                break
            if not prefix:
                return None
            prefix = prefix.rpartition(".")[0]
        prefixes.append(prefix)
    return (prefixes, names) if len(set(prefixes)) == len(prefixes) else None


def _stages(blocks: list[_Block], prefixes: list[str]) -> Iterator[tuple[str, ...]]:
    """Prefixes by stage. A stage begins with a block that has a projection or gives another number
    of channels; where blocks have several parents, with another parent as well."""
    parents = [prefix.rpartition(".")[0] for prefix in prefixes]
    flat = len(set(parents)) == 1
    stage: list[str] = []
    for i, (block, prefix) in enumerate(zip(blocks, prefixes, strict=True)):
        changes = i and (block.out != blocks[i - 1].out or "shortcut.conv" in block.places)
        if changes and (flat or parents[i] != parents[i - 1]):
            yield tuple(stage)
            stage = []
        stage.append(prefix)
    yield tuple(stage)
