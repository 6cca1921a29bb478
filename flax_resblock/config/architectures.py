"""The table of named architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from flax_resblock.config.block import BlockConfig
from flax_resblock.config.network import Config, ResNetConfig
from flax_resblock.config.options import Antialias, Attention


def _bottleneck(depths: tuple[int, ...], **changes: object) -> ResNetConfig:
    return ResNetConfig(block="bottleneck", depths=depths, **changes)  # pyright: ignore[reportArgumentType]


def _he_cifar(blocks_per_stage: int) -> ResNetConfig:
    """Section 4.2 of He et al. 2016: ``6n + 2`` layers, option-A shortcuts."""
    return ResNetConfig(
        depths=(blocks_per_stage,) * 3,
        widths=(16, 32, 64),
        stem="cifar",
        stem_width=16,
        shortcut="zero_pad",
        num_classes=10,
    )


def _wide(depth: int, factor: int) -> ResNetConfig:
    """WRN-depth-factor (Zagoruyko & Komodakis 2016)."""
    widths = (16 * factor, 32 * factor, 64 * factor)
    return replace(_he_cifar((depth - 4) // 6), widths=widths, **_PREACTIVATED)


def _bit(config: ResNetConfig, factor: int) -> ResNetConfig:
    """Big Transfer (Kolesnikov et al. 2020, arXiv:1912.11370)."""
    return replace(
        config,
        widths=tuple(factor * width for width in config.widths),
        stem_width=64 * factor,
        stem_pool="3x3_zeros",
        order="pre_activation",
        norm="group",
        standardized=True,
    )


def _cifar_stem(config: ResNetConfig) -> ResNetConfig:
    return replace(config, stem="cifar", num_classes=10)


def _timm(
    config: ResNetConfig,
    variant: str = "",
    attention: Attention = "none",
    antialias: Antialias = "none",
) -> ResNetConfig:
    """timm's variants: the letters of :data:`_VARIANTS`, attention, blurred strides."""
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

_PREACTIVATED: Mapping[str, Any] = MappingProxyType(
    {"order": "pre_activation", "shortcut": "projection"}
)
_BARE: Mapping[str, Any] = MappingProxyType({"order": "pre_activation", "final_norm": False})
"""The CIFAR networks that end without norm and activation, as in kuangliu's code."""
_RESNET18 = ResNetConfig()
_RESNET34 = ResNetConfig(depths=(3, 4, 6, 3))
_RESNET50 = _bottleneck((3, 4, 6, 3))
_RESNET9 = ResNetConfig(
    depths=(1, 0, 1),
    widths=(128, 256, 512),
    stem="cifar",
    stem_bias=True,
    conv_bias=True,
    transition="pooled",
    first_stride=2,
    branch_activation=True,
    last_activation=False,
    head_pool="max",
    num_classes=10,
)
"""As its tutorials write it, with biases, after David Page's for DAWNBench."""
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
        "resnet50_gn": replace(_RESNET50, norm="group"),
        "resnetv2_18": replace(_RESNET18, order="pre_activation"),
        "resnetv2_34": replace(_RESNET34, order="pre_activation"),
        "resnetv2_50": replace(_RESNET50, order="pre_activation"),
        "resnetv2_101": replace(_RESNET101, order="pre_activation"),
        "resnetv2_152": replace(_RESNET152, order="pre_activation"),
        "resnetv2_18d": replace(_timm(_RESNET18, "d"), order="pre_activation"),
        "resnetv2_34d": replace(_timm(_RESNET34, "d"), order="pre_activation"),
        "resnetv2_50d": replace(_timm(_RESNET50, "d"), order="pre_activation"),
        "resnetv2_50t": replace(_timm(_RESNET50, "t"), order="pre_activation"),
        "resnetv2_101d": replace(_timm(_RESNET101, "d"), order="pre_activation"),
        "resnetv2_152d": replace(_timm(_RESNET152, "d"), order="pre_activation"),
        "resnetv2_50d_gn": replace(_timm(_RESNET50, "d"), order="pre_activation", norm="group"),
        "resnetv2_50x1_bit": _bit(_RESNET50, 1),
        "resnetv2_50x3_bit": _bit(_RESNET50, 3),
        "resnetv2_101x1_bit": _bit(_RESNET101, 1),
        "preact_resnet18": replace(_cifar_stem(_RESNET18), **_BARE),
        "preact_resnet34": replace(_cifar_stem(_RESNET34), **_BARE),
        "preact_resnet50": replace(_cifar_stem(_RESNET50), **_BARE),
        "preact_resnet101": replace(_cifar_stem(_RESNET101), **_BARE),
        "preresnet20": replace(_he_cifar(3), **_PREACTIVATED),
        "preresnet56": replace(_he_cifar(9), **_PREACTIVATED),
        "preresnet110": replace(_he_cifar(18), **_PREACTIVATED),
        "preresnet164": replace(_he_cifar(18), block="bottleneck", **_PREACTIVATED),
        "wrn_16_4": _wide(16, 4),
        "wrn_28_10": _wide(28, 10),
        "wrn_40_2": _wide(40, 2),
        "resnet9": _RESNET9,
    }
)
"""Torchvision's; CIFAR's of He et al. 2016, and ImageNet's with that stem; Caffe's; timm's; CIFAR's
of He et al. 2016b and Zagoruyko & Komodakis 2016, and the fast one of DAWNBench."""


