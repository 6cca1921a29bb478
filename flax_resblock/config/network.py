"""The configuration of a whole network: its stem, stages and head, and the walk over its slots."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from flax_resblock.config.block import (
    EXPANSION,
    Antialias,
    Attention,
    BlockConfig,
    BlockKind,
    Shortcut,
    Slot,
    SlotKind,
    StridePlacement,
)

MOST_BLOCKS = 10_000
"""Of a network; a configuration in a file may say any number."""


Stem = Literal["imagenet", "deep", "cifar"]


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A residual network.

    Attributes:
      block: Kind of every block.
      depths: Blocks per stage.
      widths: Planes per stage (a bottleneck's output has four times as many channels).
      stem: ``"imagenet"``: 7x7 convolution of stride 2 and 3x3 max pooling of stride 2; ``"deep"``:
        three 3x3 convolutions, the first of stride 2, and the same pooling; ``"cifar"``: 3x3
        convolution of stride 1.
      stem_width: Channels of the stem.
      stem_hidden: Channels of the first two convolutions of a deep stem; ``()`` for the others.
      first_stride: Stride of the first stage; that of the others is 2.
      shortcut, stride_on, groups, base_width, attention, attention_ratio: See :class:`BlockConfig`.
      antialias: See :class:`BlockConfig`; a blur also carries the stride of the stem's pooling.
      dilated_stages: Stages (from 1) whose stride is replaced by dilation, torchvision's
        ``replace_stride_with_dilation``.
      in_channels: Channels of the images.
      num_classes: Size of the logits; None: no head, the network returns pooled features.
    Raises:
      ValueError: Numbers that make no network.
    """

    block: BlockKind = "basic"
    depths: tuple[int, ...] = (2, 2, 2, 2)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: Stem = "imagenet"
    stem_width: int = 64
    stem_hidden: tuple[int, ...] = ()
    first_stride: int = 1
    shortcut: Shortcut = "projection"
    stride_on: StridePlacement = "3x3"
    attention: Attention = "none"
    attention_ratio: float = 1 / 16
    antialias: Antialias = "none"
    groups: int = 1
    base_width: int = 64
    dilated_stages: tuple[int, ...] = ()
    in_channels: int = 3
    num_classes: int | None = 1000

    def __post_init__(self) -> None:
        for field in ("depths", "widths", "stem_hidden", "dilated_stages"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(
                f"depths={self.depths} and widths={self.widths} must name the same stages, at "
                f"least one."
            )
        classes = () if self.num_classes is None else (self.num_classes,)
        for field in (
            *self.depths,
            *self.widths,
            *self.stem_hidden,
            self.stem_width,
            self.in_channels,
            *classes,
        ):
            if not isinstance(field, int) or field < 1:
                raise ValueError(
                    f"depths, widths, stem_width, in_channels and num_classes must be positive "
                    f"integers; got {field!r} in {self}."
                )
        if self.block not in EXPANSION:
            raise ValueError(f"block {self.block!r} is unknown; choose 'basic' or 'bottleneck'.")
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths={self.depths} are more than {MOST_BLOCKS:,} blocks.")
        if self.stem not in ("imagenet", "deep", "cifar"):
            raise ValueError(
                f"stem {self.stem!r} is unknown; choose 'imagenet', 'deep' or 'cifar'."
            )
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
        for _ in self.blocks():  # every block checks itself
            pass

    @property
    def feature_channels(self) -> int:
        """Channels of the last stage's output."""
        return self.widths[-1] * EXPANSION[self.block]

    @property
    def stage_names(self) -> tuple[str, ...]:
        """``("stage1", ...)``."""
        return tuple(f"stage{i}" for i in range(1, len(self.depths) + 1))

    def blocks(self) -> Iterator[tuple[str, int, BlockConfig]]:
        """Stage name, index and configuration of every block, in forward order."""
        channels, dilation = self.stem_width, 1
        for number, (stage, depth, width) in enumerate(
            zip(self.stage_names, self.depths, self.widths, strict=True), start=1
        ):
            stride, previous_dilation = (self.first_stride if number == 1 else 2), dilation
            if number in self.dilated_stages:
                dilation, stride = dilation * stride, 1
            for index in range(depth):
                config = BlockConfig(
                    in_channels=channels,
                    out_channels=width * EXPANSION[self.block],
                    kind=self.block,
                    stride=stride if index == 0 else 1,
                    dilation=previous_dilation if index == 0 else dilation,
                    groups=self.groups,
                    base_width=self.base_width,
                    shortcut=self.shortcut,
                    stride_on=self.stride_on,
                    attention=self.attention,
                    attention_ratio=self.attention_ratio,
                    antialias=self.antialias,
                )
                yield stage, index, config
                channels = config.out_channels

    def slots(self) -> Iterator[Slot]:
        """Every slot in forward order."""
        if self.stem == "deep":
            channels = (self.in_channels, *self.stem_hidden, self.stem_width)
            for i in (1, 2, 3):
                yield Slot(
                    "stem", None, f"conv{i}", SlotKind.CONV, (3, 3, channels[i - 1], channels[i])
                )
                yield Slot("stem", None, f"norm{i}", SlotKind.NORM, (channels[i],))
        else:
            size = 7 if self.stem == "imagenet" else 3
            yield Slot(
                "stem", None, "conv", SlotKind.CONV, (size, size, self.in_channels, self.stem_width)
            )
            yield Slot("stem", None, "norm", SlotKind.NORM, (self.stem_width,))
        if self.stem != "cifar":
            yield Slot("stem", None, "pool", SlotKind.ACTIVATION)
        for stage, index, block in self.blocks():
            yield from block.slots(stage, index)
        if self.num_classes is not None:
            yield Slot("head", None, "", SlotKind.LINEAR, (self.feature_channels, self.num_classes))


Config = ResNetConfig | BlockConfig


def to_json(config: Config) -> str:
    """A JSON object that :func:`from_json` turns back into ``config``."""
    return json.dumps({"type": type(config).__name__, **asdict(config)})


def from_json(text: str) -> Config:
    """The configuration that :func:`to_json` wrote.

    Raises:
      ValueError: Anything else.
    """
    fields = json.loads(text)
    types = {"ResNetConfig": ResNetConfig, "BlockConfig": BlockConfig}
    if not isinstance(fields, dict) or fields.get("type") not in types:
        raise ValueError("not a configuration of a residual network")
    config = types[fields.pop("type")]
    try:
        return config(**fields)
    except TypeError as error:
        raise ValueError(str(error)) from error


def walk(config: Config) -> Iterator[Slot]:
    """Every slot of a network or of a bare block, in forward order."""
    return config.slots()
