"""Batches for training, from any step on, and for evaluation, for one or several processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flax_resblock.errors import InputError
from flax_resblock.training.data.augment import Augmentation, augmented, draw
from flax_resblock.training.data.dataset import DataSource, normalise
from flax_resblock.training.data.mix import draw_mixing, mix
from flax_resblock.training.data.pipeline import Batch, import_grain, shuffled, steps_per_epoch
from flax_resblock.training.data.prefetch import check_workers, prefetched

_AUGMENT, _MIX = 0, 1
"""Purposes of random numbers, each with its own sequence."""


class EvaluationBatch(NamedTuple):
    """Images for evaluation.

    Attributes:
      images: ``(n, H, W, C)``, float32, normalised; zeros where ``valid`` is false.
      labels: ``(n,)``, int32; 0 where not valid.
      indices: Indices in the dataset, ``(n,)``, int64; -1 where not valid.
      valid: ``(n,)``, bool; false for the padding of the last batch.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    valid: np.ndarray


class _Pixels(NamedTuple):
    """What a worker returns: a step's augmented images, in the dtype of the source."""

    step: int
    indices: np.ndarray
    images: np.ndarray

    def plain(self) -> _Pixels:
        """As plain arrays; those of a worker are a subclass that holds shared memory."""
        return _Pixels(self.step, np.array(self.indices), np.asarray(self.images))


