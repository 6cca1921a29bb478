"""The settings of a training run as flags."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

_AUGMENTATION = ("pad", "flip", "random_resized_crop", "mixup", "cutmix")
_LISTS = ("freeze", "decay")


@dataclass(frozen=True)
class SettingFlags:
    """Settings of the run that differ from the preset's, or from those of the run that goes on."""

    epochs: int | None = None
    """Passes over the training images, those before a resumption included."""
    steps: int | None = None
    """Steps of the whole run, instead of epochs."""
    batch_size: int | None = None
    """Images per step, over all devices."""
    accumulate: int | None = None
    """Pieces that a batch is computed in, one after the other, where it does not fit into
    memory.
    """
    learning_rate: float | None = None
    """Peak learning rate."""
    momentum: float | None = None
    """Momentum of SGD and LARS."""
    nesterov: Literal["on", "off"] | None = None
    """Nesterov's momentum."""
    betas: tuple[float, float] | None = None
    """Decay of the two moments of Adam, AdamW and LAMB."""
    weight_decay: float | None = None
    """Weight decay."""
    decay: tuple[str, ...] | None = None
    """Which parameters decay: kernel, scale, bias."""
    clip_norm: float | None = None
    """Largest norm of the gradients of a step."""
    ema: float | None = None
    """Decay of averaged weights, 0.999 for example; they are evaluated and saved beside the trained
    ones. 0: none.
    """
    warmup_epochs: float | None = None
    """Length of the linear warm-up."""
    warmup_steps: int | None = None
    """Length of the linear warm-up in steps."""
    label_smoothing: float | None = None
    """Label smoothing, from 0 to below 1."""
    freeze: tuple[str, ...] | None = None
    """Parts that keep their parameters and running statistics: stem,stage1 and so on."""
    batch_norm: Literal["global", "replica"] | None = None
    """Statistics of the whole batch, as torch's SyncBatchNorm, or of each device's share, as
    DistributedDataParallel.
    """
    data: str | None = None
    """What to learn from: digits, or a path to an IDX, CIFAR or image folder, or an .npz
    archive.
    """
    image_size: int | None = None
    """Side in pixels to which an image folder is brought."""
    pad: int | None = None
    """Augmentation: cut a window out of the image with so many zeros on each side."""
    flip: Literal["on", "off"] | None = None
    """Augmentation: mirror every other image."""
    random_resized_crop: tuple[float, float] | None = None
    """Augmentation: resize a window with a share of the area between these two."""
    mixup: float | None = None
    """Augmentation: alpha of mixup."""
    cutmix: float | None = None
    """Augmentation: alpha of CutMix."""
    workers: int | None = None
    """Processes that decode and augment the images."""
    seed: int | None = None
    """Seed of the weights and of the order of the images."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Dtype of the computation."""

    @property
    def given(self) -> dict[str, Any]:
        """Those that were given, by field of the configuration."""
        found = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) is not None
        }
        found |= {name: found[name] == "on" for name in ("nesterov", "flip") if name in found}
        found |= {
            name: tuple(part for item in found[name] for part in item.split(",") if part)
            for name in _LISTS
            if name in found
        }
        augmentation = {name: found.pop(name) for name in _AUGMENTATION if name in found}
        return found | ({"augmentation": augmentation} if augmentation else {})


@dataclass(frozen=True)
class ScaleFlags:
    """Devices and processes. On TPU pods, Slurm, Open MPI and Kubernetes the processes find each
    other; start the same command on every host.
    """

    devices: int | None = None
    """How many devices of this host share each batch; all by default."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where the processes do not find each other by themselves."""
    num_processes: int | None = None
    """How many processes there are, with --coordinator."""
    process_id: int | None = None
    """Which one this is, from 0, with --coordinator."""
