"""The configuration of a training run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from flax_resblock.config import ResNetConfig, walk
from flax_resblock.errors import InputError, some
from flax_resblock.runs.run_file import with_tuples
from flax_resblock.training.data import Augmentation
from flax_resblock.training.errors import check_fields

Dtype = Literal["float32", "bfloat16", "float64"]
OptimizerName = Literal["sgd", "adam", "adamw", "lars", "lamb"]
BatchNormScope = Literal["global", "replica"]
PARAMETERS = ("kernel", "scale", "bias")
"""Kinds of parameters that weight decay can be restricted to."""

RESNET8_DIGITS = ResNetConfig(
    depths=(1, 1, 1),
    widths=(16, 32, 64),
    stem="cifar",
    stem_width=16,
    in_channels=1,
    num_classes=10,
)
"""Six convolutions in three stages, for 8x8 images of one channel."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: a network, an optimizer, linear warm-up followed by a cosine.

    Attributes:
      model: The network, if it is one of this library. None leaves it to the module that ``fit``
        is given; where that is no :class:`~flax_resblock.ResNet`, this is not looked at.
      epochs: Passes over the training images, counted over the whole run.
      steps: Steps of the whole run; overrides the length in epochs.
      batch_size: Images per step, over all devices. An incomplete last batch is left out.
      accumulate: Number of pieces that a batch is computed in, one after the other, to save memory.
        Each piece normalises with its own statistics, as a PyTorch loop that calls backward several
        times per step.
      optimizer: sgd, adam and adamw as torch.optim has them; lars and lamb as optax has them.
      learning_rate: Peak learning rate.
      momentum: Momentum of SGD and LARS, without dampening.
      nesterov: Whether SGD and LARS use Nesterov's momentum.
      betas: Decay of the two moments of Adam, AdamW and LAMB.
      weight_decay: Weight decay of the parameters that decay.
      decay: Kinds of parameters that decay: kernel (of convolutions and linear layers), scale (of
        norms), bias. In a network of your own, parameters of other names are kernels if they have
        several axes, else scales.
      clip_norm: Largest joint norm of all gradients of a step, as ``clip_grad_norm_`` in PyTorch.
        None disables clipping.
      ema: Decay per step of the averaged weights and statistics, such as 0.999. They are evaluated
        and saved beside the trained ones. 0 keeps none.
      warmup_epochs: Length of the linear warm-up in epochs; fractions are allowed.
      warmup_steps: Length of the linear warm-up in steps; overrides the length in epochs.
      warmup_factor: Share of the learning rate at which the warm-up starts, above 0 and at most 1.
      label_smoothing: Label smoothing, from 0 to below 1.
      aux_weight: Weight of the loss of every auxiliary head, for networks that return several
        logits in training mode: 0.3 for GoogLeNet (Szegedy et al. 2014); PyTorch's tutorial takes
        0.4 for Inception.
      freeze: Parts that keep their parameters and running statistics: stem, stage1 and so on; in a
        network of your own, its attributes.
      batch_norm: Batch statistics on several devices. global uses those of the whole batch, as
        SyncBatchNorm; replica those of each device's share, as DistributedDataParallel, and keeps
        the running statistics of the first.
      augmentation: Random changes of the training images.
      data: The images: digits, or the path of an IDX, CIFAR or image folder, or of an .npz archive.
      image_size: Side in pixels to which the images of a folder are resized; 224 by default. The
        command line keeps smaller images small for a network whose stem keeps every pixel.
      val_fraction: Part of the images of each class that is set aside for tests, such as 0.2, where
        the data have no test images of their own. The choice depends on nothing else.
      workers: Number of processes that decode and augment images; 0 uses a thread.
      seed: Seed of the initial weights and of the order of the images, from 0 to 2**32 - 1.
      dtype: Dtype of the computation. Parameters and statistics are float32, or float64 with
        float64.
    Raises:
      InputError: A value outside its range; the message names it.
    Reference: You et al. 2017, arXiv:1708.03888 (LARS); You et al. 2020, arXiv:1904.00962 (LAMB)
    """

    model: ResNetConfig | None = field(default_factory=lambda: RESNET8_DIGITS)
    epochs: int = 6
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.05
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    decay: tuple[str, ...] = ("kernel",)
    clip_norm: float | None = None
    ema: float = 0.0
    warmup_epochs: float = 1.0
    warmup_steps: int | None = None
    warmup_factor: float = 0.1
    label_smoothing: float = 0.0
    aux_weight: float = 0.3
    freeze: tuple[str, ...] = ()
    batch_norm: BatchNormScope = "global"
    augmentation: Augmentation = field(default_factory=Augmentation)
    data: str = "digits"
    image_size: int | None = None
    val_fraction: float | None = None
    workers: int = 0
    seed: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        check_fields(self, self._rules())

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            yield name, isinstance(value, int) and value >= 1, "a positive integer"
        choices = {"optimizer": OptimizerName, "batch_norm": BatchNormScope, "dtype": Dtype}
        for name, kind in choices.items():
            known = get_args(kind)
            yield name, getattr(self, name) in known, f"one of {', '.join(known)}"
        divides = self.batch_size % self.accumulate == 0
        yield "accumulate", divides, f"a divisor of batch_size={self.batch_size}"
        yield "steps", self.steps is None or self.steps >= 1, "a positive integer"
        yield "learning_rate", 0 < self.learning_rate < math.inf, "positive and finite"
        for name in ("momentum", "ema", "label_smoothing"):
            yield name, 0 <= getattr(self, name) < 1, "at least 0 and below 1"
        without_momentum = f"False where momentum is 0 (momentum={self.momentum})"
        yield "nesterov", not self.nesterov or self.momentum > 0, without_momentum
        in_range = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        yield "betas", in_range, "two numbers, at least 0 and below 1"
        yield "aux_weight", 0 < self.aux_weight < math.inf, "positive and finite"
        yield "weight_decay", 0 <= self.weight_decay < math.inf, "0 or more, and finite"
        yield "decay", set(self.decay) <= set(PARAMETERS), f"some of {', '.join(PARAMETERS)}"
        clipping = self.clip_norm is None or 0 < self.clip_norm < math.inf
        yield "clip_norm", clipping, "positive and finite"
        in_epochs = self.steps is None and self.warmup_steps is None
        shorter = self.warmup_epochs >= 0 and (not in_epochs or self.warmup_epochs < self.epochs)
        yield "warmup_epochs", shorter, f"at least 0 and below epochs={self.epochs}"
        shorter = self.warmup_steps is None or 0 <= self.warmup_steps < (self.steps or math.inf)
        yield "warmup_steps", shorter, f"at least 0 and below steps={self.steps}"
        yield "warmup_factor", 0 < self.warmup_factor <= 1, "above 0 and at most 1"
        if self.model is not None:
            parts = list(dict.fromkeys(str(slot.path[0]) for slot in walk(self.model)))
            some_parts = f"some of {', '.join(parts)}, but not all"
            yield "freeze", set(self.freeze) < set(parts), some_parts
        positive = self.image_size is None or self.image_size >= 1
        yield "image_size", positive, "a positive number of pixels"
        part = self.val_fraction is None or 0 < self.val_fraction < 1
        yield "val_fraction", part, "above 0 and below 1"
        in_range = isinstance(self.seed, int) and 0 <= self.seed < 2**32
        yield "seed", in_range, "an integer from 0 to 2**32 - 1"

    def end(self, steps_per_epoch: int) -> int:
        """Number of steps of the whole run."""
        return self.steps or self.epochs * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Number of steps of the warm-up; raises InputError if it is not shorter than the run."""
        steps, end = self.warmup_steps, self.end(steps_per_epoch)
        if steps is None:
            steps = round(self.warmup_epochs * steps_per_epoch)
        if steps >= end:
            raise InputError(
                f"the warm-up of {steps} steps is not below the {end} steps of the run. "
                f"Shorten it (warmup_epochs, warmup_steps)."
            )
        return steps


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Replaces values of a configuration, also by values that were read from JSON.

    A length in epochs replaces one in steps. If no warm-up is given with it, the warm-up is
    shortened to at most half of the epochs.

    Args:
      config: The configuration.
      settings: New values by field; ``augmentation`` may be a mapping with some of its fields.
    Raises:
      InputError: A value outside its range, or an unknown setting.
    """
    changes = with_tuples(settings)
    unknown = set(changes) - {one.name for one in fields(TrainConfig)}
    if unknown:
        raise InputError(
            f"the settings {some(sorted(unknown))} are unknown to this version of "
            f"flax-resblock; update it."
        )
    if isinstance(given := changes.get("augmentation"), Mapping):
        changes["augmentation"] = replace(config.augmentation, **with_tuples(given))
    if "epochs" in changes:
        changes.setdefault("steps", None)
        if "warmup_epochs" not in changes and changes["steps"] is None:
            changes["warmup_epochs"] = min(config.warmup_epochs, changes["epochs"] / 2)
    if "warmup_epochs" in changes:
        changes.setdefault("warmup_steps", None)
    if changes.get("momentum") == 0 and "nesterov" not in changes:
        changes["nesterov"] = False
    return replace(config, **changes)
