"""Labelled images: the interface that a run needs, and images in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from flax_resblock.errors import InputError

_CHUNK = 1024
"""Images at a time for statistics over all pixels, which are computed in float64."""


class DataSource(Protocol):
    """Labelled images, in memory (:class:`Dataset`) or in files (:class:`FolderDataset`). Its
    length is the number of images.

    Attributes:
      name: Its name in messages: ``"digits/train"``.
      labels: ``(N,)``, integers in ``0..num_classes-1``.
      num_classes: Number of classes; not every one need occur.
      class_names: One per class; None if the data have no names.
      mean, std: Per channel, in the units of the pixels.
      notes: What was left out or assumed when the data were read, one sentence each.
      shape: ``(H, W, C)`` of :meth:`fitted` images.
    """

    @property
    def name(self) -> str: ...
    @property
    def labels(self) -> np.ndarray: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def class_names(self) -> tuple[str, ...] | None: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    def __len__(self) -> int: ...

    def raw(self, index: int) -> np.ndarray:
        """One image as stored, ``(h, w, C)``; sizes may differ."""
        ...

    def fitted(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` at the size of evaluation, not normalised, ``(n, H, W, C)``; a
        new array if ``indices`` is an array.
        """
        ...

    def normalised(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` as the network evaluates them, ``(n, H, W, C)`` float32."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled images in memory, and their normalisation.

    Attributes:
      name: Its name in messages: ``"digits/train"``.
      images: ``(N, H, W, C)``, uint8 or floating, as stored.
      labels: ``(N,)``, int32, in ``0..num_classes-1``.
      num_classes: Number of classes; not every one need occur.
      mean, std: Per channel, in the units of ``images``; the network receives
        ``(images - mean) / std``.
      class_names: One per class; None if the data have no names.
      notes: What was left out or assumed when the data were read, one sentence each.
      white: The value of a white pixel, if ``images`` are integers; None is 255.
    Raises:
      InputError: Arrays that do not fit together.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    white: float | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not len(images):
            raise InputError(
                f"{self.name}: images have shape {images.shape}; expected (N, H, W, C) with at "
                f"least one image."
            )
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"{self.name}: images are {images.dtype}; expected uint8 or floating.")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(
                f"{self.name}: labels have shape {labels.shape} and dtype {labels.dtype}; "
                f"expected {images.shape[:1]} integers, one per image."
            )
        check_range(self.name, labels, self.num_classes)
        channels = images.shape[-1]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise InputError(
                f"{self.name}: mean={self.mean} and std={self.std} must give {channels} "
                f"numbers each, std above 0."
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise InputError(
                f"{self.name}: {len(self.class_names)} class names for {self.num_classes} "
                f"classes; expected one each."
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(H, W, C)``."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    def raw(self, index: int) -> np.ndarray:
        """One image as stored, ``(H, W, C)``."""
        return self.images[index]

    def fitted(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` as stored, ``(n, H, W, C)``."""
        return self.images[indices]

    def normalised(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` as the network sees them, ``(n, H, W, C)`` float32."""
        return normalise(self.images[indices], self.mean, self.std)


S = TypeVar("S", bound=DataSource, covariant=True)


class Splits(NamedTuple, Generic[S]):
    """Training images and test images."""

    train: S
    test: S


def splits_of(
    name: str, parts: Iterable[tuple[np.ndarray, np.ndarray]], **shared: Any
) -> Splits[Dataset]:
    """``NAME/train`` and ``NAME/test`` of the images and labels of each, and shared fields."""
    made = [
        Dataset(name=f"{name}/{part}", images=images, labels=labels, **shared)
        for part, (images, labels) in zip(("train", "test"), parts, strict=True)
    ]
    return Splits(*made)


def check_range(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises InputError for labels outside ``0..num_classes-1``."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{name}: labels reach from {labels.min()} to {labels.max()}; with {num_classes} "
            f"classes, 0 to {num_classes - 1}."
        )


def normalise(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """``(images - mean) / std``, ``(N, H, W, C)`` float32; ``mean`` and ``std`` per channel."""
    # Row by row: numpy's inner loop runs over the last axis, and one of three channels is ten times
    # slower.
    count, height, width, channels = images.shape
    rows = images.astype(np.float32).reshape(count, height, width * channels)
    rows -= np.tile(np.asarray(mean, np.float32), width)
    rows /= np.tile(np.asarray(std, np.float32), width)
    return rows.reshape(images.shape)


def pixel_moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (divisor ``N*H*W``) of each channel, computed in float64."""
    _, height, width, channels = images.shape

    def mean_of(values: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Per channel, summed row by row as in :func:`normalise`."""
        sums = np.zeros(width * channels)
        for start in range(0, len(images), _CHUNK):
            rows = images[start : start + _CHUNK].reshape(-1, width * channels)
            sums += values(rows.astype(np.float64)).sum(axis=0)
        return sums.reshape(width, channels).sum(axis=0) / (len(images) * height * width)

    mean = mean_of(lambda rows: rows)
    variance = mean_of(lambda rows: np.square(rows - np.tile(mean, width)))
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def has_own_tests(source: object, val_fraction: float) -> InputError:
    """The error for data that need no ``val_fraction``."""
    return InputError(
        f"val_fraction={val_fraction:g} sets test images aside, and {source} has test images of "
        f"its own. Leave out val_fraction."
    )


def set_aside(name: str, fraction: float, count: str) -> str:
    """The note on test images that were chosen by :func:`held_out`."""
    return (
        f"{name} has no test images of its own: {fraction:.0%} of the images of each class, "
        f"{count} in all, are set aside."
    )


HELD_OUT = 0.2
"""Part of the images that becomes test images by default."""


def held_out(labels: np.ndarray, fraction: float = HELD_OUT, *, seed: int = 0) -> np.ndarray:
    """Chooses test images for data without: a fraction of each class, ``(N,)`` bool."""
    # Images at equal distances in a shuffled list ordered by class: stratified to within one image
    # per class. RandomState's stream is frozen by numpy.
    shuffled = np.random.RandomState(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    part = Fraction(str(fraction))  # exact, so that 0.2 is every fifth image
    chosen = np.zeros(len(labels), bool)
    for place in range(len(labels)):
        chosen[by_class[place]] = place * part.numerator % part.denominator < part.numerator
    return chosen
