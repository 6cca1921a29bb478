"""The naming schemes that are known, as data: a new scheme is a new row of :data:`NAMINGS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from flax_resblock.config import Branch, SlotKind
from flax_resblock.convert.codecs import OIHW_HWIO, PIXEL
from flax_resblock.convert.jax_namings import JAX_NAMINGS
from flax_resblock.convert.naming import FLAX_TENSORS, TORCH_TENSORS, Naming, Tensor, numbered
from flax_resblock.errors import InputError

_RESIDUAL = numbered("conv{}", "bn{}", first=1)
_STEM = {
    "stem.conv": "conv1",
    "stem.norm": "bn1",
    "stem.pool": "maxpool",
    "stem.pool.pool": "maxpool.0",
    "stem.pool.blur": "maxpool.1",
}
_DOWNSAMPLE = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_SHORTCUT = {"shortcut.conv": "shortcut.0", "shortcut.norm": "shortcut.1"}
_POOLED = {
    "shortcut.pool": "downsample.0",
    "shortcut.projection.conv": "downsample.1",
    "shortcut.projection.norm": "downsample.2",
}
_ATTENTION = {
    "attention": "se",
    "attention.reduce": "se.fc1",
    "attention.expand": "se.fc2",
    "attention.conv": "se.conv",
    "blur": "aa",
}


def _stem_sequence(name: str, last_norm: str) -> dict[str, str]:
    """A deep stem as one ``nn.Sequential``; the last norm may stand outside."""
    convs = {f"stem.conv{i + 1}": f"{name}.{3 * i}" for i in range(3)}
    norms = {f"stem.norm{i + 1}": f"{name}.{3 * i + 1}" for i in range(3)}
    return convs | norms | {"stem.norm3": last_norm}


_SQUEEZE = "attention.reduce", "attention.expand"


def _squeeze(*layers: str) -> dict[str, str]:
    """The two layers of squeeze-and-excitation."""
    return dict(zip(_SQUEEZE, layers, strict=True))


def _transitions(name: str, behind: int = 0) -> dict[str, str]:
    """The sequences that begin stages with pooling, numbered on from ``behind``."""
    layers = {"conv": 0, "norm": 1, "pool": 3}
    return {
        f"transition{stage}.{layer}": f"{name}{stage + behind}.{index}"
        for stage in range(1, _MOST_TRANSITIONS + 1)
        for layer, index in layers.items()
    }


_MOST_TRANSITIONS = 6
_SE_LAYER = _squeeze("se_layer.conv1.conv", "se_layer.conv2.conv")
_TORCHVISION = (
    _STEM | _stem_sequence("conv1", "bn1") | _RESIDUAL | _DOWNSAMPLE | _POOLED | _ATTENTION
    | {"norm": "bn"} | _transitions("transition")
)  # fmt: skip
_OWN = ("norm", *_transitions(""))
"""Places that no network of torchvision or timm under these names has."""
_SEQUENTIAL = {
    **{f"conv{i + 1}": f"block.{3 * i}" for i in range(3)},
    **{f"norm{i + 1}": f"block.{3 * i + 1}" for i in range(3)},
    "shortcut.conv": "skip.0",
    "shortcut.norm": "skip.1",
}
_WIDE = {"stem.conv": "conv1", "norm": "bn1", **_RESIDUAL}
_ZAGORUYKO = numbered("conv{}", "bn{}")
_ZAGORUYKO |= {"stem.conv": "conv0", "shortcut.conv": "convdim", "norm": "bn", "head": "fc"}
_KERNELS = {SlotKind.CONV: (Tensor("kernel", "", OIHW_HWIO),)}
"""Of code without modules: a kernel has the name of its layer."""
_TIMM_V2 = {
    "stem.pool": "stem.pool",
    **numbered("conv{}", "norm{}", first=1),
    "norm": "norm",
    "head": "head.fc",
}
_TIMM_V2_D = {f"stem.{kind}{i}": f"stem.{kind}{i}" for kind in ("conv", "norm") for i in (1, 2, 3)}
_TIMM_V2_D |= {"shortcut.pool": "downsample.pool", "shortcut.projection.conv": "downsample.conv"}
"""Its deep stems come with shortcuts that pool, whose convolution is called as any other's."""
_PIXELWISE = {SlotKind.LINEAR: (Tensor("kernel", "weight", PIXEL), Tensor("bias", "bias"))}
"""Of a head that is a convolution of one pixel."""
_INPUT = {"shortcut_from": "input"}
_CHILDREN = {"stem.conv": "0", "stem.norm": "1", "stem.pool": "3"}
_DETECTRON2 = {
    "stem.conv": "stem.conv1",
    "stem.norm": "stem.conv1.norm",
    "head": "linear",
    **numbered("conv{}", "conv{}.norm", first=1),
    "shortcut.conv": "shortcut",
    "shortcut.norm": "shortcut.norm",
}


