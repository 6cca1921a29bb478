"""IDX folders: MNIST, Fashion-MNIST, KMNIST and whatever else is written like them."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from flax_resblock.errors import InputError
from train.data.dataset import Dataset, Splits, pixel_moments

_GZIP = b"\x1f\x8b"
_PARTS = (("train", "train"), ("test", "t10k"))


def find_idx(folder: Path, stem: str, dimensions: int) -> Path | None:
    """``train-images-idx3-ubyte`` or ``train-images.idx3-ubyte``, each also with ``.gz``; None where there is none of them."""
    kind = {1: "labels", 3: "images"}[dimensions]
    names = [f"{stem}-{kind}{dot}idx{dimensions}-ubyte{suffix}" for dot in "-." for suffix in ("", ".gz")]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of unsigned bytes in an IDX file, compressed or not.

    Args:
      path: The file; gzip is recognised by its first bytes.
      dimensions: How many the array must have: 3 for images ``(N, H, W)``, 1 for labels ``(N,)``.
    Raises:
      InputError: Another magic number, another number of bytes than the header says, or damaged compression.
    Reference: http://yann.lecun.com/exdb/mnist/
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}). It may be cut off or damaged: fetch it again.") from error
    magic = bytes((0, 0, 8, dimensions))
    header = 4 + 4 * dimensions
    if not data.startswith(magic):
        raise InputError(
            f"{path} begins with 0x{data[:4].hex()}; an IDX file of unsigned bytes in {dimensions} dimension{'s' if dimensions > 1 else ''} begins with "
            f"0x{magic.hex()}. Images and labels may be exchanged, or it is another kind of file."
        )
    whole = len(data) >= header
    shape = tuple(np.frombuffer(data[4:header], ">u4").tolist()) if whole else ()
    size = header + math.prod(shape) if whole else header
    if len(data) != size:
        announced = f"its header announces {size:,}, an array {shape}" if whole else f"its header alone takes {header}"
        raise InputError(f"{path} has {len(data):,} bytes; {announced}. It may be cut off or damaged: fetch it again.")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def idx_folder(folder: Path) -> Splits[Dataset]:
    """The four files of an IDX folder, images ``(N, H, W, 1)`` uint8, normalised by the moments of the training pixels.

    There are as many classes as the largest training label says.

    Raises:
      InputError: A file that is missing, damaged, or does not fit its companion.
    """
    files = {(part, dimensions): find_idx(folder, stem, dimensions) for part, stem in _PARTS for dimensions in (3, 1)}
    missing = [
        f"{dict(_PARTS)[part]}-{'images-idx3' if dimensions == 3 else 'labels-idx1'}-ubyte" for (part, dimensions), path in files.items() if path is None
    ]
    if missing:
        raise InputError(f"{folder} is an IDX folder without {', '.join(missing)} (.gz also will do). Add what is missing.")
    arrays = {key: read_idx(path, key[1]) for key, path in files.items() if path is not None}
    for part, _ in _PARTS:
        images, labels = arrays[part, 3], arrays[part, 1]
        if len(images) != len(labels):
            raise InputError(f"{files[part, 3]} has {len(images):,} images, but {files[part, 1]} has {len(labels):,} labels. They belong to different data.")
        if not images.size:
            raise InputError(f"{files[part, 3]} has no pixels: its header says {images.shape}.")
    mean, std = pixel_moments(arrays["train", 3][..., None])
    classes = int(arrays["train", 1].max()) + 1
    parts = [
        Dataset(
            name=f"{folder.name}/{part}", images=arrays[part, 3][..., None], labels=arrays[part, 1].astype(np.int32), num_classes=classes, mean=mean, std=std
        )
        for part, _ in _PARTS
    ]
    return Splits(*parts)
