"""What a residual network is, as data: its configuration, the table of named architectures, and the walk over every slot.

A *slot* is one place in the network that has parameters or an activation worth comparing: ``stage1.0.conv1``, ``head``. Both frameworks, the converter
and the verifier speak of slots; this module knows no array and no framework.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from types import MappingProxyType
from typing import Literal

BlockKind = Literal["basic", "bottleneck"]
Shortcut = Literal["projection", "zero_pad"]
StridePlacement = Literal["3x3", "1x1"]
Stem = Literal["imagenet", "cifar"]
Path = tuple[str | int, ...]

MOST_BLOCKS = 10_000
"""Of a network; a configuration in a file may say any number."""

EXPANSION: Mapping[str, int] = MappingProxyType({"basic": 1, "bottleneck": 4})


class Kind(Enum):
    """What a slot holds; decides which tensors belong to it."""

    CONV = "conv"
    NORM = "norm"
    LINEAR = "linear"
    ACTIVATION = "activation"


@dataclass(frozen=True)
class Slot:
    """One place of a network.

    Attributes:
      stage: ``"stem"``, ``"stage1"`` ..., ``"head"``, or ``""`` in a bare block.
      block: Index of the block within its stage; None outside the stages.
      role: Dotted place within the block or stem, ``"conv1"``, ``"shortcut.norm"``; ``""`` is the whole.
      kind: What it holds.
      shape: Shape of its kernel ``(kh, kw, I // groups, O)`` or ``(in, out)``, or ``(C,)`` of a norm; ``()`` for an activation.
    """

    stage: str
    block: int | None
    role: str
    kind: Kind
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


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One residual block.

    Attributes:
      in_channels, out_channels: Channels of its input and output.
      kind: ``"basic"``: two 3x3 convolutions; ``"bottleneck"``: 1x1, 3x3, 1x1 with ``out_channels / 4`` planes.
      stride: Of the block; 1 keeps the resolution.
      dilation: Of the 3x3 convolutions.
      groups, base_width: As in torchvision: the inner width is ``int(planes * base_width / 64) * groups``; a basic block takes groups only.
      shortcut: Where stride or channels change: ``"projection"`` is a 1x1 convolution and a norm; ``"zero_pad"`` is option A of He et al. 2016, a
        strided slice with zero channels added on both sides.
      stride_on: Which convolution of a bottleneck carries the stride: ``"3x3"`` as torchvision, ``"1x1"`` as Caffe and He et al.
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

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "stride", "dilation", "groups", "base_width"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{field}={value!r} must be a positive integer.")
        if self.kind not in EXPANSION:
            raise ValueError(f"block kind {self.kind!r} is unknown; choose 'basic' or 'bottleneck'.")
        if self.shortcut not in ("projection", "zero_pad"):
            raise ValueError(f"shortcut {self.shortcut!r} is unknown; choose 'projection' or 'zero_pad'.")
        if self.stride_on not in ("3x3", "1x1"):
            raise ValueError(f"stride_on={self.stride_on!r} is unknown; choose '3x3' or '1x1'.")
        if self.out_channels % EXPANSION[self.kind]:
            raise ValueError(f"a bottleneck has 4 output channels per plane; out_channels={self.out_channels} is not a multiple of 4.")
        if self.kind == "basic" and self.base_width != 64:
            raise ValueError(f"base_width={self.base_width} applies to bottlenecks; a basic block has none.")
        if self.kind == "basic" and (self.in_channels % self.groups or self.out_channels % self.groups):
            raise ValueError(f"groups={self.groups} must divide in_channels={self.in_channels} and out_channels={self.out_channels} of a basic block.")
        if self.inner_width < 1:
            raise ValueError(f"base_width={self.base_width} leaves a bottleneck of {self.planes} planes no inner channel.")
        if self.shortcut == "zero_pad" and self.out_channels < self.in_channels:
            raise ValueError(f"a zero_pad shortcut cannot reduce {self.in_channels} channels to {self.out_channels}.")

    @property
    def planes(self) -> int:
        """Channels before expansion, torchvision's ``planes``."""
        return self.out_channels // EXPANSION[self.kind]

    @property
    def inner_width(self) -> int:
        """Channels between the convolutions."""
        return self.planes if self.kind == "basic" else int(self.planes * self.base_width / 64) * self.groups

    @property
    def changes_shape(self) -> bool:
        """Whether the skip must change resolution or channels; decided by the numbers, not by the shapes that meet (1x1 inputs at stride 2)."""
        return self.stride != 1 or self.in_channels != self.out_channels

    @property
    def projects(self) -> bool:
        """Whether the skip has parameters."""
        return self.changes_shape and self.shortcut == "projection"

    def slots(self, stage: str = "", block: int | None = None) -> Iterator[Slot]:
        """The slots of this block in forward order; the block's own output comes last."""
        width, groups = self.inner_width, self.groups
        if self.kind == "basic":
            kernels = [(3, self.in_channels // groups, width), (3, width // groups, self.out_channels)]
        else:
            kernels = [(1, self.in_channels, width), (3, width // groups, width), (1, width, self.out_channels)]
        for i, (size, fan, out) in enumerate(kernels, start=1):
            yield Slot(stage, block, f"conv{i}", Kind.CONV, (size, size, fan, out))
            yield Slot(stage, block, f"norm{i}", Kind.NORM, (out,))
        if self.projects:
            yield Slot(stage, block, "shortcut.conv", Kind.CONV, (1, 1, self.in_channels, self.out_channels))
            yield Slot(stage, block, "shortcut.norm", Kind.NORM, (self.out_channels,))
        yield Slot(stage, block, "", Kind.ACTIVATION)


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """A residual network.

    Attributes:
      block: Kind of every block.
      depths: Blocks per stage.
      widths: Planes per stage (a bottleneck's output has four times as many channels).
      stem: ``"imagenet"``: 7x7 convolution of stride 2 and 3x3 max pooling of stride 2; ``"cifar"``: 3x3 convolution of stride 1.
      stem_width: Channels of the stem.
      shortcut, stride_on, groups, base_width: See :class:`BlockConfig`.
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
    shortcut: Shortcut = "projection"
    stride_on: StridePlacement = "3x3"
    groups: int = 1
    base_width: int = 64
    dilated_stages: tuple[int, ...] = ()
    in_channels: int = 3
    num_classes: int | None = 1000

    def __post_init__(self) -> None:
        for field in ("depths", "widths", "dilated_stages"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(f"depths={self.depths} and widths={self.widths} must name the same stages, at least one.")
        for field in (*self.depths, *self.widths, self.stem_width, self.in_channels, *((self.num_classes,) if self.num_classes is not None else ())):
            if not isinstance(field, int) or field < 1:
                raise ValueError(f"depths, widths, stem_width, in_channels and num_classes must be positive integers; got {field!r} in {self}.")
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem {self.stem!r} is unknown; choose 'imagenet' or 'cifar'.")
        if self.block not in EXPANSION:
            raise ValueError(f"block {self.block!r} is unknown; choose 'basic' or 'bottleneck'.")
        if sum(self.depths) > MOST_BLOCKS:
            raise ValueError(f"depths={self.depths} are more than {MOST_BLOCKS:,} blocks.")
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
            stride, previous_dilation = (1 if number == 1 else 2), dilation
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
                )
                yield stage, index, config
                channels = config.out_channels

    def slots(self) -> Iterator[Slot]:
        """Every slot in forward order."""
        size = 7 if self.stem == "imagenet" else 3
        yield Slot("stem", None, "conv", Kind.CONV, (size, size, self.in_channels, self.stem_width))
        yield Slot("stem", None, "norm", Kind.NORM, (self.stem_width,))
        if self.stem == "imagenet":
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


def _bottleneck(depths: tuple[int, ...], **changes: int) -> ResNetConfig:
    return ResNetConfig(block="bottleneck", depths=depths, **changes)  # pyright: ignore[reportArgumentType]


def _he_cifar(blocks_per_stage: int) -> ResNetConfig:
    """Section 4.2 of He et al. 2016: ``6n + 2`` layers, option-A shortcuts."""
    return ResNetConfig(depths=(blocks_per_stage,) * 3, widths=(16, 32, 64), stem="cifar", stem_width=16, shortcut="zero_pad", num_classes=10)


def _cifar_stem(config: ResNetConfig) -> ResNetConfig:
    return replace(config, stem="cifar", num_classes=10)


_RESNET18 = ResNetConfig()
_RESNET34 = ResNetConfig(depths=(3, 4, 6, 3))
_RESNET50 = _bottleneck((3, 4, 6, 3))

ARCHITECTURES: Mapping[str, ResNetConfig] = MappingProxyType(
    {
        "resnet18": _RESNET18,
        "resnet34": _RESNET34,
        "resnet50": _RESNET50,
        "resnet101": _bottleneck((3, 4, 23, 3)),
        "resnet152": _bottleneck((3, 8, 36, 3)),
        "resnext50_32x4d": _bottleneck((3, 4, 6, 3), groups=32, base_width=4),
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
    }
)
"""Torchvision's ten, the CIFAR networks of He et al. 2016 (arXiv:1512.03385), and ImageNet networks with the CIFAR stem."""


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
    return f"custom {config.block} ResNet, depths {config.depths}, widths {config.widths}, {config.stem} stem, {config.shortcut} shortcuts"
