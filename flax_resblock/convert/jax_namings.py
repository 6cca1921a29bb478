"""Naming schemes of residual networks in JAX programs: Linen, NNX, Haiku.

Collections are merged (``params`` and ``batch_stats`` have the same modules), and the parts of a
name are joined by dots; see :mod:`flax_resblock.checkpoint.jax_tree`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from flax_resblock.config import SlotKind
from flax_resblock.convert.codecs import LED_PIXEL, LED_VECTOR, Codec
from flax_resblock.convert.naming import FLAX_TENSORS, Naming, Tensor, numbered


def _renamed(
    names: Mapping[str, str], codecs: Mapping[str, Codec] = MappingProxyType({})
) -> Mapping[SlotKind, tuple[Tensor, ...]]:
    """Flax's tensors with other names and layouts, by kind and name: ``{"conv.kernel": "w"}``."""

    def changed(kind: SlotKind, one: Tensor) -> Tensor:
        key = f"{kind.value}.{one.flax_name}"
        return replace(one, name=names.get(key, one.name), codec=codecs.get(key, one.codec))

    return MappingProxyType(
        {kind: tuple(changed(kind, t) for t in tensors) for kind, tensors in FLAX_TENSORS.items()}
    )


_TOLD: Mapping[str, Any] = MappingProxyType(
    {"padding": "symmetric", "stem_padding": None, "stem_stride": None, "stem_pool": None}
    | {"stride_on": "3x3", "first_stride": 1, "dilated_stages": (), "activation": "relu"}
    | {"eps": 1e-5, "momentum": 0.1}
)
"""What these programs have unless a row says otherwise. PyTorch's ``momentum`` is one minus that
of Flax, and one minus Haiku's ``decay_rate``."""
BIASED = (
    "its running variances are averages of biased ones, as Flax and Haiku compute them, and are "
    "carried as they are; in training, PyTorch and this library average unbiased ones"
)


