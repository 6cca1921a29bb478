"""Decodes and resizes images as torchvision does with PIL images."""

from __future__ import annotations

import numpy as np
from PIL import Image

from flax_resblock.errors import InputError


def decode(path: str) -> np.ndarray:
    """Decodes an image file of any mode to ``(h, w, 3)`` uint8, whatever its EXIF orientation, as
    torchvision's loader does; raises InputError if it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # decoders raise many kinds for damaged files
        raise InputError(
            f"{path} cannot be decoded ({_reason(error, path)}). Remove or replace it, and "
            f"start again."
        ) from error


def short_side(path: str) -> int:
    """Pixels of the shorter side of an image file, from its header."""
    with Image.open(path) as image:
        return min(image.size)


def damage(path: str) -> str | None:
    """Why an image cannot be decoded, or None. A JPEG is decoded at an eighth of its size."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
            image.convert("RGB")
    except Exception as error:  # see decode
        return _reason(error, path)
    return None


def _reason(error: Exception, path: str) -> str:
    unknown = path in str(error)
    return "no format that can be recognised" if unknown else str(error) or type(error).__name__


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes ``(h, w, C)`` uint8 to ``(height, width, C)``, bilinear with antialiasing."""

    def resized(plane: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.BILINEAR))

    if image.shape[-1] == 3:
        return resized(image)
    planes = np.ascontiguousarray(np.moveaxis(image, -1, 0))
    return np.stack([resized(plane) for plane in planes], axis=-1)


def shorter_side(size: int) -> int:
    """Pixels of the shorter side before the crop, in torchvision's proportion of 256 to 224."""
    return round(size * 256 / 224)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to ``round(size * 256 / 224)`` and takes the central square, as
    evaluation does.

    The result has the same bits as torchvision's ``Resize(round(size * 256 / 224))`` and
    ``CenterCrop(size)`` on a PIL image.

    Args:
      image: ``(h, w, C)``, uint8.
      size: Side of the square in pixels.
    Returns:
      ``(size, size, C)``, uint8.
    """
    height, width, _ = image.shape
    short = shorter_side(size)
    long = int(short * max(height, width) / min(height, width))  # truncated, as in torchvision
    image = resize(image, *((short, long) if height <= width else (long, short)))
    top, left = round((image.shape[0] - size) / 2), round((image.shape[1] - size) / 2)
    return image[top : top + size, left : left + size]
