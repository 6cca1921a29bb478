"""One residual block, as data: its configuration and the slots that it consists of.

A *slot* is one place in a network that has parameters or an activation worth comparing:
``stage1.0.conv1``, ``head``. Both frameworks, the converter and the verifier speak of slots; this
module knows no array and no framework."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Literal, get_args

BlockKind = Literal["basic", "bottleneck"]
Shortcut = Literal["projection", "pooled", "zero_pad"]
StridePlacement = Literal["3x3", "1x1"]
Attention = Literal["none", "se", "eca"]
Antialias = Literal["none", "blur"]
Path = tuple[str | int, ...]

EXPANSION: Mapping[str, int] = MappingProxyType({"basic": 1, "bottleneck": 4})


class SlotKind(Enum):
    """What a slot holds; decides which tensors belong to it."""

    CONV = "conv"
    BIASED_CONV = "biased_conv"
    CHANNEL_CONV = "channel_conv"
    NORM = "norm"
    LINEAR = "linear"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Slot:
    """One place of a network.

    Attributes:
      stage: ``"stem"``, ``"stage1"`` ..., ``"head"``, or ``""`` in a bare block.
      block: Index of the block within its stage; None outside the stages.
      role: Dotted place within the block or stem, ``"conv1"``, ``"shortcut.norm"``; ``""`` is the
        whole.
      kind: What it holds.
      shape: Shape of its kernel ``(kh, kw, I // groups, O)``, ``(k, I, O)`` over channels or ``(in,
        out)``, or ``(C,)`` of a norm; ``()`` for an activation.
    """

    stage: str
    block: int | None
    role: str
    kind: SlotKind
    shape: tuple[int, ...] = ()

    @property
    def path(self) -> Path:
        """Attribute path in the Flax module: ``("stage1", 0, "shortcut", "conv")``."""
        place: Path = (self.stage,) if self.stage else ()
        if self.block is not None:
            place += (self.block,)
        return place + tuple(self.role.split(".")) if self.role else place

    @property
    def name(self) -> str:
        """Dotted path, ``"stage1.0.shortcut.conv"``; a bare block as a whole is ``"block"``."""
        return ".".join(map(str, self.path)) or "block"


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "kind": get_args(BlockKind),
    "shortcut": get_args(Shortcut),
    "stride_on": get_args(StridePlacement),
    "attention": get_args(Attention),
    "antialias": get_args(Antialias),
}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One residual block.

    Attributes:
      in_channels, out_channels: Channels of its input and output.
      kind: ``"basic"``: two 3x3 convolutions; ``"bottleneck"``: 1x1, 3x3, 1x1 with ``out_channels /
        4`` planes.
      stride: Of the block; 1 keeps the resolution.
      dilation: Of the 3x3 convolutions.
      groups, base_width: As in torchvision: the inner width is ``int(planes * base_width / 64) *
        groups``; a basic block takes groups only.
      shortcut: Where stride or channels change: ``"projection"`` is a 1x1 convolution and a norm;
        ``"pooled"`` averages 2x2 pixels first, where the stride is 2 (ResNet-D, He et al. 2019,
        arXiv:1812.01187); ``"zero_pad"`` is option A of He et al. 2016, a strided slice with zero
        channels added on both sides.
      stride_on: Which convolution of a bottleneck carries the stride: ``"3x3"`` as torchvision,
        ``"1x1"`` as Caffe and He et al.
      attention: Weighs the channels of the main path before the addition: ``"se"``
        squeeze-and-excitation (arXiv:1709.01507), ``"eca"`` efficient channel attention
        (arXiv:1910.03151).
      attention_ratio: Inner channels of ``"se"`` per channel, rounded to a multiple of 8.
      antialias: ``"blur"``: a 3x3 binomial filter carries a stride of 2 (Zhang 2019,
        arXiv:1904.11486); it has no weights.
    Raises:
      ValueError: Numbers that make no block.
    """

    in_channels: int
    out_channels: int
    kind: BlockKind = "basic"
    stride: int = 1
    dilation: int = 1
    groups: int = 1
    base_width: int = 64
    shortcut: Shortcut = "projection"
    stride_on: StridePlacement = "3x3"
    attention: Attention = "none"
    attention_ratio: float = 1 / 16
    antialias: Antialias = "none"

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "stride", "dilation", "groups", "base_width"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r} must be a positive integer.")
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                words = (
                    " or ".join(map(repr, known))
                    if len(known) == 2
                    else f"one of {', '.join(map(repr, known))}"
                )
                name = "block kind" if field == "kind" else field
                raise ValueError(f"{name} {getattr(self, field)!r} is unknown; choose {words}.")
        if self.out_channels % EXPANSION[self.kind]:
            raise ValueError(
                f"a bottleneck has 4 output channels per plane; "
                f"out_channels={self.out_channels} is not a multiple of 4."
            )
        if self.kind == "basic" and self.base_width != 64:
            raise ValueError(
                f"base_width={self.base_width} applies to bottlenecks; a basic block has none."
            )
        if self.kind == "basic" and (
            self.in_channels % self.groups or self.out_channels % self.groups
        ):
            raise ValueError(
                f"groups={self.groups} must divide in_channels={self.in_channels} and "
                f"out_channels={self.out_channels} of a basic block."
            )
        if self.inner_width < 1:
            raise ValueError(
                f"base_width={self.base_width} leaves a bottleneck of {self.planes} planes no "
                f"inner channel."
            )
        if self.shortcut == "zero_pad" and self.out_channels < self.in_channels:
            raise ValueError(
                f"a zero_pad shortcut cannot reduce {self.in_channels} channels to "
                f"{self.out_channels}."
            )
        if self.shortcut == "pooled" and self.dilation > 1:
            raise ValueError(
                f"a pooled shortcut with dilation={self.dilation} has no meaning that everyone "
                f"shares; use shortcut='projection'."
            )
        if self.antialias == "blur" and (
            self.stride > 2
            or self.dilation > 1
            or (self.kind == "bottleneck" and self.stride_on == "1x1")
        ):
            raise ValueError(
                "antialias='blur' carries a stride of 1 or 2 after a 3x3 convolution; it goes "
                "with neither dilation nor stride_on='1x1'."
            )
        if not 0 < self.attention_ratio <= 1:
            raise ValueError(
                f"attention_ratio={self.attention_ratio!r} must be above 0 and at most 1."
            )

    @property
    def planes(self) -> int:
        """Channels before expansion, torchvision's ``planes``."""
        return self.out_channels // EXPANSION[self.kind]

    @property
    def inner_width(self) -> int:
        """Channels between the convolutions."""
        return (
            self.planes
            if self.kind == "basic"
            else int(self.planes * self.base_width / 64) * self.groups
        )

    @property
    def changes_shape(self) -> bool:
        """Whether the skip must change resolution or channels; decided by the numbers, not by the
        shapes that meet (1x1 inputs at stride 2).
        """
        return self.stride != 1 or self.in_channels != self.out_channels

    @property
    def projects(self) -> bool:
        """Whether the skip has parameters."""
        return self.changes_shape and self.shortcut != "zero_pad"

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
    def squeezed_channels(self) -> int:
        """Inner channels of squeeze-and-excitation: ``attention_ratio`` of the output's, to the
        nearest multiple of 8.
        """
        return max(8, int(self.out_channels * self.attention_ratio + 4) // 8 * 8)

    @property
    def attention_window(self) -> int:
        """Channels that efficient channel attention looks at: odd, about ``(log2(channels) + 1) /
        2``.
        """
        size = int(abs(math.log2(self.out_channels) + 1) / 2)
        return max(size if size % 2 else size + 1, 3)

    def slots(self, stage: str = "", block: int | None = None) -> Iterator[Slot]:
        """The slots of this block in forward order; the block's own output comes last."""
        width, groups = self.inner_width, self.groups
        if self.kind == "basic":
            kernels = [
                (3, self.in_channels // groups, width),
                (3, width // groups, self.out_channels),
            ]
        else:
            kernels = [
                (1, self.in_channels, width),
                (3, width // groups, width),
                (1, width, self.out_channels),
            ]
        for i, (size, fan, out) in enumerate(kernels, start=1):
            yield Slot(stage, block, f"conv{i}", SlotKind.CONV, (size, size, fan, out))
            yield Slot(stage, block, f"norm{i}", SlotKind.NORM, (out,))
            if self.blurs and i == len(kernels) - 1:
                yield Slot(stage, block, "blur", SlotKind.ACTIVATION)
        channels = self.out_channels
        if self.attention == "se":
            yield Slot(
                stage,
                block,
                "attention.reduce",
                SlotKind.BIASED_CONV,
                (1, 1, channels, self.squeezed_channels),
            )
            yield Slot(
                stage,
                block,
                "attention.expand",
                SlotKind.BIASED_CONV,
                (1, 1, self.squeezed_channels, channels),
            )
        if self.attention == "eca":
            yield Slot(
                stage, block, "attention.conv", SlotKind.CHANNEL_CONV, (self.attention_window, 1, 1)
            )
        if self.attention != "none":
            yield Slot(stage, block, "attention", SlotKind.ACTIVATION)
        if self.projects:
            pooled = self.shortcut == "pooled"
            if pooled and self.stride > 1:  # at stride 1 the pool hands its input on
                yield Slot(stage, block, "shortcut.pool", SlotKind.ACTIVATION)
            place = "shortcut.projection" if pooled else "shortcut"
            yield Slot(
                stage, block, f"{place}.conv", SlotKind.CONV, (1, 1, self.in_channels, channels)
            )
            yield Slot(stage, block, f"{place}.norm", SlotKind.NORM, (channels,))
        yield Slot(stage, block, "", SlotKind.ACTIVATION)
