"""Reads the configuration of a network off names and shapes, under one naming scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from typing import Any

from flax_resblock.config import EXPANSION, BlockConfig, ResNetConfig, Shortcut, Slot, SlotKind
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.state_map import TensorInfo

TensorInfos = Mapping[str, TensorInfo]
_KERNEL_AXES = {SlotKind.CONV: 4, SlotKind.BIASED_CONV: 4, SlotKind.CHANNEL_CONV: 3}
_KERNEL_AXES[SlotKind.LINEAR] = 2
_NORM_TENSORS = ("scale", "bias", "mean", "var")
_RATIOS = tuple(1 / n for n in (16, 8, 4, 2, 1, 32, 64))
"""Of squeeze-and-excitation, the usual ones first."""


class _Reader:
    """Looks tensors up by place under one naming scheme."""

    def __init__(self, naming: Naming, found: TensorInfos) -> None:
        self.naming = naming
        self.found = found
        self.modules = {key.rpartition(".")[0] for key in found}

    def shape(
        self, stage: str, block: int | None, role: str, kind: SlotKind, tensor: str = "kernel"
    ) -> tuple[int, ...] | None:
        """Flax shape of a tensor; None where it is absent or has another number of axes."""
        module = self.naming.module_name(Slot(stage, block, role, kind))
        if module is None:
            return None
        row = next(row for row in self.naming.tensors[kind] if row.flax_name == tensor)
        info = self.found.get(f"{module}.{row.name}")
        shape = None if info is None else row.codec.flax_shape(info.shape)
        axes = _KERNEL_AXES[kind] if tensor == "kernel" else 1
        return shape if shape is not None and len(shape) == axes else None

    def has(self, stage: str, blocks: Iterable[int | None], role: str) -> bool:
        """Whether any tensor is there of a place in any of ``blocks``."""
        names = (
            self.naming.module_name(Slot(stage, block, role, SlotKind.CONV)) for block in blocks
        )
        return any(name in self.modules for name in names if name)

    def pools(self, stage: str, block: int | None) -> bool:
        """Whether the shortcut of a block pools, as the place of its kernel shows."""
        conv, norm = "shortcut.projection.conv", "shortcut.projection.norm"
        return self.width(stage, [block], conv, norm) is not None

    def has_block(self, stage: str, block: int) -> bool:
        prefix = self.naming.block_prefix(stage, block)
        if prefix is None:
            return False
        return any(module.startswith(prefix + self.naming.joint) for module in self.modules)

    def width(self, stage: str, blocks: Iterable[int | None], conv: str, norm: str) -> int | None:
        """Output channels of a convolution in the first of ``blocks`` that has it: what most of its
        kernel and the norm after it say.

        A majority, so that one tensor of a wrong shape is found out by the others and not the other
        way round."""
        for block in blocks:
            shapes = [
                self.shape(stage, block, conv, SlotKind.CONV),
                *(self.shape(stage, block, norm, SlotKind.NORM, name) for name in _NORM_TENSORS),
            ]
            channels = Counter(shape[-1] for shape in shapes if shape)
            if channels:
                return channels.most_common(1)[0][0]
        return None

    def biased(self, places: Iterable[tuple[str, int | None, str]]) -> bool:
        """Whether most of the convolutions at these places (stage, block and role) have a bias."""
        kind = SlotKind.BIASED_CONV
        there = [place for place in places if self.shape(*place, kind) is not None]
        found = [self.shape(*place, kind, "bias") is not None for place in there]
        return 2 * sum(found) > len(found)

    def biases(self, blocks: Sequence[tuple[str, int | None]]) -> dict[str, bool]:
        """``conv_bias`` and ``shortcut_bias`` of blocks, each by stage and index."""

        def of(*roles: str) -> bool:
            return self.biased((*block, role) for block in blocks for role in roles)

        skips = "shortcut.conv", "shortcut.projection.conv"
        return {"conv_bias": of("conv1", "conv2", "conv3"), "shortcut_bias": of(*skips)}

    def attention(
        self, blocks: Sequence[tuple[str, int | None]], out_channels: Mapping[str, int]
    ) -> dict[str, Any]:
        """SlotKind of attention, and the ratio that most inner widths of squeeze-and-excitation
        have.

        Args:
          blocks: Stage and index of each.
          out_channels: Of the blocks of a stage.
        """
        if any(self.has(stage, [block], "attention.conv") for stage, block in blocks):
            return {"attention": "eca"}
        if not any(
            self.has(stage, [block], role)
            for stage, block in blocks
            for role in ("attention.reduce", "attention.expand")
        ):
            return {}
        seen: list[tuple[int, int]] = []
        for stage, block in blocks:
            kernel = self.shape(stage, block, "attention.reduce", SlotKind.BIASED_CONV)
            if kernel:
                seen.append((out_channels[stage], kernel[-1]))

        def fits(ratio: float) -> int:
            return sum(
                BlockConfig(
                    in_channels=out, out_channels=out, attention="se", attention_ratio=ratio
                ).squeezed_channels
                == inner
                for out, inner in seen
            )

        return {"attention": "se", "attention_ratio": max(_RATIOS, key=fits)}

    def grouping(
        self, kind: str, blocks: Iterable[tuple[str, int | None, int | None, int]]
    ) -> tuple[int, int]:
        """``groups`` and ``base_width`` that most 3x3 kernels ``(3, 3, channels // groups, _)``
        have; of two that disagree, the first is believed.

        Args:
          kind: Of every block.
          blocks: Stage, index, input channels (None: unknown) and planes of each.
        """
        seen: list[tuple[int, int, int]] = []
        for stage, block, in_channels, planes in blocks:
            inputs = (
                {"conv1": in_channels, "conv2": planes}
                if kind == "basic"
                else {"conv2": self.width(stage, [block], "conv2", "norm2")}
            )
            for conv, channels in inputs.items():
                kernel = self.shape(stage, block, conv, SlotKind.CONV)
                if kernel and channels and planes and 0 < kernel[2] <= channels:
                    seen.append((planes, kernel[2], channels))
        if not seen:
            return 1, 64
        groups = Counter(channels // fan for _, fan, channels in seen).most_common(1)[0][0]
        if kind == "basic":
            return groups, 64
        needed = [(planes, inner // groups) for planes, _, inner in seen]
        # where one width serves all stages, the largest of these does
        narrowest = {-(-64 * per_group // planes) for planes, per_group in needed}

        def fits(width: int) -> tuple[int, int]:
            served = sum(planes * width // 64 == per_group for planes, per_group in needed)
            return served, -width

        return groups, max(narrowest, key=fits)


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


def _shortcut(pooled: bool, projects: bool) -> Shortcut:
    if pooled:
        return "pooled"
    return "projection" if projects else "zero_pad"


def infer_network(naming: Naming, found: TensorInfos) -> ResNetConfig | None:
    """The network that the names and shapes describe under ``naming``, None where they describe
    none.

    Tolerates single missing tensors, so that the error can name them.
    """
    reader = _Reader(naming.laid_out(_depths(naming, found)), found)
    stages: list[range] = []
    for number in count(1):
        depth = next(block for block in count() if not reader.has_block(f"stage{number}", block))
        if depth == 0:
            break
        stages.append(range(depth))
    if not stages:
        return None
    thirds = (reader.width(f"stage{n}", b, "conv3", "norm3") for n, b in enumerate(stages, 1))
    kind = "bottleneck" if any(thirds) else "basic"
    last = 3 if kind == "bottleneck" else 2
    widths = [
        reader.width(f"stage{n}", blocks, f"conv{last}", f"norm{last}") or 0
        for n, blocks in enumerate(stages, 1)
    ]
    deep = any(reader.has("stem", [None], f"conv{i}") for i in (1, 2, 3))
    stem = reader.shape("stem", None, "conv1" if deep else "conv", SlotKind.CONV)
    stem_width = reader.width("stem", [None], *(("conv3", "norm3") if deep else ("conv", "norm")))
    inner = tuple(reader.width("stem", [None], f"conv{i}", f"norm{i}") or 0 for i in (1, 2))
    place = "head", None, "", SlotKind.LINEAR
    head = reader.shape(*place) or reader.shape(*place, "bias")
    if 0 in widths or not stem_width:
        return None
    inputs = [stem_width, *widths]
    blocks = [
        (f"stage{n + 1}", i, widths[n] if i else inputs[n], widths[n] // EXPANSION[kind])
        for n, stage in enumerate(stages)
        for i in stage
    ]
    groups, base_width = reader.grouping(kind, blocks)
    places = [(stage, i) for stage, i, _, _ in blocks]
    firsts = [f"stage{n}" for n in range(1, len(stages) + 1)]
    pooled = any(reader.pools(stage, 0) for stage in firsts)
    projects = any(reader.width(stage, [0], "shortcut.conv", "shortcut.norm") for stage in firsts)
    place = "shortcut.projection" if pooled else "shortcut"
    first = reader.width("stage1", [0], f"{place}.conv", f"{place}.norm")
    first_stride = 2 if stem_width == widths[0] and first else 1
    changes = len(stages) > 1 or stem_width != widths[0]
    try:
        return ResNetConfig(
            block=kind,
            depths=tuple(len(blocks) for blocks in stages),
            widths=tuple(width // EXPANSION[kind] for width in widths),
            stem="deep" if deep else "cifar" if stem is not None and stem[0] == 3 else "imagenet",
            stem_width=stem_width,
            stem_hidden=inner if deep else (),
            stem_bias=reader.biased(
                ("stem", None, f"conv{i}") for i in ((1, 2, 3) if deep else ("",))
            ),
            first_stride=first_stride,
            shortcut=_shortcut(pooled, projects or not changes),
            groups=groups,
            base_width=base_width,
            in_channels=stem[2] if stem else 3,
            num_classes=head[-1] if head else None,
            **reader.biases(places),
            **reader.attention(places, dict(zip(firsts, widths, strict=True))),
        )
    except ValueError:
        return None


def infer_block(naming: Naming, found: TensorInfos, stride: int | None) -> BlockConfig | None:
    """The bare block that names and shapes describe; they do not show its stride."""
    reader = _Reader(naming, found)
    kind = "bottleneck" if reader.width("", [None], "conv3", "norm3") else "basic"
    last = 3 if kind == "bottleneck" else 2
    out = reader.width("", [None], f"conv{last}", f"norm{last}")
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
    try:
        return BlockConfig(
            in_channels=in_channels,
            out_channels=out,
            kind=kind,
            stride=stride or (2 if projects and in_channels == out else 1),
            groups=groups,
            base_width=base_width,
            shortcut=_shortcut(pooled, projects or ((stride or 1) == 1 and in_channels == out)),
            **reader.biases([("", None)]),
            **reader.attention([("", None)], {"": out}),
        )
    except ValueError:
        return None
