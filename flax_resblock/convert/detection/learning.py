"""Learns a naming scheme from the tensors, where no known one fits: names are labels.

The tree of names gives the blocks, shapes give the roles, and the order in which the layers are
defined decides between layers of equal shape. The result is an ordinary
:class:`~flax_resblock.convert.naming.Naming`, which the detection then uses like any other: it must
name every tensor, with the right shape, or it is not used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from flax_resblock.convert.detection.assumptions import LEARNED
from flax_resblock.convert.detection.blocks import (
    SAY,
    Block,
    FoundLayer,
    covered,
    numbered,
    tree_of,
    why_no_block,
    without_numbers,
)
from flax_resblock.convert.detection.configuration import TensorInfos
from flax_resblock.convert.naming import Naming
from flax_resblock.errors import some

_NORM = {"weight", "bias", "running_mean", "running_var"}
_MOST_TENSORS, _DEEPEST = 20_000, 30
"""Tensors and parts of a name beyond which nothing is learned: no network has so many, and a file
may hold anything."""


@dataclass(frozen=True)
class NotLearned:
    """Why no naming scheme was learned; empty where it is no residual network at all."""

    why: str = ""


def learn_naming(found: TensorInfos) -> Naming | NotLearned:
    """The naming scheme of a residual network whose names are its author's own; why there is none
    where the tensors are not those of one, or where order alone would have to decide and is not
    known."""
    layers = _layers(found) if len(found) <= _MOST_TENSORS else None
    if layers is None:
        return NotLearned()
    is_sorted = _is_sorted(found)
    if is_sorted:
        layers.sort(key=lambda one: numbered(one.name))
    try:
        return _learned(layers, is_sorted)
    except _UnclearError as unclear:
        return NotLearned(str(unclear))


class _UnclearError(Exception):
    """The layers have no reading, or several; the message is a sentence on it."""


def _learned(layers: list[FoundLayer], is_sorted: bool) -> Naming:
    rivals: list[str] = []
    blocks, rest = covered(tree_of(layers), rivals)
    if not blocks and not rivals:
        # Keras's names, conv2_block1_1_conv: a flat list
        blocks, rest = covered(tree_of(layers, "._"), rivals)
    if not blocks:
        raise _UnclearError(rivals[0] if rivals else why_no_block(layers))
    if not blocks[0].prefix:
        raise _UnclearError(f"It looks like a single residual block with names of its own. {SAY}")
    owned = {one.name for block in blocks for one in block.places.values()}
    stem = [one for one in rest if one.kind == "conv"]
    norms = [one for one in layers if one.kind == "norm" and one.name not in owned]
    heads = [one for one in rest if one.kind == "linear"]
    seen = f"Residual blocks are recognised ({some([one.prefix for one in blocks])})"
    order = {one.name: place for place, one in enumerate(layers)}

    def first_layer(block: Block) -> int:
        return min(order[one.name] for one in block.places.values())

    blocks = sorted(blocks, key=first_layer)
    norm_first, unclear = _order_of(blocks, seen)
    of_whom = "behind the blocks" if norm_first else "of the stem"
    for what, number, others in (
        ("convolution, that of the stem", 1, stem),
        (f"norm, that {of_whom}", len(norms[:2]) if norm_first else 1, norms),
        ("fully connected layer, the classification head", len(heads[:1]), heads),
    ):
        if len(others) != number:
            unread = [one for one in layers if one.name not in owned]
            raise _UnclearError(
                "".join(rivals[:1])
                or why_no_block(unread)
                or f"{seen}, and outside them {some([one.name for one in others]) or 'nothing'}, "
                f"where a network of this library has one {what}."
            )
    if unclear:
        raise _UnclearError(unclear)
    if not is_sorted and order[stem[0].name] > first_layer(blocks[0]):
        raise _UnclearError(
            f"{seen}, and the stem {stem[0].name} is defined after them, so that the order in "
            f"which the layers are defined is not the order in which they run. {SAY}"
        )
    ends = {"stem.norm": stem[0], **({"norm": blocks[-1]} if norm_first else {})}
    early = {one.name for one in norms if order[one.name] < first_layer(blocks[0])}
    outside = _outer_norms(norms, ends, early, seen)
    _check_chain(stem[0], blocks, seen)
    if heads and heads[0].shape[1] != blocks[-1].out:
        raise _UnclearError(
            f"{seen}; {heads[0].name} takes {heads[0].shape[1]} features, and the last block, "
            f"{blocks[-1].prefix}, gives {blocks[-1].out} channels."
        )
    prefixes, places = _aligned(blocks)
    places = _pooled(places, prefixes, order)
    paths = (_main_path(block, kind) for block in blocks for kind in ("conv", "norm"))
    if is_sorted and not all(map(_differ_in_numbers, (prefixes, *paths))):
        raise _UnclearError(
            f"The file is sorted by name, and the names do not tell in which order these run: "
            f"{some([one.prefix for one in blocks], 6)}, and the convolutions inside, such as "
            f"{some(_main_path(blocks[0]))}. {SAY}"
        )
    modules = {"stem.conv": stem[0].name, **places}
    modules |= {place: one.name for place, one in outside.items()}
    if heads:
        modules["head"] = heads[0].name
    stages, origin = tuple(_stages(blocks, prefixes)), "learned from the tensors"
    after = {one.name[len(p)] for b, p in zip(blocks, prefixes, strict=True) for one in b.layers}
    if len(after) > 1:
        raise _UnclearError(f"{seen}, some of whose names go on with '.' and some with '_'. {SAY}")
    return Naming(LEARNED, "", modules, origin, blocks=stages, joint=after.pop())


def _pooled(
    places: dict[str, str], prefixes: list[str], known: Mapping[str, int]
) -> dict[str, str]:
    """The places with the projection of a pooled shortcut, where its convolution is the second
    layer of a sequence whose first has no tensors."""
    conv = places.get("shortcut.conv", "")
    home, _, number = conv.rpartition(".")
    if number != "1" or any(f"{prefix}.{home}.0" in known for prefix in prefixes):
        return places
    pooled = {
        place.replace("shortcut.", "shortcut.projection."): name for place, name in places.items()
    }
    return {"shortcut.pool": f"{home}.0", **pooled}


def _main_path(block: Block, kind: str = "conv") -> list[str]:
    return [one.name for place, one in block.places.items() if place.startswith(kind)]


def _is_sorted(found: TensorInfos) -> bool:
    """Whether the tensors of each dtype are sorted by name, as safetensors files have them."""
    names: dict[object, list[str]] = {}
    for key, info in found.items():
        names.setdefault(info.dtype, []).append(key)
    return all(own == sorted(own) for own in names.values())


def _layers(found: TensorInfos) -> list[FoundLayer] | None:
    """Every module with tensors, in order; None where one is no layer of a residual network."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, info in found.items():
        module, _, tensor = key.rpartition(".")
        modules.setdefault(module, {})[tensor] = info.shape
    layers = []
    for name, tensors in modules.items():
        weight = tensors.get("weight", ())
        own = set(tensors) - {"num_batches_tracked"}
        if len(weight) == 4 and own in ({"weight"}, {"weight", "bias"}):
            layers.append(FoundLayer(name, "conv", weight))
        elif len(weight) == 1 and own in (_NORM, {"weight", "bias"}):
            layers.append(FoundLayer(name, "norm", weight))
        elif len(weight) == 2 and own == {"weight", "bias"}:
            layers.append(FoundLayer(name, "linear", weight))
        else:
            return None
        if name.count(".") + name.count("_") > _DEEPEST:
            return None
    return layers


