"""CIFAR-10 and CIFAR-100 in the binary and the Python distribution."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.bounded import check_file
from flax_resblock.errors import InputError, reason
from flax_resblock.training.data.cifar_pickle import read_cifar_pickle
from flax_resblock.training.data.dataset import Dataset, Splits, pixel_moments, splits_of

_PIXELS = 3 * 32 * 32
_MOST_BYTES = 1 << 30
"""Largest size of a file; the largest one distributed has 155 MB."""


@dataclass(frozen=True)
class Edition:
    """One distribution of one of the two data sets.

    Attributes:
      folder: The folder in its archive.
      meta: File with the names of the classes.
      label: Position of a label in the head of a binary record, or its key in a pickle.
      head: Bytes before the pixels of a binary record; 0 for pickles.
      names: Key of the class names in a pickled ``meta``.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    meta: str
    label: int | bytes
    head: int = 0
    names: bytes = b""

    @property
    def name(self) -> str:
        """Name of the data set, ``"cifar-10"`` or ``"cifar-100"``."""
        return "-".join(self.folder.split("-")[:2])

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return int(self.name.removeprefix("cifar-"))

    def within(self, folder: Path) -> bool:
        """Whether ``folder`` holds two of the first training file, the test file and the names."""
        names = (self.train[0], self.test[0], self.meta)
        return sum((folder / name).is_file() for name in names) >= 2


_TEN = tuple(f"data_batch_{number}" for number in range(1, 6))
_TEN_BIN = tuple(f"{name}.bin" for name in _TEN)
EDITIONS = (
    Edition("cifar-10-batches-bin", _TEN_BIN, ("test_batch.bin",), "batches.meta.txt", 0, head=1),
    Edition(
        "cifar-10-batches-py", _TEN, ("test_batch",), "batches.meta", b"labels", 0, b"label_names"
    ),
    Edition("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt", 1, head=2),
    Edition(
        "cifar-100-python", ("train",), ("test",), "meta", b"fine_labels", names=b"fine_label_names"
    ),
)


def _read(path: Path) -> bytes:
    try:
        check_file(path, _MOST_BYTES)
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}). It belongs to the data set: unpack the "
            f"archive again."
        ) from error


def _records(path: Path, edition: Edition) -> tuple[np.ndarray, np.ndarray]:
    """Planes ``(N, 3072)`` and labels ``(N,)`` of a binary file."""
    data = _read(path)
    size = edition.head + _PIXELS
    if not data or len(data) % size:
        raise InputError(
            f"{path} has {len(data):,} bytes; a file of {edition.name} has a multiple of "
            f"{size:,}. It is cut off or damaged: fetch it again."
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return records[:, edition.head :], records[:, int(edition.label)].astype(np.int32)


def _pickled(path: Path, edition: Edition) -> tuple[np.ndarray, np.ndarray]:
    """Planes ``(N, 3072)`` and labels ``(N,)`` of a pickled file."""
    content = read_cifar_pickle(_read(path), str(path))
    planes, labels = content.get(b"data"), content.get(bytes(edition.label))
    if not isinstance(planes, np.ndarray) or planes.ndim != 2 or planes.shape[1] != _PIXELS:
        found = planes.shape if isinstance(planes, np.ndarray) else type(planes).__name__
        raise InputError(
            f"{path}: 'data' is {found}; {edition.name} has an array (N, {_PIXELS}) of "
            f"unsigned bytes. Fetch it again."
        )
    if (
        not isinstance(labels, list)
        or len(labels) != len(planes)
        or not all(type(label) is int and 0 <= label < 2**31 for label in labels)
    ):
        found = f"{len(labels)} entries" if isinstance(labels, list) else type(labels).__name__
        raise InputError(
            f"{path}: '{bytes(edition.label).decode()}' is {found}; expected a list of "
            f"{len(planes)} whole numbers, one per image."
        )
    return planes, np.asarray(labels, np.int32)


def _class_names(folder: Path, edition: Edition) -> tuple[str, ...] | None:
    path = folder / edition.meta
    if not path.is_file():
        return None
    data = _read(path)
    pickled = read_cifar_pickle(data, str(path)) if edition.names else None
    names: Any = data.split() if pickled is None else pickled.get(edition.names)
    texts = isinstance(names, list) and all(isinstance(name, bytes | str) for name in names)
    if not texts or len(names) != edition.num_classes:
        raise InputError(
            f"{path} does not name the {edition.num_classes} classes of {edition.name}. Remove "
            f"it (names are optional) or fetch it again."
        )
    return tuple(one if isinstance(one, str) else one.decode("utf-8", "replace") for one in names)


def cifar_folder(folder: Path, edition: Edition) -> Splits[Dataset]:
    """Reads all files of an edition: images ``(N, 32, 32, 3)`` uint8, normalised by the moments of
    the training pixels; CIFAR-100 with its fine labels.

    Raises:
      InputError: A file that is missing, cut off, or holds something else; labels out of range.
    Reference: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html
    """
    missing = [name for name in (*edition.train, *edition.test) if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{folder} is {edition.name} without {', '.join(missing)}. Unpack its archive again."
        )
    names = _class_names(folder, edition)

    def part(files: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        read = [(_records if edition.head else _pickled)(folder / name, edition) for name in files]
        planes, labels = (np.concatenate(arrays) for arrays in zip(*read, strict=True))
        wrong = np.flatnonzero(labels >= edition.num_classes)
        if len(wrong):
            raise InputError(
                f"{folder}: image {wrong[0]} of {', '.join(files)} has label {labels[wrong[0]]}; "
                f"{edition.name} has labels 0 to {edition.num_classes - 1}. The files are damaged "
                "or of another data set."
            )
        return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels

    parts = part(edition.train), part(edition.test)
    mean, std = pixel_moments(parts[0][0])
    shared = {"num_classes": edition.num_classes, "class_names": names, "mean": mean, "std": std}
    return splits_of(edition.name, parts, **shared)
