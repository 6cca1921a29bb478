"""What a training run is, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from flax_resblock.architecture import ResNetConfig, architecture, walk
from flax_resblock.convert.run_file import with_tuples
from flax_resblock.errors import InputError
from train.data import Augmentation

Dtype = Literal["float32", "bfloat16", "float64"]

RESNET8_DIGITS = ResNetConfig(depths=(1, 1, 1), widths=(16, 32, 64), stem="cifar", stem_width=16, in_channels=1, num_classes=10)
"""Six convolutions in three stages, for 8x8 images of one channel."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: SGD, linear warm-up, cosine.

    Attributes:
      model: The network.
      epochs: Passes over the training images, over the whole run; the schedule ends with them.
      batch_size: Images per step. An incomplete last batch is left out; every epoch has another order.
      learning_rate: Peak.
      momentum, nesterov: As in ``torch.optim.SGD``, without dampening.
      weight_decay: Of convolution and linear kernels; biases and norms do not decay.
      warmup_epochs: Length of the linear warm-up, fewer than ``epochs``; fractions are allowed.
      warmup_factor: The warm-up starts at this share of ``learning_rate``, in (0, 1].
      label_smoothing: In [0, 1).
      freeze: Parts that keep their parameters and running statistics: ``"stem"``, ``"stage1"`` ...
      augmentation: What is done to the training images at random.
      data: ``"digits"`` or a path, see :func:`train.data.open_data`.
      workers: Processes that decode and augment; 0: a thread of the training process.
      seed: Of the initial weights and of the order of the images, 0 to 2**32 - 1.
      dtype: Of the computation in a model that :func:`train.new_model` makes. Parameters and statistics are float32, or float64 for ``"float64"``.
    Raises:
      InputError: A value outside its range; the message names it.
    """

    model: ResNetConfig = field(default_factory=lambda: RESNET8_DIGITS)
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0
    warmup_factor: float = 0.1
    label_smoothing: float = 0.0
    freeze: tuple[str, ...] = ()
    augmentation: Augmentation = field(default_factory=Augmentation)
    data: str = "digits"
    workers: int = 0
    seed: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, meaning: str) -> None:
            if not valid:
                raise InputError(f"{name}={getattr(self, name)!r} must be {meaning}.")

        for name in ("epochs", "batch_size"):
            value = getattr(self, name)
            require(name, isinstance(value, int) and value >= 1, "a positive integer")
        require("learning_rate", math.isfinite(self.learning_rate) and self.learning_rate > 0, "positive and finite")
        require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        require("nesterov", not self.nesterov or self.momentum > 0, f"False where momentum is 0 (momentum={self.momentum})")
        require("weight_decay", math.isfinite(self.weight_decay) and self.weight_decay >= 0, "0 or more, and finite")
        require("warmup_epochs", 0 <= self.warmup_epochs < self.epochs, f"at least 0 and below epochs={self.epochs}")
        require("warmup_factor", 0 < self.warmup_factor <= 1, "above 0 and at most 1")
        require("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        parts = list(dict.fromkeys(str(slot.path[0]) for slot in walk(self.model)))
        require("freeze", set(self.freeze) < set(parts), f"some of {', '.join(parts)}, but not all")
        require("seed", isinstance(self.seed, int) and 0 <= self.seed < 2**32, "an integer from 0 to 2**32 - 1")
        require("dtype", self.dtype in get_args(Dtype), f"one of {', '.join(get_args(Dtype))}")


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values, also as JSON gives them back; a run of few epochs gets a warm-up of half of them at most, if none was asked for.

    Args:
      config: The rest.
      settings: By field.
    Raises:
      InputError: A value outside its range.
    """
    changes = with_tuples(settings)
    if isinstance(changes.get("augmentation"), Mapping):
        changes["augmentation"] = Augmentation(**with_tuples(changes["augmentation"]))
    if "epochs" in changes and "warmup_epochs" not in changes:
        changes["warmup_epochs"] = min(config.warmup_epochs, changes["epochs"] / 2)
    return replace(config, **changes)


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
        "digits-resnet8": TrainConfig(epochs=20, learning_rate=0.1),
        "fashion-resnet20": TrainConfig(
            model=replace(architecture("resnet20"), in_channels=1),
            data="/usr/share/datasets/fashion-mnist",
            epochs=3,
            batch_size=128,
            learning_rate=0.1,
            augmentation=Augmentation(pad=2, flip=True),
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
"""Runs by name; ``dataclasses.replace`` changes single fields. He et al. 2016, arXiv:1512.03385 (CIFAR); Goyal et al. 2017, arXiv:1706.02677 (ImageNet), both
with half a cosine instead of steps."""
