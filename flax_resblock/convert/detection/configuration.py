"""Reads the configuration of a network off names and shapes, under one naming scheme."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, TypeVar

from flax_resblock.config import EXPANSION, BlockConfig, ResNetConfig, Shortcut, SlotKind
from flax_resblock.convert.detection.assumption_rules import GROUPS
from flax_resblock.convert.detection.reader import Blocks, TensorInfos, TensorReader
from flax_resblock.convert.naming import Naming

_THIRD = ("conv3", "norm3")
_Config = TypeVar("_Config", BlockConfig, ResNetConfig)


def _shortcut(pooled: bool, projects: bool) -> Shortcut:
    if pooled:
        return "pooled"
    return "projection" if projects else "zero_pad"


def _depths(naming: Naming, found: TensorInfos) -> list[int]:
    """Blocks of each stage where the scheme numbers them through: a stage begins with the first
    block, and with every block that has a projection."""
    if not naming.numbers_through:
        return []
    skips = ("shortcut.conv", "shortcut.projection.conv")
    skips = [naming.modules[place] for place in skips if place in naming.modules]
    (blocks,) = naming.laid_out([len(found)]).blocks
    modules = {key.rpartition(".")[0] for key in found}
    depths: list[int] = []
    for prefix in blocks:
        inside = [name for name in modules if name.startswith(prefix + naming.joint)]
        if not inside:
            break
        if not depths or any(f"{prefix}{naming.joint}{skip}" in modules for skip in skips):
            depths.append(0)
        depths[-1] += 1
    return depths


def infer_network(naming: Naming, found: TensorInfos) -> ResNetConfig | None:
    """The network that the names and shapes describe under ``naming``, None where they describe
    none. Single missing tensors are tolerated, so that the error can name them."""
    reader = TensorReader(naming.laid_out(_depths(naming, found)), found)
    stages: list[range] = []
    for number in count(1):
        depth = next(block for block in count() if not reader.has_block(f"stage{number}", block))
        if depth == 0 and not reader.has(f"transition{number}", [None], "conv"):
            break
        stages.append(range(depth))
    if not any(stages):
        return None
    pools_between = reader.has("transition1", [None], "conv")
    thirds = (reader.has(f"stage{n}", b, role) for n, b in enumerate(stages, 1) for role in _THIRD)
    kind = "bottleneck" if any(thirds) else "basic"
    last = 3 if kind == "bottleneck" else 2
    places = [(f"stage{n}", i) for n, stage in enumerate(stages, 1) for i in stage]
    deep = any(reader.has("stem", [None], f"conv{i}") for i in (1, 2, 3))
    stem = reader.shape("stem", None, "conv1" if deep else "conv", SlotKind.CONV)
    stem_place = ("conv3", "norm3") if deep else ("conv", "norm")
    bare = reader.width("stem", [None], stem_place[0], None)
    norm_first = reader.norm_first(places, last, bare)
    if norm_first is None:
        norm_first = reader.has("norm", [None], "") and not reader.has("stem", [None], "norm")
    widths = [
        reader.width(f"stage{n}", blocks, f"conv{last}", None if norm_first else f"norm{last}")
        or reader.width(f"transition{n}", [None], "conv", "norm")
        or 0
        for n, blocks in enumerate(stages, 1)
    ]
    stem_width = bare if norm_first else reader.width("stem", [None], *stem_place)
    inner = tuple(reader.width("stem", [None], f"conv{i}", f"norm{i}") or 0 for i in (1, 2))
    place = "head", None, "", SlotKind.LINEAR
    head = reader.shape(*place) or reader.shape(*place, "bias")
    if 0 in widths or not stem_width:
        return None
    inputs = widths if pools_between else [stem_width, *widths]
    blocks = [
        (f"stage{n}", i, widths[n - 1] if i else inputs[n - 1], widths[n - 1] // EXPANSION[kind])
        for n, stage in enumerate(stages, 1)
        for i in stage
    ]
    groups, base_width = reader.grouping(kind, blocks)
    firsts = [f"stage{n}" for n, _ in enumerate(stages, 1)]
    pooled = any(reader.pools(stage, 0) for stage in firsts)
    home = "shortcut.projection" if pooled else "shortcut"
    projects = [reader.width(stage, [0], f"{home}.conv", f"{home}.norm") for stage in firsts]
    first_stride = 2 if stem_width == widths[0] and projects[0] else 1
    changes = len(stages) > 1 or stem_width != widths[0]
    large = stem is None or stem[0] != 3
    told: dict[str, Any] = {
        "block": kind,
        "depths": tuple(len(blocks) for blocks in stages),
        "widths": tuple(width // EXPANSION[kind] for width in widths),
        "stem": "deep" if deep else "imagenet" if large else "cifar",
        "stem_width": stem_width,
        "stem_hidden": inner if deep else (),
        "stem_bias": reader.biased(
            ("stem", None, f"conv{i}") for i in ((1, 2, 3) if deep else ("",))
        ),
        "first_stride": first_stride,
        "shortcut": _shortcut(pooled, any(projects) or not changes),
        "groups": groups,
        "base_width": base_width,
        "in_channels": stem[2] if stem else 3,
        "num_classes": head[-1] if head else None,
        **_layers(reader, places, norm_first),
        **reader.attention(places, dict(zip(firsts, widths, strict=True))),
    }
    if norm_first:
        told["final_norm"] = reader.has("norm", [None], "")
        told["stem_norm"] = reader.has("stem", [None], stem_place[1])
        if told["norm"] == "group" and told["stem"] == "imagenet":  # as Big Transfer has it
            told |= {"standardized": True, "stem_pool": "3x3_zeros"}
    if pools_between:  # as ResNet-9 has it
        told |= {"transition": "pooled", "shortcut": "projection", "first_stride": 2}
        told |= {"branch_activation": True, "last_activation": False, "head_pool": "max"}
    return _made(ResNetConfig, told)


def _layers(reader: TensorReader, places: Blocks, norm_first: bool) -> dict[str, Any]:
    """Options of every block that tensors tell: order, norms, biases and shortcuts."""
    kernels = (reader.shape(*place, "shortcut.conv", SlotKind.CONV) for place in places)
    return {
        "order": "pre_activation" if norm_first else "post_activation",
        "norm": "batch" if reader.has_statistics(places) else "group",
        "shortcut_size": next((kernel[0] for kernel in kernels if kernel), 1),
        **reader.biases(places),
    }


def _made(kind: type[_Config], found: Mapping[str, Any]) -> _Config | None:
    """The configuration with the first possible number of groups of its norms; None for none."""
    for norm_groups in GROUPS:
        try:
            return kind(**found, norm_groups=norm_groups)
        except ValueError:
            continue
    return None


def infer_block(naming: Naming, found: TensorInfos, stride: int | None) -> BlockConfig | None:
    """The bare block that names and shapes describe; they do not show its stride."""
    reader, here = TensorReader(naming, found), [("", None)]
    kind = "bottleneck" if any(reader.has("", [None], role) for role in _THIRD) else "basic"
    last = 3 if kind == "bottleneck" else 2
    norm_first = bool(reader.norm_first(here, last, None))
    out = reader.width("", [None], f"conv{last}", None if norm_first else f"norm{last}")
    pooled = reader.pools("", None)
    place = "shortcut.projection" if pooled else "shortcut"
    first, second, shortcut = (
        reader.shape("", None, role, SlotKind.CONV) for role in ("conv1", "conv2", f"{place}.conv")
    )
    if out is None or (first is None and second is None):
        return None
    groups, base_width = reader.grouping(
        kind, [("", None, shortcut[2] if shortcut else None, out // EXPANSION[kind])]
    )
    if kind == "basic" and first and shortcut and first[2] and shortcut[2] % first[2] == 0:
        # a projection sees every input channel: that tells more than a second kernel, which may
        # be the wrong one
        groups = shortcut[2] // first[2]
    projects = reader.width("", [None], f"{place}.conv", f"{place}.norm") is not None
    fan = first[2] * (groups if kind == "basic" else 1) if first else out
    in_channels = shortcut[2] if shortcut else fan
    told: dict[str, Any] = {
        "in_channels": in_channels,
        "out_channels": out,
        "kind": kind,
        "stride": stride or (2 if projects and in_channels == out else 1),
        "groups": groups,
        "base_width": base_width,
        "shortcut": _shortcut(pooled, projects or ((stride or 1) == 1 and in_channels == out)),
        **_layers(reader, here, norm_first),
        **reader.attention(here, {"": out}),
    }
    return _made(BlockConfig, told)