def _huggingface(prefix: str) -> dict[str, str]:
    """``ResNetModel`` in transformers: every convolution and its norm in a module of their own."""
    stem = {
        "stem.conv": "embedder.embedder.convolution",
        "stem.norm": "embedder.embedder.normalization",
        "stem.pool": "embedder.pooler",
    }
    main = numbered("layer.{}.convolution", "layer.{}.normalization")
    skip = {"shortcut.conv": "shortcut.convolution", "shortcut.norm": "shortcut.normalization"}
    return {place: prefix + name for place, name in stem.items()} | main | skip


def _timm_v2(
    name: str, own: dict[str, str], origin: str, assumes: Mapping[str, Any] = MappingProxyType({})
) -> Naming:
    fields = {"tensors": {**TORCH_TENSORS, **_PIXELWISE}, "assumes": assumes, "first_stage": 0}
    parts = Branch.SHORTCUT, Branch.MAIN, Branch.ATTENTION
    names = name, "stages.{stage}.blocks.{block}", _TIMM_V2 | own, origin
    return Naming(*names, hub="timm", parts=parts, **fields)


_FLAX_PLACES = (*_TORCHVISION, "head")
_DEEP_STEM = _stem_sequence("stem", "stem.7")
_OPENMMLAB = {place: f"backbone.{name}" for place, name in (_STEM | _DEEP_STEM).items()}


def _resnet9(name: str, head: str, note: str = "") -> Naming:
    """The ResNet-9 of tutorials: ``res1`` and on are what is added, in every second stage."""
    modules = {"stem.conv": "conv1.0", "stem.norm": "conv1.1", **_transitions("conv", 1)}
    modules |= {"conv1": "0.0", "norm1": "0.1", "conv2": "1.0", "norm2": "1.1", "head": head}
    blocks = tuple((f"res{n // 2 + 1}",) if n % 2 == 0 else () for n in range(_MOST_TRANSITIONS))
    told = {"branch_activation": True, "last_activation": False, "head_pool": "max"}
    told |= {"first_stride": 2, "activation": "relu"}
    fields = {"blocks": blocks, "told": told, "note": note, "branches": True}
    return Naming(name, "res{stage}", modules, "the ResNet9 of PyTorch tutorials", **fields)


