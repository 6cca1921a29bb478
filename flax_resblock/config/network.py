"""The configuration of a whole network: its stem, stages and head, and the walk over its slots."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

from flax_resblock.config.block import BlockConfig
from flax_resblock.config.options import (
    EXPANSION,
    STEM_WINDOWS,
    USUAL_STEMS,
    BlockKind,
    BlockOptions,
    HeadPool,
    Stem,
    StemPadding,
    StemPool,
    StemStride,
    Transition,
)
from flax_resblock.config.slots import (
    Branch,
    Slot,
    SlotKind,
    norm_slot,
    normalised_conv,
    padded,
    pooled_conv,
)

MOST_BLOCKS = 10_000
"""Of a network; a configuration in a file may say any number."""


@lru_cache(maxsize=4096, typed=True)
def _block(**numbers: Any) -> BlockConfig:
    """A block, made and checked once: networks have many that are equal."""
    return BlockConfig(**numbers)


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(BlockOptions):
    """A residual network. The fields that are not listed here are those of every block, see
    :class:`BlockOptions`.

    Attributes:
      block: Kind of every block.
      depths: Blocks per stage; 0 where ``transition`` is ``"pooled"``, but not in every stage.
      widths: Planes per stage (a bottleneck's output has four times as many channels).
      stem: ``"imagenet"``: 7x7 convolution of stride 2 and 3x3 max pooling of stride 2; ``"deep"``:
        three 3x3 convolutions, the first of stride 2, and the same pooling; ``"cifar"``: 3x3
        convolution of stride 1. The next two change the stride and the pooling.
      stem_width: Channels of the stem.
      stem_hidden: Channels of the first two convolutions of a deep stem; ``()`` for the others.
      stem_stride: Stride of the stem's first convolution, 1 or 2; None: as ``stem`` says. A value
        that ``stem`` says anyway becomes None, so that equal networks are equal.
      stem_pool: Max pooling after the stem: ``"3x3"`` pixels of stride 2, padded by one, with zeros
        (BiT) where it is ``"3x3_zeros"``; ``"2x2"`` pixels of stride 2; or ``"none"``. None as for
        ``stem_stride``.
      stem_padding: ``padding`` of the stem's first convolution, if it is another than that of the
        rest of the network: Flax's ImageNet example has ``"symmetric"`` there and ``"same"``
        elsewhere. None as for ``stem_stride``.
      stem_bias: Whether the convolutions of the stem have a bias.
      stem_norm: Whether a norm and an activation follow the stem's last convolution in
        pre-activation order too; in the other order they always do.
      first_stride: Stride of the first stage; that of the others is 2.
      dilated_stages: Stages (from 1) whose stride is replaced by dilation, torchvision's
        ``replace_stride_with_dilation``.
      in_channels: Channels of the images.
      num_classes: Size of the logits; None: no head, the network returns pooled features.
      final_norm: Whether a norm and an activation follow the last stage in pre-activation order.
      head_pool: How the head pools over all pixels.
      transition: How a stage begins: its first block changes the channels and has the stride; or,
        with ``"pooled"``, a 3x3 convolution, norm and activation change the channels in front of
        its blocks, and max pooling of 2x2 pixels has the stride (ResNet-9 of DAWNBench).
    Raises:
      ValueError: Numbers that make no network.
    """

    block: BlockKind = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Stem = "imagenet"
    stem_width: int = 64
    stem_hidden: tuple[int, ...] = ()
    stem_stride: StemStride = None
    stem_pool: StemPool = None
    stem_padding: StemPadding = None
    stem_bias: bool = False
    stem_norm: bool = False
    first_stride: int = 1
    dilated_stages: tuple[int, ...] = ()
    in_channels: int = 3
    num_classes: int | None = 1000
    final_norm: bool = True
    head_pool: HeadPool = "mean"
    transition: Transition = "strided"

    def __post_init__(self) -> None:
        for field in ("depths", "widths", "stem_hidden", "dilated_stages"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must name the same stages, at "
                f"least one."
            )
        classes = () if self.num_classes is None else (self.num_classes,)
        if self.transition == "pooled":
            self._check_pooled()
        depths = self.depths if self.transition == "strided" else ()
        sizes = (*depths, *self.widths, *self.stem_hidden, self.stem_width, self.in_channels)
        for field in (*sizes, *classes):
            if not isinstance(field, int) or field < 1:
                raise ValueError(
                    f"depths, widths, stem_width, in_channels and num_classes must be positive "
                    f"integers; got {field!r} in {self}."
                )
        self.check()
        if not self.norm_first:
            object.__setattr__(self, "final_norm", True)
            object.__setattr__(self, "stem_norm", False)
        usually = (*USUAL_STEMS[self.stem], self.padding)
        for field, usual in zip(("stem_stride", "stem_pool", "stem_padding"), usually, strict=True):
            if getattr(self, field) == usual:
                object.__setattr__(self, field, None)
        if self.antialias == "blur" and self.stem_pooling not in ("3x3", "none"):
            raise ValueError("antialias='blur' goes with a stem_pool of 3x3 pixels or none.")
        if self.padding == "same" and self.stem_pooling == "3x3_zeros":
            raise ValueError("stem_pool='3x3_zeros' pads by itself; padding='same' has no place.")
        if self.norm == "group" and self.stem_width % self.norm_groups:
            words = f"norm_groups={self.norm_groups} must divide stem_width={self.stem_width}."
            raise ValueError(words)
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths={self.depths} are more than {MOST_BLOCKS:,} blocks.")
        if len(self.stem_hidden) != (2 if self.stem == "deep" else 0):
            raise ValueError(
                f"stem_hidden={self.stem_hidden} must give the channels of two convolutions "
                f"for a deep stem, and none for another."
            )
        if self.first_stride not in (1, 2):
            raise ValueError(f"first_stride={self.first_stride!r} must be 1 or 2.")
        if not set(self.dilated_stages) <= set(range(2, len(self.depths) + 1)):
            raise ValueError(
                f"dilated_stages={self.dilated_stages} must be among 2..{len(self.depths)}; "
                f"stage 1 has no stride to replace."
            )
        list(self.blocks())  # every block checks itself

    def _check_pooled(self) -> None:
        """Raises ValueError for what does not go with ``transition="pooled"``, and sets what no
        block has to its default: none of them changes the shape."""
        if not all(isinstance(one, int) and one >= 0 for one in self.depths) or not any(
            self.depths
        ):
            raise ValueError(f"depths={self.depths} must name blocks, at least one altogether.")
        if self.norm_first or self.antialias != "none" or self.dilated_stages:
            words = "goes with order='post_activation', without antialias and dilated_stages."
            raise ValueError(f"transition='pooled' {words}")
        for field in ("stride_on", "shortcut_size", "shortcut_bias"):
            object.__setattr__(self, field, ResNetConfig.__dataclass_fields__[field].default)
        if self.shortcut != "none":
            object.__setattr__(self, "shortcut", "projection")

    @property
    def feature_channels(self) -> int:
        """Channels of the last stage's output."""
        return self.widths[-1] * EXPANSION[self.block]

    @property
    def ends_with_norm(self) -> bool:
        """Whether a norm and an activation follow the last stage."""
        return self.norm_first and self.final_norm

    @property
    def stem_is_bare(self) -> bool:
        """Whether neither a norm nor an activation follows the stem's last convolution."""
        return self.norm_first and not self.stem_norm

    @property
    def stem_striding(self) -> int:
        """Stride of the stem's first convolution."""
        return USUAL_STEMS[self.stem][0] if self.stem_stride is None else self.stem_stride

    @property
    def stem_pooling(self) -> str:
        """The max pooling after the stem."""
        return USUAL_STEMS[self.stem][1] if self.stem_pool is None else self.stem_pool

    @property
    def stem_window(self) -> tuple[int, int | Literal["SAME"]]:
        """Size and padding of the window of that pooling, where there is one."""
        size, sides = STEM_WINDOWS[self.stem_pooling]
        return size, padded(size, 2, self.padding, sides)

    @property
    def stem_padding_rule(self) -> str:
        """The padding of the stem's first convolution."""
        return self.padding if self.stem_padding is None else self.stem_padding

    @property
    def stem_reduction(self) -> int:
        """By how much the stem reduces height and width."""
        return math.prod(slot.stride for slot in self._stem_slots())

    @property
    def image_size(self) -> int:
        """Usual side of its images in pixels: 224 where the stem reduces them, else 32."""
        return 224 if self.stem_reduction > 1 else 32

    @property
    def stage_names(self) -> tuple[str, ...]:
        """``("stage1", ...)``."""
        return tuple(f"stage{i}" for i in range(1, len(self.depths) + 1))

    def blocks(self) -> Iterator[tuple[str, int, BlockConfig]]:
        """Stage name, index and configuration of every block, in forward order."""
        channels, dilation, shared = self.stem_width, 1, self.shared_options
        for number, (stage, depth, width) in enumerate(
            zip(self.stage_names, self.depths, self.widths, strict=True), start=1
        ):
            stride, before = (self.first_stride if number == 1 else 2), dilation
            if number in self.dilated_stages:
                dilation, stride = dilation * stride, 1
            out_channels = width * EXPANSION[self.block]
            if self.transition == "pooled":
                channels, stride = out_channels, 1
            shared |= {"out_channels": out_channels, "kind": self.block}
            first = others = _block(in_channels=channels, stride=stride, dilation=before, **shared)
            if depth > 1:
                others = _block(in_channels=out_channels, stride=1, dilation=dilation, **shared)
            yield from ((stage, index, others if index else first) for index in range(depth))
            channels = out_channels

    def transitions(self) -> dict[str, tuple[int, int, int]]:
        """By name, the channels in and out and the stride of what begins each stage."""
        if self.transition == "strided":
            return {}
        outputs = [width * EXPANSION[self.block] for width in self.widths]
        strides = self.first_stride, *[2] * (len(outputs) - 1)
        found = zip(pairwise((self.stem_width, *outputs)), strides, strict=True)
        return {f"transition{n}": (*ends, by) for n, (ends, by) in enumerate(found, start=1)}

    def slots(self) -> Iterator[Slot]:
        """Every slot in forward order."""
        yield from self._stem_slots()
        blocks, before = list(self.blocks()), self.transitions()
        for stage in self.stage_names:
            name = stage.replace("stage", "transition")
            if name in before:
                told = {"activation": self.activation, "bias": self.conv_bias}
                yield from pooled_conv(name, *before[name], **told, **self.layer_numbers)
            for _, index, block in (one for one in blocks if one[0] == stage):
                yield from block.slots(stage, index)
        head: dict[str, Any] = {"branch": Branch.HEAD}
        if self.ends_with_norm:
            its = {"norm": self.norm, "norm_groups": self.norm_groups, **head}
            yield norm_slot(
                "norm", None, "", self.feature_channels, activation=self.activation, **its
            )
        if self.num_classes is not None:
            head |= {"shape": (self.feature_channels, self.num_classes), "takes": self.head_pool}
            yield Slot("head", None, "", SlotKind.LINEAR, **head)

    def _stem_slots(self) -> Iterator[Slot]:
        where, deep = ("stem", None), self.stem == "deep"
        channels = (self.in_channels, *self.stem_hidden, self.stem_width)
        for i, ends in enumerate(pairwise(channels), start=1):
            conv, norm = (f"conv{i}", f"norm{i}") if deep else ("conv", "norm")
            bare = self.stem_is_bare and i == len(channels) - 1
            names = conv, None if bare else norm
            size, stride = 7 if self.stem == "imagenet" else 3, self.stem_striding if i == 1 else 1
            numbers: dict[str, Any] = {"stride": stride, "bias": self.stem_bias}
            numbers |= {"activation": self.activation, "branch": Branch.STEM, **self.layer_numbers}
            numbers["padding_rule"] = self.stem_padding_rule
            yield from normalised_conv(*where, names, size, ends, **numbers)
        if self.stem_pooling == "none":
            return
        size, sides = self.stem_window
        window: dict[str, Any] = {"shape": (size, size), "branch": Branch.STEM, "padding": sides}
        if self.antialias == "blur":
            yield Slot(*where, "pool.pool", SlotKind.MAX_POOL, **window)
            yield Slot(*where, "pool.blur", SlotKind.BLUR, stride=2, **window)
            yield Slot(*where, "pool", SlotKind.OUTPUT, branch=Branch.STEM)
        else:
            yield Slot(*where, "pool", SlotKind.MAX_POOL, stride=2, **window)


Config = ResNetConfig | BlockConfig


def walk(config: Config) -> Iterator[Slot]:
    """Every slot of a network or of a bare block, in forward order."""
    return config.slots()