def _differ_in_numbers(names: Iterable[str]) -> bool:
    return len(set(map(without_numbers, names))) <= 1


def _order_of(blocks: list[Block], seen: str) -> tuple[bool, str]:
    """Whether norms come before their convolutions, as the channels of the norms tell; and where
    they do not, a sentence on blocks that look so."""
    told = {block.norm_first for block in blocks} - {None}
    if len(told) == 1:
        return told.pop() is True, ""
    first = [block.prefix for block in blocks if block.defines_norm_first]
    if not told and not first:
        return False, ""
    return False, (
        f"{seen}; in {some(first or [blocks[0].prefix])} a norm is defined before the "
        f"convolutions, as in pre-activation order, and the channels do not tell whether it also "
        f"runs before them. {SAY}"
    )


def _outer_norms(
    norms: list[FoundLayer], ends: Mapping[str, FoundLayer | Block], early: set[str], seen: str
) -> dict[str, FoundLayer]:
    """The norms outside the blocks by their places, each behind what gives as many channels.
    ``ends`` are what they may follow, by their place, ``early`` those that are defined before the
    blocks."""
    found: dict[str, FoundLayer] = {}
    for one in norms:
        fitting = [place for place, end in ends.items() if one.shape == (end.out,)]
        if len(fitting) > 1 and (len(norms) > 1 or one.name not in early):
            fitting = ["stem.norm" if one.name in early else "norm"]
        if len(fitting) != 1 or fitting[0] in found:
            names = (
                f"{end.prefix if isinstance(end, Block) else f'the convolution {end.name}'} of "
                f"{end.out}"
                for end in ends.values()
            )
            raise _UnclearError(
                f"{seen}, and outside them the norm {one.name} of {one.out} channels beside "
                f"{' and '.join(names)}."
            )
        found[fitting[0]] = one
    return found


def _check_chain(stem: FoundLayer, blocks: list[Block], seen: str) -> None:
    """Raises _UnclearError unless each block takes what the one before it gives."""
    channels, before = stem.out, stem.name
    for block in blocks:
        takes = block.places.get("shortcut.conv", block.places["conv1"]).shape[1]
        if channels % takes or (takes != channels and "shortcut.conv" in block.places):
            raise _UnclearError(
                f"{seen}; {block.prefix} takes {takes} channels, and {before}, which is defined "
                f"before it, gives {channels}. {SAY}"
            )
        channels, before = block.out, block.prefix


def _aligned(blocks: list[Block]) -> tuple[list[str], dict[str, str]]:
    """Prefixes under which the places have the same names in every block, and these names."""
    largest = max(blocks, key=lambda block: len(block.places))
    names = largest.relative(largest.prefix)
    prefixes = []
    for block in blocks:
        prefix = block.prefix
        while prefix and any(names.get(k) != v for k, v in block.relative(prefix).items()):
            prefix = prefix.rpartition(".")[0]
        if not prefix or prefix in prefixes:
            mine = ", ".join(f"{place} {name}" for place, name in names.items())
            own = ", ".join(f"{k} {v}" for k, v in block.relative(block.prefix).items())
            raise _UnclearError(
                f"The layers of {block.prefix} ({own}) have other names than those of "
                f"{largest.prefix} ({mine}); a naming scheme has one name for each place."
            )
        prefixes.append(prefix)
    return prefixes, names


def _stages(blocks: list[Block], prefixes: list[str]) -> Iterator[tuple[str, ...]]:
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
