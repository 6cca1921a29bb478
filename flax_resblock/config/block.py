"""One residual block as data: its options, its configuration, and the slots that it consists of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flax_resblock.config.slots import Activation, Branch, Slot, SlotKind, normalised_conv

BlockKind = Literal["basic", "bottleneck"]
Shortcut = Literal["projection", "pooled", "zero_pad"]
StridePlacement = Literal["3x3", "1x1"]
Attention = Literal["none", "se", "eca"]
Antialias = Literal["none", "blur"]
PaddingRule = Literal["symmetric", "same"]
Lowering = Literal["auto", "xla"]  # of convolutions on a CPU; see flax_resblock.conv_lowering

EXPANSION: Mapping[str, int] = MappingProxyType({"basic": 1, "bottleneck": 4})


@cache
def choices_of(config: type) -> Mapping[str, tuple[Any, ...]]:
    """The options of a configuration class and their values: its fields that are literals or yes
    or no."""
    hints = get_type_hints(config).items()
    literals = {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}
    return literals | {name: (False, True) for name, hint in hints if hint is bool}


def check_choices(config: Any) -> None:
    """Raises ValueError for an option whose value is none of its literal's."""
    for name, known in choices_of(type(config)).items():
        if (value := getattr(config, name)) not in known:
            *others, last = map(repr, known)
            what = "block kind" if name == "kind" else name
            raise ValueError(f"{what} {value!r} is unknown; choose {', '.join(others)} or {last}.")


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What a block and a network of such blocks are told alike.

    Attributes:
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
        arXiv:1904.11486), also that of a stem's pooling; it has no weights.
      activation: Of the stem, within a block and at its end, as PyTorch defines it:
        ``"leaky_relu"`` has a slope of 0.01 and ``"gelu"`` is exact. Squeeze-and-excitation keeps
        its ReLU.
      conv_bias, shortcut_bias: Whether the convolutions of the main path, and that of the shortcut,
        have a bias in front of their norm, as ``nn.Conv2d`` has by default. In training it changes
        the running mean alone.
      padding: Of convolutions and max pooling that have a stride: ``"symmetric"`` pads as many
        pixels on each side, as PyTorch does; ``"same"`` as TensorFlow, Flax and Haiku do with
        ``'SAME'``: just enough for ``ceil(size / stride)`` outputs, the larger half at the end. At
        stride 1 the two are equal.
    """

    groups: int = 1
    base_width: int = 64
    shortcut: Shortcut = "projection"
    stride_on: StridePlacement = "3x3"
    attention: Attention = "none"
    attention_ratio: float = 1 / 16
    antialias: Antialias = "none"
    activation: Activation = "relu"
    conv_bias: bool = False
    shortcut_bias: bool = False
    padding: PaddingRule = "symmetric"

    @property
    def shared_options(self) -> dict[str, Any]:
        """The fields of :class:`BlockOptions` alone."""
        return {name: getattr(self, name) for name in BlockOptions.__dataclass_fields__}


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
        for name in ("in_channels", "out_channels", "stride", "dilation", "groups", "base_width"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer.")
        check_choices(self)
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
        words = f"a zero_pad shortcut cannot reduce {inputs} channels to {outputs}."
        yield self.shortcut == "zero_pad" and outputs < inputs, words
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
        """Inner channels of squeeze-and-excitation, to the nearest multiple of 8."""
        return max(8, int(self.out_channels * self.attention_ratio + 4) // 8 * 8)

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

        inputs, width, outputs = self.in_channels, self.inner_width, self.out_channels
        sizes = (3, 3) if self.kind == "basic" else (1, 3, 1)
        channels = (inputs, *[width] * (len(sizes) - 1), outputs)
        for i, (size, stride) in enumerate(zip(sizes, self.strides, strict=True), start=1):
            numbers: dict[str, Any] = {"stride": stride, "bias": self.conv_bias}
            numbers["padding_rule"] = self.padding
            if size > 1:
                numbers |= {"dilation": self.dilation, "groups": self.groups}
            names, ends = (f"conv{i}", f"norm{i}"), (channels[i - 1], channels[i])
            act = self.activation if i < len(sizes) else None
            yield from normalised_conv(stage, block, names, size, ends, activation=act, **numbers)
            if self.blurs and i == len(sizes) - 1:
                yield at("blur", SlotKind.BLUR, (3, 3), stride=self.stride, padding=1)
        yield from self._attention_slots(at)
        if self.projects:
            names, stride, skip = ("shortcut.conv", "shortcut.norm"), self.stride, Branch.SHORTCUT
            if self.shortcut == "pooled":
                names, stride = ("shortcut.projection.conv", "shortcut.projection.norm"), 1
                if (window := self.stride) > 1:  # at stride 1 the pool returns its input
                    kind = SlotKind.AVERAGE_POOL
                    yield at("shortcut.pool", kind, (window, window), stride=window, branch=skip)
            numbers = {"stride": stride, "bias": self.shortcut_bias, "branch": skip}
            yield from normalised_conv(stage, block, names, 1, (inputs, outputs), **numbers)
        yield at("", SlotKind.OUTPUT, activation=self.activation)

    def _attention_slots(self, at: Any) -> Iterator[Slot]:
        branch, channels, inner = Branch.ATTENTION, self.out_channels, self.squeezed_channels
        if self.attention == "se":
            for role, ends in (("reduce", (channels, inner)), ("expand", (inner, channels))):
                kind = SlotKind.BIASED_CONV
                yield at(f"attention.{role}", kind, (1, 1, *ends), branch=branch)
        if self.attention == "eca":
            window, kind = self.attention_window, SlotKind.CHANNEL_CONV
            shape = (window, 1, 1)
            yield at("attention.conv", kind, shape, padding=window // 2, branch=branch)
        if self.attention != "none":
            yield at("attention", SlotKind.OUTPUT, branch=branch)
