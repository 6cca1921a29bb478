"""``config.json`` and ``preprocessor_config.json`` of transformers' ResNet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_resblock.config import EXPANSION, ResNetConfig
from flax_resblock.convert.hubs.common import HubConfig, Preprocessing
from flax_resblock.errors import CheckpointError, InputError

_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers."""
_WARPED_FROM = 384
"""ConvNextImageProcessor, which ResNet uses, resizes without a crop from this size on."""


def recognises(content: Mapping[str, Any]) -> bool:
    return content.get("model_type") == "resnet"


def read(content: Mapping[str, Any], preprocessor: Mapping[str, Any], source: str) -> HubConfig:
    activation = content.get("hidden_act", "relu")
    if activation != "relu":
        raise CheckpointError(
            f"{source} says hidden_act {activation!r}, which transformers applies to the stem and "
            f"at the end of each block but not within it, where it keeps ReLU. The Flax network "
            f"has one activation, so this checkpoint is not converted."
        )
    told = {
        "stride_on": "1x1" if content.get("downsample_in_bottleneck", False) else "3x3",
        "first_stride": 2 if content.get("downsample_in_first_stage", False) else 1,
    }
    return HubConfig("transformers", told, _labels(content, source), _preprocessing(preprocessor))


def _labels(content: Mapping[str, Any], source: str) -> list[str]:
    named = content.get("id2label")
    if not named:
        return []
    try:
        labels = {int(number): str(name) for number, name in named.items()}
        return [labels[i] for i in range(len(labels))]
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{source}: its id2label does not number the classes from 0. Repair it or remove "
            f"the entry."
        ) from error


def _preprocessing(content: Mapping[str, Any]) -> Preprocessing | None:
    size = content.get("size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    mean, std = content.get("image_mean"), content.get("image_std")
    if not isinstance(edge, int) or not mean or not std:
        return None
    warped = edge >= _WARPED_FROM
    return Preprocessing(
        tuple(map(float, mean)),
        tuple(map(float, std)),
        (edge, edge),
        1.0 if warped else float(content.get("crop_pct") or 224 / 256),
        _RESAMPLING.get(content.get("resample", 3), "bicubic"),
        not warped,
        "preprocessor_config.json",
    )


def write(
    config: ResNetConfig,
    labels: Sequence[str],
    kept: Mapping[str, Any],
    preprocessing: Preprocessing | None,
) -> dict[str, dict[str, Any]]:
    content: dict[str, Any] = {
        **kept,
        "architectures": [
            "ResNetModel" if config.num_classes is None else "ResNetForImageClassification"
        ],
        "model_type": "resnet",
        "num_channels": config.in_channels,
        "embedding_size": config.stem_width,
        "hidden_sizes": [width * EXPANSION[config.block] for width in config.widths],
        "depths": list(config.depths),
        "layer_type": config.block,
        "hidden_act": "relu",
        "downsample_in_first_stage": config.first_stride == 2,
        "downsample_in_bottleneck": config.stride_on == "1x1" and config.block == "bottleneck",
    }
    for stale in ("torch_dtype", "dtype"):
        content.pop(stale, None)
    if config.num_classes is not None:
        names = list(labels)
        if len(labels) != config.num_classes:
            names = [f"LABEL_{i}" for i in range(config.num_classes)]
        content["id2label"] = {str(i): name for i, name in enumerate(names)}
        content["label2id"] = {name: i for i, name in enumerate(names)}
    _refuse_lost(config, content)
    files = {"config.json": content}
    if preprocessing is not None:
        files["preprocessor_config.json"] = {
            "image_processor_type": "ConvNextImageProcessor",
            "do_resize": True,
            "do_normalize": True,
            "size": {"shortest_edge": preprocessing.size[0]},
            "crop_pct": preprocessing.crop_pct,
            "resample": {name: n for n, name in _RESAMPLING.items()}[preprocessing.interpolation],
            "image_mean": list(preprocessing.mean),
            "image_std": list(preprocessing.std),
        }
    return files


def _refuse_lost(config: ResNetConfig, content: Mapping[str, Any]) -> None:
    """Raises InputError for what the file cannot say."""
    told = ResNetConfig(
        block=content["layer_type"],
        depths=content["depths"],
        widths=tuple(size // EXPANSION[config.block] for size in content["hidden_sizes"]),
        stem_width=content["embedding_size"],
        first_stride=2 if content["downsample_in_first_stage"] else 1,
        stride_on="1x1" if content["downsample_in_bottleneck"] else "3x3",
        in_channels=content["num_channels"],
        num_classes=config.num_classes,
    )
    names = [*ResNetConfig.__dataclass_fields__]
    if config.block == "basic":
        names.remove("stride_on")
    pairs = ((name, getattr(config, name), getattr(told, name)) for name in names)
    lost = [f"{name} {wanted!r}" for name, wanted, found in pairs if wanted != found]
    if lost:
        raise InputError(
            f"transformers' ResNet cannot be told {', '.join(lost)}. Write another naming "
            'scheme: `save(naming="torchvision")`.'
        )
