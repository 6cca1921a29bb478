"""Labelled images in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_resblock.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """Labelled images and how to normalise them.

    Attributes:
      name: What it is, for messages: ``"digits/train"``.
      images: ``(N, H, W, C)``, uint8 or floating, as stored.
      labels: ``(N,)``, int32, in ``0..num_classes-1``.
      num_classes: How many classes there are, whether or not each occurs.
      mean, std: Per channel, in the units of ``images``; what the network sees is ``(images - mean) / std``.
    Raises:
      InputError: Arrays that do not fit together.
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or not len(images):
            raise InputError(f"{self.name}: images have shape {images.shape}; expected (N, H, W, C) with at least one image.")
        if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
            raise InputError(f"{self.name}: images are {images.dtype}; expected uint8 or floating.")
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(f"{self.name}: labels have shape {labels.shape} and dtype {labels.dtype}; expected {images.shape[:1]} integers, one per image.")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise InputError(f"{self.name}: labels reach from {labels.min()} to {labels.max()}; with {self.num_classes} classes, 0 to {self.num_classes - 1}.")
        channels = images.shape[-1]
        if len(self.mean) != channels or len(self.std) != channels or min(self.std) <= 0:
            raise InputError(f"{self.name}: mean={self.mean} and std={self.std} must give {channels} numbers each, std above 0.")

    def __len__(self) -> int:
        return len(self.images)

    def normalised(self, indices: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The images at ``indices`` as the network sees them, ``(n, H, W, C)`` float32."""
        images = self.images[indices].astype(np.float32)
        return (images - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


class Splits(NamedTuple):
    """Images to learn from, and images to judge by."""

    train: Dataset
    test: Dataset
