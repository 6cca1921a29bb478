"""One residual block as data: its options, its configuration, and the slots that it consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax_resblock.config.options import EXPANSION, BlockKind, BlockOptions, check_positive
from flax_resblock.config.slots import Activation, Branch, Slot, SlotKind, normalised_conv


class Convolution(NamedTuple):
    """One convolution of the main path of a block: channels, size of the kernel and stride."""

    inputs: int
    outputs: int
    size: int
    stride: int


@dataclass(frozen=True, kw_only=True)
class BlockConfig(BlockOptions):
    """One residual block.

    Attributes:
      in_channels, out_channels: Channels of its input and output.
      kind: ``"basic"``: two 3x3 convolutions; ``"bottleneck"``: 1x1, 3x3, 1x1 with ``out_channels /
        4`` planes.
      stride: Of the block; 1 keeps the resolution.
      dilation: Of the 3x3 convolutions.
      The others: See :class:`BlockOptions`.
    Raises:
      ValueError: Numbers that make no block.
    """

    in_channels: int
    out_channels: int
    kind: BlockKind = "basic"
    stride: int = 1
    dilation: int = 1

    def __post_init__(self) -> None:
        check_positive(self, "in_channels", "out_channels", "stride", "dilation")
        self.check()
        for wrong, words in self._faults():
            if wrong:
                raise ValueError(words)

    def _faults(self) -> Iterator[tuple[object, str]]:
        basic, inputs, outputs = self.kind == "basic", self.in_channels, self.out_channels
        words = f"a bottleneck has 4 output channels per plane; out_channels={outputs} is not a "
        yield outputs % EXPANSION[self.kind], f"{words}multiple of 4."
        words = f"base_width={self.base_width} applies to bottlenecks; a basic block has none."
        yield basic and self.base_width != 64, words
        words = f"groups={self.groups} must divide in_channels={inputs} and out_channels={outputs}"
        yield (
            basic and (inputs % self.groups or outputs % self.groups),
            f"{words} of a basic block.",
        )
        words = f"base_width={self.base_width} leaves a bottleneck of {self.planes} planes no inner"
        yield self.inner_width < 1, f"{words} channel."
        words = f"a {self.shortcut} shortcut cannot reduce {inputs} channels to {outputs}."
        yield self.pads and outputs < inputs, words
        words = f"a pooled shortcut with dilation={self.dilation} is defined differently by"
        words += " different libraries; use shortcut='projection'."
        yield self.shortcut == "pooled" and self.dilation > 1, words
        unblurred = self.stride > 2 or self.dilation > 1 or (not basic and self.stride_on == "1x1")
        words = "antialias='blur' carries a stride of 1 or 2 after a 3x3 convolution; it goes with"
        words += " neither dilation nor stride_on='1x1'."
        yield self.antialias == "blur" and unblurred, words
        words = "antialias='blur' pads its own strides; it does not go with padding='same'."
        yield self.antialias == "blur" and self.padding == "same", words
        words = f"attention_ratio={self.attention_ratio!r} must be above 0 and at most 1."
        yield not 0 < self.attention_ratio <= 1, words
        words = "antialias='blur' goes with order='post_activation'."
        yield self.antialias == "blur" and self.norm_first, words
        channels = {inputs if self.norm_first else outputs, self.inner_width}
        uneven = self.norm == "group" and any(one % self.norm_groups for one in channels)
        words = f"norm_groups={self.norm_groups} must divide the channels of every norm, among them"
        yield uneven, f"{words} {' and '.join(map(str, sorted(channels)))}."

    @property
    def planes(self) -> int:
        """Channels before expansion, torchvision's ``planes``."""
        return self.out_channels // EXPANSION[self.kind]

    @property
    def inner_width(self) -> int:
        """Channels between the convolutions."""
        if self.kind == "basic":
            return self.planes
        return int(self.planes * self.base_width / 64) * self.groups

    @property
    def changes_shape(self) -> bool:
        """Whether the skip must change resolution or channels, by the numbers of the block."""
        return self.stride != 1 or self.in_channels != self.out_channels

    @property
    def pads(self) -> bool:
        """Whether new channels of the skip are zero."""
        return self.shortcut in ("zero_pad", "zero_pad_behind")

    @property
    def projects(self) -> bool:
        """Whether the skip has parameters."""
        return self.changes_shape and self.shortcut in ("projection", "pooled")

    @property
    def skips_activated(self) -> bool:
        """Whether the skip is given what the first norm and activation give."""
        return self.norm_first and self.changes_shape and self.shortcut_from == "activated"

    @property
    def ending(self) -> Activation | None:
        """The activation after the addition."""
        return self.activation if self.last_activation and not self.norm_first else None

    @property
    def blurs(self) -> bool:
        """Whether a blur carries the stride of the main path."""
        return self.antialias == "blur" and self.stride == 2

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each convolution of the main path."""
        stride = 1 if self.blurs else self.stride
        if self.kind == "basic":
            return stride, 1
        return (stride, 1, 1) if self.stride_on == "1x1" else (1, stride, 1)

    @property
    def convolutions(self) -> tuple[Convolution, ...]:
        """Those of the main path."""
        sizes = (3, 3) if self.kind == "basic" else (1, 3, 1)
        inner = [self.inner_width] * (len(sizes) - 1)
        ends = (self.in_channels, *inner), (*inner, self.out_channels)
        return tuple(map(Convolution, *ends, sizes, self.strides))

    @property
    def squeezed_channels(self) -> int:
        """Inner channels of squeeze-and-excitation."""
        multiple = self.attention_multiple
        half = multiple / 2 if multiple > 1 else 0
        number = int(self.out_channels * self.attention_ratio + half)
        return max(multiple, number // multiple * multiple)

    @property
    def attention_window(self) -> int:
        """Channels that ECA looks at: odd, about ``(log2(channels) + 1) / 2``."""
        size = int(abs(math.log2(self.out_channels) + 1) / 2)
        return max(size if size % 2 else size + 1, 3)

    @property
    def image_size(self) -> int:
        """Usual height and width of its input, in pixels."""
        return 16

    def slots(self, stage: str = "", block: int | None = None) -> Iterator[Slot]:
        """The slots of this block in forward order; the block's own output comes last."""

        def at(role: str, kind: SlotKind, shape: tuple[int, ...] = (), **numbers: Any) -> Slot:
            return Slot(stage, block, role, kind, shape, **numbers)

        shared, last = {"norm_first": self.norm_first, **self.layer_numbers}, len(self.strides)
        for i, (*ends, size, stride) in enumerate(self.convolutions, start=1):
            numbers: dict[str, Any] = {"stride": stride, "bias": self.conv_bias, **shared}
            if size > 1:
                numbers |= {"dilation": self.dilation, "groups": self.groups}
            if self.norm_first or self.branch_activation or i < last:
                numbers["activation"] = self.activation
            names = f"conv{i}", f"norm{i}"
            yield from normalised_conv(stage, block, names, size, (ends[0], ends[1]), **numbers)
            if self.blurs and i == last - 1:
                yield at("blur", SlotKind.BLUR, (3, 3), stride=self.stride, padding=1)
        attention, weighs_branch = self._attention_slots(at), self.attention_place == "branch"
        yield from attention if weighs_branch else ()
        if self.projects:
            yield from self._shortcut_slots(at, stage, block)
        yield from () if weighs_branch else attention
        added = self.shortcut if self.changes_shape or self.shortcut == "none" else "input"
        yield at("", SlotKind.OUTPUT, activation=self.ending, takes=added)

    def _shortcut_slots(self, at: Any, stage: str, block: int | None) -> Iterator[Slot]:
        home, stride, skip = "shortcut", self.stride, Branch.SHORTCUT
        takes = "norm1" if self.skips_activated else ""
        if self.shortcut == "pooled":
            home, stride = "shortcut.projection", 1
            if (window := self.stride) > 1:  # at stride 1 the pool returns its input
                numbers = {"stride": window, "branch": skip, "takes": takes}
                yield at("shortcut.pool", SlotKind.AVERAGE_POOL, (window, window), **numbers)
        numbers = {"stride": stride, "bias": self.shortcut_bias, "branch": skip, "takes": takes}
        names = f"{home}.conv", None if self.norm_first else f"{home}.norm"
        size, ends = self.shortcut_size, (self.in_channels, self.out_channels)
        yield from normalised_conv(stage, block, names, size, ends, **numbers, **self.layer_numbers)

    def _attention_slots(self, at: Any) -> Iterator[Slot]:
        branch, channels, inner = Branch.ATTENTION, self.out_channels, self.squeezed_channels
        if self.attention == "se":
            for role, ends in (("reduce", (channels, inner)), ("expand", (inner, channels))):
                kind = SlotKind.BIASED_CONV if self.attention_bias else SlotKind.CONV
                yield at(f"attention.{role}", kind, (1, 1, *ends), branch=branch)
        if self.attention == "eca":
            window, kind = self.attention_window, SlotKind.CHANNEL_CONV
            shape = (window, 1, 1)
            yield at("attention.conv", kind, shape, padding=window // 2, branch=branch)
        if self.attention != "none":
            takes = "" if self.attention_place == "branch" else self.attention_place
            yield at("attention", SlotKind.OUTPUT, branch=branch, takes=takes)
