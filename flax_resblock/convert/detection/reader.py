"""Looks tensors up by their place in a network, under one naming scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax_resblock.config import BlockConfig, Slot, SlotKind
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.state_map import TensorInfo

TensorInfos = Mapping[str, TensorInfo]
_KERNEL_AXES = {SlotKind.CONV: 4, SlotKind.BIASED_CONV: 4, SlotKind.CHANNEL_CONV: 3}
_KERNEL_AXES[SlotKind.LINEAR] = 2
_NORM_TENSORS = ("scale", "bias", "mean", "var")
Blocks = Sequence[tuple[str, int | None]]
"""Stage and index of each."""
_SQUEEZE = "attention.reduce", "attention.expand"
_RATIOS = tuple(1 / n for n in (16, 8, 4, 2, 1, 32, 64))
"""Of squeeze-and-excitation, the usual ones first."""


class TensorReader:
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
        rows = self.naming.tensors_of(kind, role)
        row = next(row for row in rows if row.flax_name == tensor)
        info = self.found.get(row.key(module))
        shape = None if info is None else row.codec.flax_shape(info.shape)
        axes = _KERNEL_AXES[kind] if tensor == "kernel" else 1
        return shape if shape is not None and len(shape) == axes else None

    def norm(self, stage: str, block: int | None, role: str, tensor: str) -> tuple[int, ...] | None:
        """Shape of a tensor of a norm."""
        return self.shape(stage, block, role, SlotKind.NORM, tensor)

    def norm_first(self, blocks: Blocks, last: int, stem: int | None) -> bool | None:
        """Whether norms have the channels that the convolutions take and not those that they give;
        None where no tensor tells, because the main paths never change the number of channels.

        Args:
          last: Number of the last convolution of a block.
          stem: Channels that the first block takes; None: unknown.
        """
        votes, inside = Counter[bool](), stem
        for place in blocks:
            convs = [self.shape(*place, f"conv{i}", SlotKind.CONV) for i in range(1, last + 1)]
            skip = self.shape(*place, "shortcut.conv", SlotKind.CONV)
            if inside is None and (one := skip or convs[0]):
                inside, first = one[2], self.norm(*place, "norm1", "scale")
                if not skip and first and first[0] != one[3] and first[0] % inside == 0:
                    inside = first[0]  # of a convolution in groups
            for i, kernel in enumerate(convs, start=1):
                scale = self.norm(*place, f"norm{i}", "scale")
                takes = inside if i == 1 else kernel[2] if kernel else None
                # the others may be in groups, and their kernels do not tell what they take
                tells = i in ((1,) if last == 2 else (1, 3))
                if tells and scale and kernel and takes != kernel[3]:
                    votes[scale[0] == takes] += scale[0] in (takes, kernel[3])
            inside = convs[-1][3] if convs[-1] else None
        if votes.total():
            return votes[True] > votes[False]
        if any(self.shape(*place, "shortcut.conv", SlotKind.CONV) for place in blocks):
            return not any(self.norm(*place, "shortcut.norm", "scale") for place in blocks)
        return None

    def has_statistics(self, blocks: Blocks) -> bool:
        """Whether most norms have running statistics."""
        norms = [(*place, f"norm{i}") for place in blocks for i in (1, 2, 3)]
        norms = [one for one in norms if any(self.norm(*one, name) for name in _NORM_TENSORS)]
        without = [one for one in norms if not (self.norm(*one, "mean") or self.norm(*one, "var"))]
        return not norms or 2 * len(without) < len(norms)

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

    def width(
        self, stage: str, blocks: Iterable[int | None], conv: str, norm: str | None
    ) -> int | None:
        """Output channels of a convolution in the first of ``blocks`` that has it: what most of its
        kernel and the norm after it say; None: none comes after it.

        A majority, so that one tensor of a wrong shape is found out by the others and not the other
        way round."""
        for block in blocks:
            shapes = [
                self.shape(stage, block, conv, SlotKind.CONV),
                *(self.norm(stage, block, norm, name) for name in _NORM_TENSORS if norm),
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
        """Kind of attention; of squeeze-and-excitation the biases, and the ratio and multiple that
        most inner widths have. ``out_channels`` are those of the blocks of each stage."""
        if any(self.has(stage, [block], "attention.conv") for stage, block in blocks):
            return {"attention": "eca"}
        if not any(self.has(stage, [block], role) for stage, block in blocks for role in _SQUEEZE):
            return {}
        seen: list[tuple[int, int]] = []
        for stage, block in blocks:
            kernel = self.shape(stage, block, "attention.reduce", SlotKind.BIASED_CONV)
            if kernel:
                seen.append((out_channels[stage], kernel[-1]))

        def fits(choice: Mapping[str, Any]) -> int:
            blocks = (
                BlockConfig(in_channels=out, out_channels=out, attention="se", **choice)
                for out, _ in seen
            )
            inner = (inner for _, inner in seen)
            return sum(a.squeezed_channels == b for a, b in zip(blocks, inner, strict=True))

        choices = [
            {"attention_ratio": ratio, "attention_multiple": multiple}
            for multiple in (8, 1)
            for ratio in _RATIOS
        ]
        places = [(*place, role) for place in blocks for role in _SQUEEZE]
        biased = self.biased(places) or not any(self.has(s, [b], role) for s, b, role in places)
        return {"attention": "se", "attention_bias": biased, **max(choices, key=fits)}

    def grouping(
        self, kind: str, blocks: Iterable[tuple[str, int | None, int | None, int]]
    ) -> tuple[int, int]:
        """``groups`` and ``base_width`` that most 3x3 kernels ``(3, 3, channels // groups, _)``
        have; of two that disagree, the first is believed. A block is its stage, index, input
        channels (None: unknown) and planes."""
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
