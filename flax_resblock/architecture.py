"""What a residual network is, as data: its configuration, the table of named architectures, and the walk over every slot.

What a slot and a block are is in :mod:`flax_resblock.block_config`, whose names are to be had here too. This module knows no array and no framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Literal

from flax_resblock.block_config import (
    EXPANSION,
    Antialias,
    Attention,
    BlockConfig,
    BlockKind,
    Kind,
    Path,
    Shortcut,
    Slot,
    StridePlacement,
)

__all__ = [
    "ARCHITECTURES",
    "EXPANSION",
    "BlockConfig",
    "Config",
    "Kind",
    "Path",
    "ResNetConfig",
    "Shortcut",
    "Slot",
    "Stem",
    "StridePlacement",
    "architecture",
    "architectures",
    "from_json",
    "name_of",
    "to_json",
    "walk",
]
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
      stem: ``"imagenet"``: 7x7 convolution of stride 2 and 3x3 max pooling of stride 2; ``"deep"``: three 3x3 convolutions, the first of stride 2, and the
        same pooling; ``"cifar"``: 3x3 convolution of stride 1.
      stem_width: Channels of the stem.
      stem_hidden: Channels of the first two convolutions of a deep stem; ``()`` for the others.
      first_stride: Stride of the first stage; that of the others is 2.
      shortcut, stride_on, groups, base_width, attention, attention_ratio: See :class:`BlockConfig`.
      antialias: See :class:`BlockConfig`; a blur also carries the stride of the stem's pooling.
      dilated_stages: Stages (from 1) whose stride is replaced by dilation, torchvision's ``replace_stride_with_dilation``.
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
            raise ValueError(f"depths={self.depths} and widths={self.widths} must name the same stages, at least one.")
        classes = () if self.num_classes is None else (self.num_classes,)
        for field in (*self.depths, *self.widths, *self.stem_hidden, self.stem_width, self.in_channels, *classes):
            if not isinstance(field, int) or field < 1:
                raise ValueError(f"depths, widths, stem_width, in_channels and num_classes must be positive integers; got {field!r} in {self}.")
        if self.block not in EXPANSION:
            raise ValueError(f"block {self.block!r} is unknown; choose 'basic' or 'bottleneck'.")
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths={self.depths} are more than {MOST_BLOCKS:,} blocks.")
        if self.stem not in ("imagenet", "deep", "cifar"):
            raise ValueError(f"stem {self.stem!r} is unknown; choose 'imagenet', 'deep' or 'cifar'.")
        if len(self.stem_hidden) != (2 if self.stem == "deep" else 0):
            raise ValueError(f"stem_hidden={self.stem_hidden} must give the channels of two convolutions for a deep stem, and none for another.")
        if self.first_stride not in (1, 2):
            raise ValueError(f"first_stride={self.first_stride!r} must be 1 or 2.")
        if not set(self.dilated_stages) <= set(range(2, len(self.depths) + 1)):
            raise ValueError(f"dilated_stages={self.dilated_stages} must be among 2..{len(self.depths)}; stage 1 has no stride to replace.")
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
        for number, (stage, depth, width) in enumerate(zip(self.stage_names, self.depths, self.widths, strict=True), start=1):
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
                yield Slot("stem", None, f"conv{i}", Kind.CONV, (3, 3, channels[i - 1], channels[i]))
                yield Slot("stem", None, f"norm{i}", Kind.NORM, (channels[i],))
        else:
            size = 7 if self.stem == "imagenet" else 3
            yield Slot("stem", None, "conv", Kind.CONV, (size, size, self.in_channels, self.stem_width))
            yield Slot("stem", None, "norm", Kind.NORM, (self.stem_width,))
        if self.stem != "cifar":
            yield Slot("stem", None, "pool", Kind.ACTIVATION)
        for stage, index, block in self.blocks():
            yield from block.slots(stage, index)
        if self.num_classes is not None:
            yield Slot("head", None, "", Kind.LINEAR, (self.feature_channels, self.num_classes))


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


def _bottleneck(depths: tuple[int, ...], **changes: object) -> ResNetConfig:
    return ResNetConfig(block="bottleneck", depths=depths, **changes)  # pyright: ignore[reportArgumentType]


def _he_cifar(blocks_per_stage: int) -> ResNetConfig:
    """Section 4.2 of He et al. 2016: ``6n + 2`` layers, option-A shortcuts."""
    return ResNetConfig(depths=(blocks_per_stage,) * 3, widths=(16, 32, 64), stem="cifar", stem_width=16, shortcut="zero_pad", num_classes=10)


def _cifar_stem(config: ResNetConfig) -> ResNetConfig:
    return replace(config, stem="cifar", num_classes=10)


def _timm(config: ResNetConfig, variant: str = "", attention: Attention = "none", antialias: Antialias = "none") -> ResNetConfig:
    """timm's variants: the letters of :data:`_VARIANTS`, attention in every block, blurred strides."""
    return replace(config, **_VARIANTS[variant], attention=attention, antialias=antialias)


_DEEP, _TIERED = (32, 32), (24, 32)
_VARIANTS: Mapping[str, dict[str, object]] = MappingProxyType(
    {
        "": {},
        "c": {"stem": "deep", "stem_hidden": _DEEP},
        "d": {"stem": "deep", "stem_hidden": _DEEP, "shortcut": "pooled"},
        "t": {"stem": "deep", "stem_hidden": _TIERED, "shortcut": "pooled"},
        "s": {"stem": "deep", "stem_hidden": (64, 64), "stem_width": 128},
    }
)
"""The letters behind timm's and Gluon's names: which stem, and whether shortcuts pool."""

