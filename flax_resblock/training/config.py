"""What a training run is, as data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from flax_resblock.config import ResNetConfig, walk
from flax_resblock.errors import InputError, some
from flax_resblock.runs.run_file import with_tuples
from flax_resblock.training.data import Augmentation

Dtype = Literal["float32", "bfloat16", "float64"]
OptimizerName = Literal["sgd", "adam", "adamw", "lars", "lamb"]
BatchNormScope = Literal["global", "replica"]
PARAMETERS = ("kernel", "scale", "bias")
"""Kinds of parameters: of convolutions and linear layers; of norms; of norms and linear layers."""

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
    """A training run: an optimizer, linear warm-up, cosine.

    Attributes:
      model: The network.
      epochs: Passes over the training images, over the whole run; the schedule ends with them.
      steps: Steps of the whole run instead; they decide where both are given.
      batch_size: Images per step, over all devices. An incomplete last batch is left out; every
        epoch has another order.
      accumulate: Pieces that a batch is computed in, one after the other, to save memory; the step
        is taken with the mean of their gradients. Each piece normalises with its own statistics, as
        a PyTorch loop does that calls ``backward`` several times per step.
      optimizer: ``"sgd"``, ``"adam"``, ``"adamw"`` as ``torch.optim`` has them; ``"lars"`` (You et
        al. 2017, arXiv:1708.03888) and ``"lamb"`` (You et al. 2020, arXiv:1904.00962) as optax has
        them.
      learning_rate: Peak.
      momentum, nesterov: Of SGD and LARS; as in ``torch.optim.SGD``, without dampening.
      betas: Of Adam, AdamW and LAMB.
      weight_decay: Of the parameters named by ``decay``.
      decay: Which parameters decay: some of ``"kernel"`` (convolutions and linear layers),
        ``"scale"`` (norms), ``"bias"``.
      clip_norm: Largest norm of all gradients together; longer ones are shortened, as
        ``torch.nn.utils.clip_grad_norm_`` does it. None: none is.
      ema: Decay per step of an average of the weights and statistics, which is evaluated and saved
        too, in [0, 1); 0: none is kept.
      warmup_epochs: Length of the linear warm-up, less than the run; fractions are allowed.
      warmup_steps: Length of the warm-up in steps instead; it decides where both are given.
      warmup_factor: The warm-up starts at this share of ``learning_rate``, in (0, 1].
      label_smoothing: In [0, 1).
      freeze: Parts that keep their parameters and running statistics: ``"stem"``, ``"stage1"`` ...
      batch_norm: Where several devices share a batch: ``"global"`` normalises with the statistics
        of the whole batch, as one device would (``torch.nn.SyncBatchNorm``); ``"replica"`` lets
        every device normalise its own share, and keeps the running statistics of the first
        (``torch.nn.parallel.DistributedDataParallel``).
      augmentation: What is done to the training images at random.
      data: ``"digits"`` or a path, see :func:`flax_resblock.training.data.open_data`.
      image_size: Side in pixels to which an image folder is brought; None: 224.
      workers: Processes that decode and augment; 0: a thread of the training process.
      seed: Of the initial weights and of the order of the images, 0 to 2**32 - 1.
      dtype: Of the computation in a model that :func:`flax_resblock.training.new_model` makes.
        Parameters and statistics are float32, or float64 for ``"float64"``.
    Raises:
      InputError: A value outside its range; the message names it.
    """

    model: ResNetConfig = field(default_factory=lambda: RESNET8_DIGITS)
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
    freeze: tuple[str, ...] = ()
    batch_norm: BatchNormScope = "global"
    augmentation: Augmentation = field(default_factory=Augmentation)
    data: str = "digits"
    image_size: int | None = None
    workers: int = 0
    seed: int = 0
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        def require(name: str, valid: bool, meaning: str) -> None:
            if not valid:
                raise InputError(f"{name}={getattr(self, name)!r} must be {meaning}.")

        for name in ("epochs", "batch_size", "accumulate"):
            value = getattr(self, name)
            require(name, isinstance(value, int) and value >= 1, "a positive integer")
        for name, choices in (
            ("optimizer", OptimizerName),
            ("batch_norm", BatchNormScope),
            ("dtype", Dtype),
        ):
            require(
                name,
                getattr(self, name) in get_args(choices),
                f"one of {', '.join(get_args(choices))}",
            )
        require(
            "accumulate",
            self.batch_size % self.accumulate == 0,
            f"a divisor of batch_size={self.batch_size}",
        )
        require("steps", self.steps is None or self.steps >= 1, "a positive integer")
        require(
            "learning_rate",
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "positive and finite",
        )
        require("momentum", 0 <= self.momentum < 1, "at least 0 and below 1")
        require(
            "nesterov",
            not self.nesterov or self.momentum > 0,
            f"False where momentum is 0 (momentum={self.momentum})",
        )
        require(
            "betas",
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            "two numbers, at least 0 and below 1",
        )
        require(
            "weight_decay",
            math.isfinite(self.weight_decay) and self.weight_decay >= 0,
            "0 or more, and finite",
        )
        require("decay", set(self.decay) <= set(PARAMETERS), f"some of {', '.join(PARAMETERS)}")
        require(
            "clip_norm",
            self.clip_norm is None or (math.isfinite(self.clip_norm) and self.clip_norm > 0),
            "positive and finite",
        )
        require("ema", 0 <= self.ema < 1, "at least 0 and below 1")
        in_epochs = self.steps is None and self.warmup_steps is None
        require(
            "warmup_epochs",
            self.warmup_epochs >= 0 and (not in_epochs or self.warmup_epochs < self.epochs),
            f"at least 0 and below epochs={self.epochs}",
        )
        require(
            "warmup_steps",
            self.warmup_steps is None or 0 <= self.warmup_steps < (self.steps or math.inf),
            f"at least 0 and below steps={self.steps}",
        )
        require("warmup_factor", 0 < self.warmup_factor <= 1, "above 0 and at most 1")
        require("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1")
        parts = list(dict.fromkeys(str(slot.path[0]) for slot in walk(self.model)))
        require("freeze", set(self.freeze) < set(parts), f"some of {', '.join(parts)}, but not all")
        require(
            "image_size",
            self.image_size is None or self.image_size >= 1,
            "a positive number of pixels",
        )
        require(
            "seed",
            isinstance(self.seed, int) and 0 <= self.seed < 2**32,
            "an integer from 0 to 2**32 - 1",
        )

    def end(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return self.steps or self.epochs * steps_per_epoch

    def warmup(self, steps_per_epoch: int) -> int:
        """Steps of the warm-up.

        Raises:
          InputError: It would take the whole run.
        """
        steps = (
            round(self.warmup_epochs * steps_per_epoch)
            if self.warmup_steps is None
            else self.warmup_steps
        )
        if steps >= self.end(steps_per_epoch):
            end = self.end(steps_per_epoch)
            raise InputError(
                f"the warm-up of {steps} steps is not below the {end} steps of the run. "
                f"Shorten it (warmup_epochs, warmup_steps)."
            )
        return steps


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """The configuration with other values, also as JSON gives them back.

    A run of few epochs gets a warm-up of half of them at most, if none was asked for; and a length
    in epochs replaces one in steps.

    Args:
      config: The rest.
      settings: By field; entries of ``augmentation`` that are absent stay as they are.
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
    if isinstance(changes.get("augmentation"), Mapping):
        changes["augmentation"] = replace(
            config.augmentation, **with_tuples(changes["augmentation"])
        )
    if "epochs" in changes:
        changes.setdefault("steps", None)
        if "warmup_epochs" not in changes and changes["steps"] is None:
            changes["warmup_epochs"] = min(config.warmup_epochs, changes["epochs"] / 2)
    if "warmup_epochs" in changes:
        changes.setdefault("warmup_steps", None)
    if changes.get("momentum") == 0 and "nesterov" not in changes:
        changes["nesterov"] = False
    return replace(config, **changes)