_ROWS = (
    Naming(
        "torchvision", "layer{stage}.{block}", _TORCHVISION | {"head": "fc"},
        "torchvision.models, timm, most papers", assumes=_INPUT,
    ),
    Naming(
        "senet", "layer{stage}.{block}",
        _TORCHVISION | {"head": "fc"} | _squeeze("se.fc.0", "se.fc.2"),
        "github.com/moskomule/senet.pytorch", assumes=_INPUT, matrices=_SQUEEZE,
    ),
    Naming(
        "conv_reduce", "layer{stage}.{block}",
        _TORCHVISION | {"head": "fc"} | _squeeze("se.conv_reduce", "se.conv_expand"),
        "squeeze-and-excitation as in EfficientNets", assumes=_INPUT,
    ),
    Naming(
        "sequential", "layer{stage}.{block}", _STEM | _SEQUENTIAL | {"head": "fc"},
        "blocks written as nn.Sequential: block.0/1/3/4, skip.0/1",
    ),
    Naming(
        "akamaster", "layer{stage}.{block}", _STEM | _RESIDUAL | {"head": "linear"},
        "github.com/akamaster/pytorch_resnet_cifar10 (option A)",
    ),
    Naming(
        "kuangliu", "layer{stage}.{block}",
        _STEM | _RESIDUAL | _SHORTCUT | {"norm": "bn", "head": "linear"} | _squeeze("fc1", "fc2"),
        "github.com/kuangliu/pytorch-cifar", parts=(Branch.MAIN, Branch.SHORTCUT, Branch.ATTENTION),
    ),
    Naming(
        "wide_resnet", "layer{stage}.{block}", _WIDE | _SHORTCUT | {"head": "linear"},
        "github.com/meliketoy/wide-resnet.pytorch", assumes=_INPUT,
    ),
    Naming(
        "xternalz", "block{stage}.layer.{block}",
        _WIDE | {"shortcut.conv": "convShortcut", "head": "fc"},
        "github.com/xternalz/WideResNet-pytorch",
    ),
    Naming(
        "zagoruyko", "group{stage}.block{block}", _ZAGORUYKO,
        "github.com/szagoruyko/wide-residual-networks", first_stage=0,
        tensors={**TORCH_TENSORS, **_KERNELS},
    ),
    _timm_v2(
        "timm_v2", {"stem.conv": "stem.conv", "shortcut.conv": "downsample.conv"},
        "timm's resnetv2 and BiT",
    ),
    _timm_v2("timm_v2_d", _TIMM_V2_D, "timm's resnetv2 with a d or t stem", {"shortcut": "pooled"}),
    Naming(
        "timm", "layer{stage}.{block}",
        {place: name for place, name in _TORCHVISION.items() if place not in _OWN} | {"head": "fc"},
        "timm's folders (torchvision's names)", hub="timm",
    ),
    Naming(
        "huggingface", "resnet.encoder.stages.{stage}.layers.{block}",
        _huggingface("resnet.") | {"head": "classifier.1"},
        "transformers.ResNetForImageClassification", first_stage=0, hub="transformers",
    ),
    Naming(
        "huggingface_backbone", "encoder.stages.{stage}.layers.{block}", _huggingface(""),
        "transformers.ResNetModel, ResNetBackbone", first_stage=0, hub="transformers",
    ),
    Naming(
        "openmmlab", "backbone.layer{stage}.{block}",
        _OPENMMLAB | _RESIDUAL | _DOWNSAMPLE | _POOLED | {"head": "head.fc"} | _SE_LAYER,
        "mmpretrain classifiers",
    ),
    Naming(
        "openmmlab_backbone", "layer{stage}.{block}",
        _DEEP_STEM | _RESIDUAL | _DOWNSAMPLE | _POOLED | _SE_LAYER,
        "mmdet and mmseg, deep stem (ResNetV1d)",
    ),
    Naming("detectron2", "res{stage}.{block}", _DETECTRON2, "detectron2", first_stage=2),
    Naming(
        "children", "{stage}.{block}", _CHILDREN | _RESIDUAL | _DOWNSAMPLE,
        "nn.Sequential(*resnet.children()) without fc: lightly, BYOL", first_stage=4,
    ),
    _resnet9(
        "resnet9", "classifier.3", "the dropout in front of its head, if it has one, is left out"
    ),
    _resnet9("resnet9_plain", "classifier.2"),
    Naming(
        "flax", "stage{stage}.{block}", {place: place for place in _FLAX_PLACES},
        "this library's own names and layouts (NHWC, HWIO), and `linen.variables`",
        tensors=FLAX_TENSORS,
    ),
    *JAX_NAMINGS,
)  # fmt: skip
NAMINGS: Mapping[str, Naming] = MappingProxyType({naming.name: naming for naming in _ROWS})
"""Known naming schemes by name; of two that fit alike, the first is reported."""


def naming_of(naming: str | Naming) -> Naming:
    """The naming scheme that a name stands for; an object is returned as it is. Raises InputError
    for a name that :data:`NAMINGS` does not have, and for an object of your own that has the name
    of one of them: files say by name how they are written."""
    if isinstance(naming, Naming):
        known = NAMINGS.get(naming.name, naming)
        if known.numbers_through and naming.modules.keys() == known.modules.keys():
            naming = replace(naming, blocks=known.blocks, modules=known.modules)
        if naming != known:
            raise InputError(
                f"{naming.name!r} is the name of one of this library's naming schemes, and yours "
                f"is another one. Give it a name of its own."
            )
        return naming
    if naming not in NAMINGS:
        raise InputError(
            f"naming scheme {naming!r} is unknown; known: {', '.join(NAMINGS)}. Describe a scheme "
            f"of your own with flax_resblock.Naming and pass the object as naming=... in Python."
        )
    return NAMINGS[naming]