_RESNET18 = ResNetConfig()
_RESNET34 = ResNetConfig(depths=(3, 4, 6, 3))
_RESNET50 = _bottleneck((3, 4, 6, 3))

_RESNET101, _RESNET152 = _bottleneck((3, 4, 23, 3)), _bottleneck((3, 8, 36, 3))
_RESNET26 = _bottleneck((2, 2, 2, 2))
_RESNEXT50 = _bottleneck((3, 4, 6, 3), groups=32, base_width=4)

ARCHITECTURES: Mapping[str, ResNetConfig] = MappingProxyType(
    {
        "resnet18": _RESNET18,
        "resnet34": _RESNET34,
        "resnet50": _RESNET50,
        "resnet101": _RESNET101,
        "resnet152": _RESNET152,
        "resnext50_32x4d": _RESNEXT50,
        "resnext101_32x8d": _bottleneck((3, 4, 23, 3), groups=32, base_width=8),
        "resnext101_64x4d": _bottleneck((3, 4, 23, 3), groups=64, base_width=4),
        "wide_resnet50_2": _bottleneck((3, 4, 6, 3), base_width=128),
        "wide_resnet101_2": _bottleneck((3, 4, 23, 3), base_width=128),
        "resnet20": _he_cifar(3),
        "resnet32": _he_cifar(5),
        "resnet44": _he_cifar(7),
        "resnet56": _he_cifar(9),
        "resnet110": _he_cifar(18),
        "resnet18_cifar": _cifar_stem(_RESNET18),
        "resnet34_cifar": _cifar_stem(_RESNET34),
        "resnet50_cifar": _cifar_stem(_RESNET50),
        "resnet50_caffe": replace(_RESNET50, stride_on="1x1"),
        "resnet101_caffe": replace(_RESNET101, stride_on="1x1"),
        "resnet152_caffe": replace(_RESNET152, stride_on="1x1"),
        "resnet10t": _timm(ResNetConfig(depths=(1, 1, 1, 1)), "t"),
        "resnet14t": _timm(_bottleneck((1, 1, 1, 1)), "t"),
        "resnet18d": _timm(_RESNET18, "d"),
        "resnet26": _RESNET26,
        "resnet26d": _timm(_RESNET26, "d"),
        "resnet26t": _timm(_RESNET26, "t"),
        "resnet34d": _timm(_RESNET34, "d"),
        "resnet50c": _timm(_RESNET50, "c"),
        "resnet50d": _timm(_RESNET50, "d"),
        "resnet50s": _timm(_RESNET50, "s"),
        "resnet50t": _timm(_RESNET50, "t"),
        "resnet101c": _timm(_RESNET101, "c"),
        "resnet101d": _timm(_RESNET101, "d"),
        "resnet101s": _timm(_RESNET101, "s"),
        "resnet152c": _timm(_RESNET152, "c"),
        "resnet152d": _timm(_RESNET152, "d"),
        "resnet152s": _timm(_RESNET152, "s"),
        "resnet200d": _timm(_bottleneck((3, 24, 36, 3)), "d"),
        "resnext50d_32x4d": _timm(_RESNEXT50, "d"),
        "resnext101_32x4d": _bottleneck((3, 4, 23, 3), groups=32, base_width=4),
        "seresnet18": _timm(_RESNET18, attention="se"),
        "seresnet34": _timm(_RESNET34, attention="se"),
        "seresnet50": _timm(_RESNET50, attention="se"),
        "seresnet50t": _timm(_RESNET50, "t", attention="se"),
        "seresnet101": _timm(_RESNET101, attention="se"),
        "seresnet152": _timm(_RESNET152, attention="se"),
        "seresnet152d": _timm(_RESNET152, "d", attention="se"),
        "seresnext50_32x4d": _timm(_RESNEXT50, attention="se"),
        "ecaresnet26t": _timm(_RESNET26, "t", attention="eca"),
        "ecaresnet50d": _timm(_RESNET50, "d", attention="eca"),
        "ecaresnet50t": _timm(_RESNET50, "t", attention="eca"),
        "ecaresnet101d": _timm(_RESNET101, "d", attention="eca"),
        "resnetblur18": _timm(_RESNET18, antialias="blur"),
        "resnetblur50": _timm(_RESNET50, antialias="blur"),
        "resnetblur50d": _timm(_RESNET50, "d", antialias="blur"),
        "resnetblur101d": _timm(_RESNET101, "d", antialias="blur"),
    }
)
"""Torchvision's ten; the CIFAR networks of He et al. 2016 (arXiv:1512.03385), and ImageNet networks with the CIFAR stem; Caffe's; timm's."""


def architectures() -> tuple[str, ...]:
    """Names that :func:`architecture` and ``flax_resblock.create`` accept."""
    return tuple(ARCHITECTURES)


def architecture(name: str, **changes: object) -> ResNetConfig:
    """The named architecture with fields of :class:`ResNetConfig` replaced.

    Raises:
      ValueError: An unknown name (the message lists the known ones), or values that make no network.
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name!r} is unknown; known: {', '.join(ARCHITECTURES)}.")
    return replace(ARCHITECTURES[name], **changes)  # pyright: ignore[reportArgumentType]


def name_of(config: Config) -> str:
    """The architecture's name where the table has it (any number of classes and input channels), else a short description."""
    if isinstance(config, BlockConfig):
        return f"{config.kind} block {config.in_channels}->{config.out_channels}, stride {config.stride}"
    for name, known in ARCHITECTURES.items():
        if replace(known, num_classes=config.num_classes, in_channels=config.in_channels) == config:
            return name
    attention = "" if config.attention == "none" else f", {config.attention} attention"
    return f"custom {config.block} ResNet, depths {config.depths}, widths {config.widths}, {config.stem} stem, {config.shortcut} shortcuts{attention}"