@dataclass(frozen=True, eq=False)
class Stream:
    """The endless training batches of a run. Every epoch has another order and leaves out its
    incomplete last batch.

    A batch depends only on ``seed``, the step, the dataset, the batch size and the augmentation,
    bit for bit: not on where iteration began, not on ``workers``, and, over all shards together,
    not on their number. The number of the next step is therefore the only state, and ``from_step``
    continues from it. Without augmentation the batches are those of
    :func:`flax_resblock.training.data.batches`.

    Attributes:
      dataset: The source of the images.
      batch_size: Images per step over all shards.
      seed: 0 to 2**32 - 1.
      augmentation: Random changes of the images.
      shard: Number of this process and of all processes; it gets a contiguous share of each piece
        of each batch.
      pieces: Number of pieces that a batch is computed in, see
        :class:`flax_resblock.training.TrainConfig`; a process gets its shares one after the other.
      workers: Number of processes that decode and augment; each receives a copy of a dataset in
        memory. 0 uses a thread. As always with multiprocessing, a script that starts workers needs
        ``if __name__ == "__main__":``.
    Raises:
      InputError: Values that are out of range or do not fit each other.
    """

    dataset: DataSource
    batch_size: int
    seed: int = field(kw_only=True)
    augmentation: Augmentation | None = field(default=None, kw_only=True)
    shard: tuple[int, int] = field(default=(0, 1), kw_only=True)
    pieces: int = field(default=1, kw_only=True)
    workers: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        steps_per_epoch(self.dataset, self.batch_size)
        _shard_rows(self.batch_size, self.shard, self.pieces)
        check_workers(self.workers)
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} must be from 0 to 2**32 - 1.")
        self._augmentation.shape_of(self.dataset)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the dataset."""
        return steps_per_epoch(self.dataset, self.batch_size)

    def from_step(
        self, step: int, *, place: Callable[[Batch], Batch] = lambda batch: batch
    ) -> Generator[Batch, None, None]:
        """The endless batches of ``step``, ``step + 1``, ..., counted from 0 over all epochs.

        Closing or dropping the generator ends its thread and its workers.

        Args:
          step: The first.
          place: Called with each batch in the thread that prepares the batches ahead, so that what
            it puts on a device is there before the step that takes it.
        Raises:
          InputError: A negative step; while iterating, an image that can no longer be decoded.
        """
        if step < 0:
            raise InputError(f"step={step} must be 0 or more.")
        order = (
            shuffled(len(self.dataset), self.seed)
            .batch(self.batch_size, drop_remainder=True, batch_fn=np.asarray)
            .repeat()
        )
        values = math.prod(self._augmentation.shape_of(self.dataset))
        size = self.batch_size // self.shard[1] * values * self.dataset.fitted(slice(0)).itemsize
        return prefetched(
            order.map_with_index(self._read)[step:],
            lambda pixels: place(self._finish(pixels)),
            self.workers,
            size,
        )

    @property
    def _augmentation(self) -> Augmentation:
        return self.augmentation or Augmentation()

    def _random(self, step: int, purpose: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.Philox(key=[self.seed, purpose], counter=[0, 0, 0, step])
        )

    def _read(self, step: int, indices: np.ndarray) -> _Pixels:
        """The images of this shard and their partners, by random numbers of the whole batch."""
        choices = draw(self._augmentation, self._random(step, _AUGMENT), self.batch_size)
        rows = self._rows_read
        images = augmented(self._augmentation, self.dataset, indices[rows], choices.of(rows))
        return _Pixels(step, indices[rows], images)

    @property
    def _rows(self) -> np.ndarray:
        """The rows of the whole batch that belong to this process."""
        return _shard_rows(self.batch_size, self.shard, self.pieces)

    @property
    def _partners(self) -> np.ndarray:
        """The row that each is mixed with: the one before, and the last for the first."""
        return (self._rows - 1) % self.batch_size

    @property
    def _rows_read(self) -> np.ndarray:
        """The rows that a worker prepares, each once."""
        return np.union1d(self._rows, self._partners) if self._augmentation.mixes else self._rows

    def _finish(self, pixels: _Pixels) -> Batch:
        """Normalises and mixes in the training process, so that workers send fewer bytes."""
        step, indices, raw = pixels.plain()
        images = normalise(raw, self.dataset.mean, self.dataset.std)
        labels = self.dataset.labels[indices].astype(np.int32)
        if not self._augmentation.mixes:
            return Batch(images, labels, indices)
        mixing = draw_mixing(self._augmentation, self._random(step, _MIX), *images.shape[1:3])
        own = np.searchsorted(self._rows_read, self._rows)
        partners = np.searchsorted(self._rows_read, self._partners)
        weight = np.full(len(own), mixing.weight, np.float32)
        mixed = mix(images[own], images[partners], mixing)
        return Batch(mixed, labels[own], indices[own], labels[partners], weight)


def evaluation_batches(
    dataset: DataSource,
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    *,
    workers: int = 0,
    place: Callable[[np.ndarray], Any] = lambda images: images,
) -> Generator[EvaluationBatch, None, None]:
    """Yields every image exactly once over all shards, in order. All shards get the same number of
    batches, each of ``batch_size / shards`` rows.

    Args:
      dataset: The source of the images.
      batch_size: Rows over all shards.
      shard: See :class:`Stream`.
      workers: See :class:`Stream`.
      place: Called with the images of each batch; see :meth:`Stream.from_step`.
    Raises:
      InputError: Values out of their range; while iterating, an image that can no longer be
        decoded.
    """
    rows = _shard_rows(batch_size, shard)
    check_workers(workers)

    def read(number: int) -> _Pixels:
        indices = number * batch_size + rows
        indices = indices[indices < len(dataset)]
        return _Pixels(number, indices, dataset.fitted(indices))

    def finish(pixels: _Pixels) -> EvaluationBatch:
        _, indices, raw = pixels.plain()
        filling = (0, len(rows) - len(indices))
        images = normalise(raw, dataset.mean, dataset.std)
        images = np.pad(images, [filling, (0, 0), (0, 0), (0, 0)])
        labels = np.pad(dataset.labels[indices].astype(np.int32), filling)
        valid = np.arange(len(rows)) < len(indices)
        indices = np.pad(indices, filling, constant_values=-1)
        return EvaluationBatch(place(images), labels, indices, valid)

    numbers = import_grain().MapDataset.range(-(-len(dataset) // batch_size))
    size = len(rows) * math.prod(dataset.shape) * dataset.fitted(slice(0)).itemsize
    return prefetched(numbers.map(read), finish, workers, size)


def _shard_rows(batch_size: int, shard: tuple[int, int], pieces: int = 1) -> np.ndarray:
    """The rows of a whole batch that belong to a shard: its share of each piece."""
    number, count = shard
    if not 0 <= number < count:
        raise InputError(f"shard={shard} must be (number, count) with 0 <= number < count.")
    if batch_size < 1 or pieces < 1 or batch_size % (count * pieces):
        by = f"the {count} shards" + (f" times {pieces} pieces" if pieces > 1 else "")
        raise InputError(
            f"batch_size={batch_size} must be a positive multiple of {by}: each gets the same "
            f"number of images."
        )
    return np.arange(batch_size).reshape(pieces, count, -1)[:, number].reshape(-1)
