"""Images from files as a network is to see them: resized, cropped, from 0 to 1."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.errors import InputError

FILTERS = {
    name: getattr(Image.Resampling, name.upper())
    for name in ("nearest", "bilinear", "bicubic", "lanczos")
}
"""Pillow's filters by the names that timm and transformers use."""


def read_image(path: Path, preprocessing: Preprocessing, channels: int) -> np.ndarray:
    """An image file, resized and cut to its centre: the same pixels as timm's evaluation transform
    on a PIL image.

    Args:
      path: PNG, JPEG or whatever else Pillow reads.
      preprocessing: Size, crop and filter.
      channels: 1 reads in shades of grey, anything else in colour.
    Returns:
      ``(height, width, channels)``, float32 from 0 to 1.
    Raises:
      InputError: No image that can be read.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is no image that can be read ({error}). Give PNG or JPEG files."
        ) from error
    height, width = preprocessing.size
    whole = int(height / preprocessing.crop_pct), int(width / preprocessing.crop_pct)
    image = image.resize(
        _resized(image, whole, preprocessing.keep_ratio),
        FILTERS.get(preprocessing.interpolation, Image.Resampling.BICUBIC),
    )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))  # what lies outside is black
    return np.asarray(image, np.float32).reshape(height, width, -1) / 255


def _resized(image: Image.Image, whole: tuple[int, int], keep_ratio: bool) -> tuple[int, int]:
    """Width and height that an image is resized to so that it covers ``whole`` (height, width)."""
    height, width = whole
    if not keep_ratio:
        return width, height
    if height == width:  # the longer side is cut off, not rounded, as torchvision computes it
        short, longer = min(image.size), int(height * max(image.size) / min(image.size))
        return (height, longer) if image.width == short else (longer, height)
    ratio = min(image.height / height, image.width / width)
    return round(image.width / ratio), round(image.height / ratio)