def unknown_architecture(name: str) -> str:
    """A sentence on a name that is none of :data:`ARCHITECTURES`, and what to do."""
    return f"architecture {name!r} is unknown; known: {', '.join(ARCHITECTURES)}."


def architectures() -> tuple[str, ...]:
    """Names that :func:`architecture` and ``flax_resblock.create`` accept."""
    return tuple(ARCHITECTURES)


def architecture(name: str, **changes: object) -> ResNetConfig:
    """The named architecture with fields of :class:`ResNetConfig` replaced; raises ValueError for
    an unknown name (the message lists the known ones), or values that make no network."""
    if name not in ARCHITECTURES:
        raise ValueError(unknown_architecture(name))
    return replace(ARCHITECTURES[name], **changes)  # pyright: ignore[reportArgumentType]


def named_alike(config: ResNetConfig) -> str | None:
    """The architecture that a network is, but for its classes and input channels; None for none."""
    size = config.depths, config.widths
    same = {"num_classes": config.num_classes, "in_channels": config.in_channels}
    for name, known in ARCHITECTURES.items():
        # Sizes first: every configuration that is made checks all of its blocks.
        if (known.depths, known.widths) == size and replace(known, **same) == config:
            return name
    return None


def name_of(config: Config) -> str:
    """The architecture's name, whatever its classes and input channels, or a short description."""
    if isinstance(config, BlockConfig):
        return (
            f"{config.kind} block {config.in_channels}->{config.out_channels}, stride "
            f"{config.stride}{_others(config)}"
        )
    if (name := named_alike(as_in_pytorch(config))) is not None:
        return f"{name}{_padding(config)}"
    attention = "" if config.attention == "none" else f", {config.attention} attention"
    return (
        f"custom {config.block} ResNet, depths {config.depths}, widths {config.widths}, "
        f"{config.stem} stem, {config.shortcut} shortcuts{attention}{_others(config)}"
    )


def _others(config: Config) -> str:
    """The options that have no words of their own above, where they are not the usual ones."""
    words = [] if config.activation == "relu" else [config.activation]
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name not in _SAID or value == field.default or value is None:
            continue
        said = field.name.replace("_", " ").replace("pool", "pooling")
        alone = {True: field.name, False: f"no {said}"}
        words.append(alone[value] if isinstance(value, bool) else f"{said} {value}")
    words = [_SHORTER.get(one, one) for one in words]
    return "".join(f", {one}" for one in words) + _padding(config)


def _padding(config: Config) -> str:
    """How strided windows pad, where it is not as in PyTorch."""
    words = f", padding {config.padding}" if config.padding != "symmetric" else ""
    stem = getattr(config, "stem_padding", None)
    return words if stem is None else f"{words}, stem padding {stem}"


def as_in_pytorch(config: ResNetConfig) -> ResNetConfig:
    """The same network with strided windows that pad as many pixels on each side."""
    return replace(config, padding="symmetric", stem_padding=None)


_SAID = {
    *("stem_stride", "stem_pool", "stem_bias", "stem_norm", "conv_bias", "shortcut_bias", "order"),
    *("shortcut_from", "shortcut_size", "norm", "standardized", "last_activation", "final_norm"),
    *("head_pool", "dropout", "attention_place", "branch_activation", "transition"),
}
_SHORTER = {
    "order pre_activation": "pre-activation",
    "norm group": "group norm",
    "norm frozen": "frozen norms",
}
