"""Training configurations by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from flax_resblock.config import architecture
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import Augmentation

DEFAULT_PRESET = "digits-resnet8"
"""What is trained if nothing else is asked for."""

_STANDARD = Augmentation(pad=4, flip=True)
_CIFAR = {
    "data": "cifar-10-batches-bin",
    "epochs": 182,  # 64,000 steps of 128 images
    "batch_size": 128,
    "learning_rate": 0.1,
    "nesterov": False,
    "weight_decay": 1e-4,
    "augmentation": _STANDARD,
}
PRESETS: Mapping[str, TrainConfig] = MappingProxyType(
    {
        DEFAULT_PRESET: TrainConfig(epochs=20, learning_rate=0.1),
        "fashion-resnet20": TrainConfig(
            model=replace(architecture("resnet20"), in_channels=1),
            data="/usr/share/datasets/fashion-mnist",
            epochs=3,
            batch_size=32,  # so short a run gains more from many steps than from large ones
            learning_rate=0.1,
            warmup_epochs=0.25,
            augmentation=Augmentation(flip=True),
        ),
        "cifar10-resnet20": TrainConfig(model=architecture("resnet20"), **_CIFAR),
        "cifar10-resnet56": TrainConfig(model=architecture("resnet56"), **_CIFAR),
        "imagenet-resnet50": TrainConfig(
            model=architecture("resnet50"),
            data="imagenet",
            epochs=90,
            batch_size=256,
            learning_rate=0.1,
            nesterov=False,
            weight_decay=1e-4,
            warmup_epochs=5.0,
            label_smoothing=0.1,
            augmentation=Augmentation(random_resized_crop=(0.08, 1.0), flip=True),
            workers=8,
        ),
    }
)
"""Configurations by name; change single fields with ``dataclasses.replace``.

He et al. 2016, arXiv:1512.03385 (CIFAR); Goyal et al. 2017, arXiv:1706.02677 (ImageNet), both with
half a cosine instead of steps.
"""
