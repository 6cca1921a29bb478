"""Images and labels in one ``.npz`` archive."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_resblock.checkpoint.bounded import read_npz
from flax_resblock.errors import InputError
from flax_resblock.training.data.dataset import (
    HELD_OUT,
    Dataset,
    Splits,
    has_own_tests,
    held_out,
    pixel_moments,
    set_aside,
    splits_of,
)

_SPLIT = (
    ("x_train", "y_train", "x_test", "y_test"),
    ("train_images", "train_labels", "test_images", "test_labels"),
)
_WHOLE = ("images", "labels")


def npz_archive(path: Path, val_fraction: float | None = None) -> Splits[Dataset]:
    """Reads the arrays of an archive without unpickling anything.

    The arrays are ``x_train, y_train, x_test, y_test`` (Keras), ``train_images, train_labels,
    test_images, test_labels`` (MedMNIST), or ``images, labels``; then ``val_fraction`` of the
    images of each class, a fifth by default, become test images. Images are ``(N, H, W, C)`` or
    ``(N, H, W)``, uint8 or floating; labels ``(N,)`` or ``(N, 1)``, integers. ``mean`` and ``std``
    of the channels, for uint8 images on the scale from 0 to 1, replace the moments of the training
    pixels.

    Raises:
      InputError: Not such an archive, or arrays that do not fit together.
    """
    arrays = read_npz(path)
    notes: tuple[str, ...] = ()
    names = next((names for names in (*_SPLIT, _WHOLE) if set(names) <= set(arrays)), None)
    if names is None:
        expected = "; ".join(", ".join(names) for names in (*_SPLIT, _WHOLE))
        raise InputError(
            f"{path} has the arrays {', '.join(arrays) or 'none'}; expected one of these sets: "
            f"{expected}. Rename them."
        )
    pairs = [
        _pair(path, arrays, images, labels)
        for images, labels in zip(names[::2], names[1::2], strict=True)
    ]
    if val_fraction is not None and names != _WHOLE:
        raise has_own_tests(path, val_fraction)
    if names == _WHOLE:
        ((images, labels),) = pairs
        in_test = held_out(labels, val_fraction or HELD_OUT)
        if in_test.all():
            raise InputError(
                f"{path} has {len(images)} image; at least one training and one test image are "
                f"needed."
            )
        pairs = [(images[~in_test], labels[~in_test]), (images[in_test], labels[in_test])]
        notes = (set_aside(path.name, val_fraction or HELD_OUT, f"{in_test.sum():,}"),)
    mean, std = _moments(path, arrays, pairs[0][0])
    classes = int(pairs[0][1].max()) + 1
    train, test = splits_of(path.name, pairs, num_classes=classes, mean=mean, std=std)
    return Splits(replace(train, notes=notes), test)


def _pair(
    path: Path, arrays: dict[str, np.ndarray], images_name: str, labels_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Images ``(N, H, W, C)`` and labels ``(N,)`` int32 under two names."""
    images, labels = arrays[images_name], arrays[labels_name]
    floating = images.dtype.kind == "f"
    fitting = (
        images.ndim in (3, 4)
        and (floating or images.dtype == np.uint8)
        and labels.shape in (images.shape[:1], (*images.shape[:1], 1))
    )
    if not fitting or not images.size or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {images_name} is {images.dtype} {images.shape} and {labels_name} is "
            f"{labels.dtype} {labels.shape}; expected uint8 or floating "
            "(N, H, W, C) or (N, H, W), and N integers, N at least 1."
        )
    if floating and not np.isfinite(images).all():
        raise InputError(f"{path}: {images_name} holds NaN or infinities. Remove those images.")
    if labels.min() < 0 or labels.max() >= 2**31 - 1:
        raise InputError(
            f"{path}: {labels_name} reaches from {labels.min()} to {labels.max()}; labels "
            f"count the classes from 0."
        )
    return images[..., None] if images.ndim == 3 else images, labels.reshape(-1).astype(np.int32)


def _moments(
    path: Path, arrays: dict[str, np.ndarray], images: np.ndarray
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not {"mean", "std"} <= set(arrays):
        return pixel_moments(images)
    given = [np.ravel(arrays[name]) for name in ("mean", "std")]
    if any(values.dtype.kind not in "fiu" for values in given):
        raise InputError(
            f"{path}: mean and std must be numbers, one per channel; they are {given[0].dtype} "
            f"and {given[1].dtype}."
        )
    mean, std = (
        tuple((values.astype(np.float64) * (255 if images.dtype == np.uint8 else 1)).tolist())
        for values in given
    )
    return mean, std