def _flax(
    name: str,
    stage: str,
    modules: dict[str, str],
    origin: str,
    told: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> Naming:
    told = {**_TOLD, **({"block": "bottleneck"} if name.endswith("bottleneck") else {}), **told}
    told = {key: value for key, value in told.items() if value is not ...}
    fields = {"tensors": FLAX_TENSORS, "counts": False, "note": BIASED, **fields}
    return Naming(name, stage, modules, origin, told=told, **fields)


_EXAMPLE_STEM = {"stem.conv": "conv_init", "stem.norm": "bn_init", "head": "Dense_0"}
_EXAMPLE_SKIP = {"shortcut.conv": "conv_proj", "shortcut.norm": "norm_proj"}
_EXAMPLE_TOLD = {"padding": "same", "stem_padding": "symmetric"}
"""Its first convolution pads (3, 3); everything else is ``'SAME'``."""


def _example(kind: str, block: str, convolutions: int) -> Naming:
    main = numbered("Conv_{}", "BatchNorm_{}", convolutions)
    modules = _EXAMPLE_STEM | main | _EXAMPLE_SKIP
    origin = f"flax/examples/imagenet, {kind} blocks"
    name, stage = f"flax_imagenet_{kind}", f"{block}_{{index}}"
    return _flax(name, stage, modules, origin, _EXAMPLE_TOLD, first_stage=0)


def _jax_resnet(name: str, what: str, stem: dict[str, str], skip: dict[str, str]) -> Naming:
    main = numbered("ConvBlock_{}.Conv_0", "ConvBlock_{}.BatchNorm_0")
    modules = stem | main | skip | {"head": "layers_{behind}"}
    return _flax(name, "layers_{index}", modules, f"jax-resnet, {what}", first_stage=2)


def _in_conv_block(place: str, module: str, number: str = "") -> dict[str, str]:
    return {
        f"{place}.conv{number}": f"{module}.Conv_0",
        f"{place}.norm{number}": f"{module}.BatchNorm_0",
    }


_RESNETD_STEM = {
    place: name
    for i in range(3)
    for place, name in _in_conv_block("stem", f"layers_0.ConvBlock_{i}", str(i + 1)).items()
}


def _huggingface(kind: str, layer: str, convolutions: int, prefix: str) -> Naming:
    main = numbered(f"{layer}.convolution", f"{layer}.normalization", convolutions)
    ends = {
        "stem.conv": f"{prefix}embedder.embedder.convolution",
        "stem.norm": f"{prefix}embedder.embedder.normalization",
        "shortcut.conv": "shortcut.convolution",
        "shortcut.norm": "shortcut.normalization",
    }
    if prefix:
        ends["head"] = "classifier.1"
    what = "FlaxResNetForImageClassification" if prefix else "FlaxResNetModel"
    return _flax(
        f"flax_huggingface_{'' if prefix else 'backbone_'}{kind}",
        f"{prefix}encoder.stages.{{stage}}.layers.{{block}}",
        main | ends,
        f"transformers 4, {what}, {kind} blocks",
        {"first_stride": ...},  # its config.json says it
        first_stage=0,
    )


_FLAXMODELS_TOLD = {"momentum": 0.9}
"""It gives Flax's ``momentum`` the value of PyTorch's, 0.1: PyTorch's would be 0.9."""
_FLAXMODELS_NOTE = (
    f"{BIASED}; unless told otherwise, flaxmodels' model normalises images itself and ends with a "
    f"softmax, and neither is part of this network"
)


def _flaxmodels(kind: str, block: str, convolutions: int) -> Naming:
    main = numbered("Conv_{}", "BatchNorm_{}", convolutions)
    skip = {"shortcut.conv": f"Conv_{convolutions}", "shortcut.norm": f"BatchNorm_{convolutions}"}
    stem = {"stem.conv": "Conv_0", "stem.norm": "BatchNorm_0", "head": "Dense_0"}
    origin = f"flaxmodels' Linen variables, {kind} blocks"
    names = f"flaxmodels_linen_{kind}", f"{block}_{{index}}", stem | main | skip, origin
    return _flax(*names, _FLAXMODELS_TOLD, first_stage=0, note=_FLAXMODELS_NOTE)


_KERNELS = "conv.kernel", "biased_conv.kernel", "linear.kernel"
_BIASES = "biased_conv.bias", "linear.bias"
_HAIKU_TENSORS = _renamed(
    {**dict.fromkeys(_KERNELS, "w"), **dict.fromkeys(_BIASES, "b"), "norm.bias": "offset"}
)


def _haiku(
    name: str, version: str, ends: dict[str, str], told: Mapping[str, Any] = MappingProxyType({})
) -> Naming:
    modules = {"stem.conv": "initial_conv", "head": "logits", "shortcut.conv": "shortcut_conv"}
    return _flax(
        name,
        "block_group_{stage}.block_{block}",
        modules | numbered("conv_{}", "batchnorm_{}") | ends,
        f"haiku.nets.ResNet, resnet_v2={version}",
        {"padding": "same", **told},
        first_stage=0,
        tensors=_HAIKU_TENSORS,
        counts=True,
    )


_BIT_TOLD: Mapping[str, Any] = MappingProxyType(
    {"order": "pre_activation", "shortcut_from": "activated", "block": "bottleneck"}
    | {"norm": "group", "norm_groups": 32, "standardized": True, "standardized_eps": 1e-10}
)
_NORMS = "norm", "group_norm"
"""Kinds of slots; a norm is looked up as the first before it is known to be the second."""
_GAMMA_BETA = ("scale", "gamma"), ("bias", "beta")
_DOWNSAMPLE = {"shortcut.conv": "downsample.conv", "shortcut.norm": "downsample.bn", "head": "fc"}


def _bit(
    name: str, origin: str, modules: dict[str, str], pool: str | None, **fields: Any
) -> Naming:
    stage, told = "block{stage}.unit{block:02d}", {**_BIT_TOLD, "stem_pool": pool}
    return _flax(name, stage, modules, origin, told, first_block=1, **fields)


JAX_NAMINGS = (
    _example("basic", "ResNetBlock", 2),
    _example("bottleneck", "BottleneckResNetBlock", 3),
    _jax_resnet(
        "jax_resnet", "ResNet, ResNeXt and wide ResNet",
        _in_conv_block("stem", "layers_0.ConvBlock_0"),
        _in_conv_block("shortcut", "ResNetSkipConnection_0.ConvBlock_0"),
    ),
    _jax_resnet(
        "jax_resnet_d", "ResNet-D", _RESNETD_STEM,
        _in_conv_block("shortcut.projection", "ResNetDSkipConnection_0.ConvBlock_0"),
    ),
    _huggingface("basic", "layer.layer_{}", 2, "resnet."),
    _huggingface("bottleneck", "layer.{}", 3, "resnet."),
    _huggingface("basic", "layer.layer_{}", 2, ""),
    _huggingface("bottleneck", "layer.{}", 3, ""),
    _flax(
        "flaxmodels", "layer{stage}.block{block}",
        {"stem.conv": "conv1", "stem.norm": "bn1", **numbered("conv{}", "bn{}", first=1)}
        | _DOWNSAMPLE,
        "flaxmodels' pretrained .h5", _FLAXMODELS_TOLD, note=_FLAXMODELS_NOTE,
        tensors=_renamed(dict.fromkeys(_KERNELS, "weight")),
    ),
    _flaxmodels("basic", "BasicBlock", 2),
    _flaxmodels("bottleneck", "Bottleneck", 3),
    _flax(
        "bonsai", "layer{stage}.blocks.{block}",
        {"stem.conv": "stem.conv", "stem.norm": "stem.bn", **numbered("conv{}", "bn{}")}
        | _DOWNSAMPLE,
        "bonsai's ResNet (NNX)", {"momentum": 0.01, "block": "bottleneck"}, first_stage=0,
    ),
    _haiku(
        "haiku", "False",
        {"stem.norm": "initial_batchnorm", "shortcut.norm": "shortcut_batchnorm"},
        {"order": "post_activation"},
    ),
    _haiku(
        "haiku_v2", "True", {"norm": "final_batchnorm"},
        {"order": "pre_activation", "shortcut_from": "activated"},
    ),
    _bit(
        "bit", "Big Transfer's published .npz",
        {"stem.conv": "root_block.standardized_conv2d", "norm": "group_norm"}
        | {f"conv{i}": f"{part}.standardized_conv2d" for i, part in enumerate("abc", start=1)}
        | {f"norm{i}": f"{part}.group_norm" for i, part in enumerate("abc", start=1)}
        | {"shortcut.conv": "a.proj.standardized_conv2d", "head": "head.conv2d"},
        "3x3_zeros", root="resnet", note="",
        tensors=_renamed(
            {f"{norm}.{ours}": its for norm in _NORMS for ours, its in _GAMMA_BETA},
            {"linear.kernel": LED_PIXEL},
        ),
    ),
    _bit(
        "big_vision", "big_vision's bit_paper",
        {"stem.conv": "root_block.conv_root", "norm": "norm-pre-head", "head": "head"}
        | numbered("conv{}", "gn{}", first=1)
        | {"shortcut.conv": "conv_proj"},
        None,
        tensors=_renamed(
            {}, {f"{norm}.{name}": LED_VECTOR for norm in _NORMS for name in ("scale", "bias")}
        ),
        note="big_vision's pooling sees no border of zeros, where that of Big Transfer's own "
        "programs does (`stem_pool='3x3_zeros'`)",
    ),
)  # fmt: skip
"""One row for each family and kind of block."""
