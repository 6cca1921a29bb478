"""``config.json`` of timm's folders: architecture, constructor arguments, ``pretrained_cfg``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flax_resblock.config import ARCHITECTURES, ResNetConfig
from flax_resblock.convert.hubs.common import HubConfig, Preprocessing
from flax_resblock.errors import CheckpointError, InputError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_BLURRED = ("resnetblur",)
_AVERAGED = (
    "average pooling carries its strides, and cuts off the last row of an odd size, which "
    "its shortcuts do not"
)
_OTHER_FUNCTION = {
    "resnetaa": _AVERAGED,
    "seresnetaa": _AVERAGED,
    "seresnextaa": _AVERAGED,
    "resnetrs": "a convolution takes the place of its stem's pooling",
    "senet154": "3x3 convolutions project its shortcuts",
    "legacy_se": "its stem pools without padding",
}
"""Beginnings of names whose networks compute something else; some have the tensors of others."""

_IN_THE_TENSORS = (
    "num_classes", "in_chans", "channels", "layers", "cardinality", "base_width", "stem_width",
    "stem_type", "stem_chs", "width_factor", "avg_down", "block", "drop_rate", "drop_path_rate",
    "drop_block_rate", "zero_init_last", "pretrained", "pretrained_cfg", "device", "dtype",
)  # fmt: skip
"""Arguments of timm's ResNet that names and shapes tell, or that evaluation does not see."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "act_layer": (None, "relu"),
    "norm_layer": (None, "batchnorm", "batchnorm2d"),
    "global_pool": ("avg",),
    "replace_stem_pool": (False,),
    "block_reduce_first": (1,),
    "down_kernel_size": (1,),
}
"""Arguments that must have one of these values."""
_HIDDEN = ("order", "shortcut_from", "norm_groups", "standardized", "standardized_eps", "stem_pool")
"""Options that a name says, and tensors do not."""
_DILATED = {32: (), 16: (4,), 8: (3, 4)}
_ANTIALIAS = {None: "none", "blur": "blur", "blurpool": "blur"}


def recognises(content: Mapping[str, Any]) -> bool:
    return isinstance(content.get("architecture"), str) and (
        "pretrained_cfg" in content or "num_classes" in content
    )


def read(content: Mapping[str, Any], preprocessor: Mapping[str, Any], source: str) -> HubConfig:
    name, arguments = content["architecture"], content.get("model_args") or {}
    other = next(
        (words for start, words in _OTHER_FUNCTION.items() if name.startswith(start)), None
    )
    if other is not None:
        raise CheckpointError(
            f"{source} says that this is timm's {name}: {other}, which this library does not "
            f"compute. It is not converted."
        )
    known = ARCHITECTURES.get(name.partition(".")[0])
    if name.startswith("resnetv2") and known is None:
        raise CheckpointError(
            f"{source} says that this is timm's {name}, a pre-activation network of a kind that "
            f"this library does not have. It is not converted."
        )
    told: dict[str, Any] = {
        "antialias": "blur" if name.startswith(_BLURRED) else "none",
        "stride_on": "3x3",
        "first_stride": 1,
    }
    if known is not None:
        told |= {field: getattr(known, field) for field in _HIDDEN if _matters(known, field)}
    for argument, value in arguments.items():
        if argument == "aa_layer" and value in _ANTIALIAS:
            told["antialias"] = _ANTIALIAS[value]
        elif argument == "output_stride" and value in _DILATED:
            told["dilated_stages"] = _DILATED[value]
        elif argument == "block_args" and _is_attention(value or {}):
            continue
        elif argument not in _IN_THE_TENSORS and value not in _NEUTRAL.get(argument, ()):
            raise CheckpointError(
                f"{source} says {argument}={value!r}, which this library does not compute. It "
                f"is not converted."
            )
    pretrained = content.get("pretrained_cfg") or content
    labels = content.get("label_names") or pretrained.get("label_names") or []
    return HubConfig(
        "timm", told, [str(label) for label in labels], _preprocessing(pretrained, source)
    )


def _matters(config: ResNetConfig, field: str) -> bool:
    """Whether an option decides about a network."""
    others = {"shortcut_from": config.norm_first, "norm_groups": config.norm == "group"}
    others["standardized"] = config.norm == "group"
    usual = ResNetConfig.__dataclass_fields__[field].default
    return bool(others.get(field, getattr(config, field) != usual))


def _is_attention(block_args: Mapping[str, Any]) -> bool:
    known = set(block_args) <= {"attn_layer"}
    return known and block_args.get("attn_layer") in (None, "se", "eca")


def _preprocessing(content: Mapping[str, Any], source: str) -> Preprocessing | None:
    if not content.get("input_size"):
        return None
    mode = content.get("crop_mode") or "center"
    if mode not in ("center", "squash"):
        raise CheckpointError(
            f"{source}: its crop_mode {mode!r} is not known; known: center, squash. Change it, "
            f"or say `mean=...`, `std=...` and `image_size=...`."
        )
    _, height, width = content["input_size"]
    return Preprocessing(
        tuple(map(float, content.get("mean") or _IMAGENET[0])),
        tuple(map(float, content.get("std") or _IMAGENET[1])),
        (int(height), int(width)),
        float(content.get("crop_pct") or 0.875),
        str(content.get("interpolation") or "bicubic"),
        mode == "center",
        "pretrained_cfg",
    )


def _name_of(config: ResNetConfig) -> str | None:
    """timm's name of the network; this library's own CIFAR and Caffe networks have none there."""
    plain = replace(config, num_classes=1000, in_channels=3)
    if plain.stem == "cifar" or plain.stride_on != "3x3":
        return None
    return next((name for name, known in ARCHITECTURES.items() if known == plain), None)


def write(
    config: ResNetConfig,
    labels: Sequence[str],
    kept: Mapping[str, Any],
    preprocessing: Preprocessing | None,
) -> dict[str, dict[str, Any]]:
    name = kept.get("architecture") or _name_of(config)
    if name is None:
        raise InputError(
            "timm has no name for this network, and its config.json needs one. Write another "
            'naming scheme: `save(naming="torchvision")`.'
        )
    classes = config.num_classes or 0
    pretrained = dict(kept.get("pretrained_cfg") or {})
    if preprocessing is not None:
        pretrained |= {
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "input_size": [config.in_channels, *preprocessing.size],
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "center" if preprocessing.keep_ratio else "squash",
            "interpolation": preprocessing.interpolation,
        }
    stem = ("conv1", "conv1.0"), ("stem.conv", "stem.conv1")
    pretrained |= {
        "num_classes": classes,
        "first_conv": stem[config.norm_first][config.stem == "deep"],
        "classifier": "head.fc" if config.norm_first else "fc",
    }
    content = {
        **kept,
        "architecture": name,
        "num_classes": classes,
        "num_features": config.feature_channels,
        "pretrained_cfg": pretrained,
    }
    if config.in_channels != 3:
        content["model_args"] = {**(kept.get("model_args") or {}), "in_chans": config.in_channels}
    if len(labels) == classes and classes:
        content["label_names"] = list(labels)
    return {"config.json": content}
