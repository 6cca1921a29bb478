"""The order of the images in each epoch, and its batches; both depend only on seed and epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flax_resblock.errors import InputError, optional
from flax_resblock.training.data.dataset import DataSource

if TYPE_CHECKING:
    import grain


class Batch(NamedTuple):
    """Normalised images and their labels.

    Attributes:
      images: ``(N, H, W, C)``, float32.
      labels: ``(N,)``, int32.
      indices: Indices of the images in the dataset, ``(N,)``, int64.
      labels_b: Labels of the images that were mixed in, ``(N,)`` int32; None without mixing.
      weight: Share of ``labels`` in the loss, ``(N,)`` float32: ``weight * CE(labels) + (1 -
        weight) * CE(labels_b)``; None without mixing.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    labels_b: np.ndarray | None = None
    weight: np.ndarray | None = None


def steps_per_epoch(dataset: DataSource, batch_size: int) -> int:
    """Number of full batches in one epoch; raises InputError if there is none."""
    if not 1 <= batch_size <= len(dataset):
        raise InputError(
            f"batch_size={batch_size} must be from 1 to the {len(dataset)} images of "
            f"{dataset.name}."
        )
    return len(dataset) // batch_size


def shuffled(size: int, seed: int) -> grain.MapDataset[int]:
    """The numbers below ``size`` in the order of epoch 0; ``repeat`` gives each epoch its own."""
    # .seed() hashes the seed; shuffle(seed=...) would add the epoch to it, so that seed 0 in epoch
    # 1 sees what seed 1 sees in epoch 0.
    return import_grain().MapDataset.range(size).seed(seed).shuffle()


def import_grain() -> Any:
    """Imports grain, or says how to install it."""
    return optional("grain", "the input pipeline needs grain: pip install 'flax-resblock[train]'.")


def _epoch_of(dataset: grain.MapDataset, epoch: int) -> Iterator:
    length = len(dataset)
    repeated = dataset.repeat(epoch + 1)
    return (repeated[index] for index in range(epoch * length, (epoch + 1) * length))


def epoch_order(size: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits ``size`` images, ``(size,)`` int64, a permutation."""
    return np.fromiter(_epoch_of(shuffled(size, seed), epoch), np.int64, size)


def batches(dataset: DataSource, batch_size: int, *, seed: int, epoch: int) -> Iterator[Batch]:
    """The full batches of one epoch: :func:`epoch_order` cut into pieces of ``batch_size``. Raises
    InputError for fewer images than one batch needs.
    """
    steps_per_epoch(dataset, batch_size)

    def gather(indices: np.ndarray) -> Batch:
        return Batch(dataset.normalised(indices), dataset.labels[indices].astype(np.int32), indices)

    pipeline = (
        shuffled(len(dataset), seed)
        .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
        .map(gather)
    )
    return _epoch_of(pipeline, epoch)
