"""IDX folders, the format of MNIST, Fashion-MNIST and KMNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from flax_resblock.checkpoint.bounded import MOST_BYTES, check_file
from flax_resblock.errors import InputError, reason
from flax_resblock.training.data.dataset import Dataset, Splits, pixel_moments, splits_of

_GZIP = b"\x1f\x8b"
_PARTS = (("train", "train"), ("test", "t10k"))


def find_idx(folder: Path, stem: str, dimensions: int) -> Path | None:
    """Finds ``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, also with ``.gz``."""
    kind = {1: "labels", 3: "images"}[dimensions]
    names = [f"{stem}-{kind}{dot}idx{dimensions}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, dimensions: int, most: int = MOST_BYTES) -> np.ndarray:
    """Reads the array of unsigned bytes in an IDX file, compressed or not.

    Args:
      path: The file; gzip is recognised by its first bytes.
      dimensions: Number of axes: 3 for images ``(N, H, W)``, 1 for labels ``(N,)``.
      most: Largest size of the array in bytes.
    Raises:
      InputError: Another magic number, another number of bytes than the header says, more than
        ``most``, or damaged compression.
    Reference: http://yann.lecun.com/exdb/mnist/
    """
    magic = bytes((0, 0, 8, dimensions))
    header = 4 + 4 * dimensions
    try:
        check_file(path, most)
        with path.open("rb") as plain, _opened(plain) as file:
            head = file.read(header)
            if not head.startswith(magic):
                raise InputError(
                    f"{path} begins with 0x{head[:4].hex()}; an IDX file of unsigned bytes in "
                    f"{dimensions} dimension{'s' if dimensions > 1 else ''} "
                    f"begins with 0x{magic.hex()}. Images and labels may be exchanged, or it "
                    f"is another kind of file."
                )
            whole = len(head) == header
            shape = tuple(np.frombuffer(head[4:], ">u4").tolist()) if whole else ()
            size = math.prod(shape) if whole else 0
            announced = (
                f"its header announces {header + size:,}, an array {shape}"
                if whole
                else f"its header alone takes {header}"
            )
            compressed = isinstance(file, gzip.GzipFile)
            if compressed and size > most:
                raise InputError(
                    f"{path} is compressed, and {announced}; at most {most:,} are read into "
                    f"memory. It may be damaged: fetch it again."
                )
            found = path.stat().st_size - header
            data = file.read(size + 1) if compressed or found == size else b""
            found = len(data) if compressed else found
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}). It may be cut off or damaged: "
            f"fetch it again."
        ) from error
    if not whole or found != size:
        more = "more than " if compressed and found > size else ""
        raise InputError(
            f"{path} has {more}{header + found - bool(more):,} bytes; {announced}. It may be "
            f"cut off or damaged: fetch it again."
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


def _opened(plain: BinaryIO) -> BinaryIO | gzip.GzipFile:
    compressed = plain.read(len(_GZIP)) == _GZIP
    plain.seek(0)
    return gzip.GzipFile(fileobj=plain) if compressed else plain


def idx_folder(folder: Path) -> Splits[Dataset]:
    """Reads the four files of an IDX folder: images ``(N, H, W, 1)`` uint8, normalised by the
    moments of the training pixels. The largest training label gives the number of classes.

    Raises:
      InputError: A file that is missing, damaged, or does not fit its companion.
    """
    files = {(part, axes): find_idx(folder, stem, axes) for part, stem in _PARTS for axes in (3, 1)}
    missing = [
        f"{dict(_PARTS)[part]}-{'images-idx3' if dimensions == 3 else 'labels-idx1'}-ubyte"
        for (part, dimensions), path in files.items()
        if path is None
    ]
    if missing:
        raise InputError(
            f"{folder} is an IDX folder without {', '.join(missing)} (.gz also will do). Add "
            f"what is missing."
        )
    arrays = {key: read_idx(path, key[1]) for key, path in files.items() if path is not None}
    for part, _ in _PARTS:
        images, labels = arrays[part, 3], arrays[part, 1]
        if len(images) != len(labels):
            raise InputError(
                f"{files[part, 3]} has {len(images):,} images, but {files[part, 1]} has "
                f"{len(labels):,} labels. They belong to different data."
            )
        if not images.size:
            raise InputError(f"{files[part, 3]} has no pixels: its header says {images.shape}.")
    mean, std = pixel_moments(arrays["train", 3][..., None])
    classes = int(arrays["train", 1].max()) + 1
    parts = [(arrays[part, 3][..., None], arrays[part, 1].astype(np.int32)) for part, _ in _PARTS]
    return splits_of(folder.name, parts, num_classes=classes, mean=mean, std=std)
