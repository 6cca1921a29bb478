"""Images as a network expects them: read from files, resized, cropped and normalised."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_resblock.config import Config, ResNetConfig
from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.hubs.common import INTERPOLATIONS
from flax_resblock.convert.image_facts import carried_images
from flax_resblock.errors import AssumptionWarning, InputError, reason

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

if TYPE_CHECKING:
    from PIL import Image


def preprocess(
    images: Any,
    model: Any,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    image_size: int | None = None,
) -> np.ndarray:
    """Images as a model expects them: resized, cropped and normalised as its checkpoint says.

    Args:
      images: The path of an image file, or a sequence of paths, which are resized and cropped. Or
        an array of images in the size that the model gets, ``(N, H, W, C)``, or ``(H, W, C)`` for
        one: integers from 0 to 255, or floating pixels from 0 to 1. A model that was trained on
        arrays takes the units of those.
      model: From :func:`flax_resblock.load` or any other function that reads a checkpoint, or one
        that :func:`flax_resblock.training.fit` trained.
      mean, std: Of the channels, for pixels from 0 to 1; they replace the checkpoint's.
      image_size: Side of the square to which image files are resized and cropped.
    Returns:
      ``(N, H, W, C)``, float32.
    Raises:
      InputError: A file that is no image, an array outside its range or with another number of
        channels, or a model of your own of which nothing is known.
    Warns:
      AssumptionWarning: The checkpoint does not say; the usual size and normalisation are taken.
    Example:
      >>> logits = model(preprocess(["cat.jpg", "dog.jpg"], model))
    """
    if (mean is None) != (std is None):
        raise InputError("preprocess takes mean and std together; one of them is missing.")
    wanted = _wanted(model, assumed=mean is None or image_size is None)
    if mean is not None and std is not None:
        numbers = {"mean": tuple(map(float, mean)), "std": tuple(map(float, std))}
        wanted = replace(wanted, **numbers)
    if image_size is not None:
        wanted = replace(wanted, size=(image_size, image_size))
    channels = len(wanted.mean)
    if len(wanted.std) != channels or min(wanted.std) <= 0:
        raise InputError(f"std={wanted.std} has to be {channels} positive numbers, as mean has.")
    if isinstance(images, str | PathLike):
        images = [images]
    if isinstance(images, Sequence) and images and isinstance(images[0], str | PathLike):
        pixels = np.stack([read_image(Path(path), wanted, channels) for path in images])
    else:
        pixels = pixels_of(np.asarray(images), wanted, "the array")
    if pixels.shape[-1] != channels:
        raise InputError(
            f"the images have {pixels.shape[-1]} channels, and the model takes {channels}."
        )
    return normalised(pixels, wanted.mean, wanted.std)


def _wanted(model: Any, *, assumed: bool) -> Preprocessing:
    """What is known of a model's images, else what is usual; ``assumed`` warns of the latter."""
    known = carried_images(model).preprocessing
    if known is not None:
        return known
    config = getattr(model, "config", None)
    if config is None:
        raise InputError(
            f"nothing is known of the images that this {type(model).__name__} takes: it was "
            f"neither trained by this library nor read from a checkpoint that says so. Resize and "
            f"normalise them as your own code does."
        )
    usual = default_preprocessing(config)
    if assumed:
        warnings.warn(
            f"the checkpoint of this {type(model).__name__} does not say what its images are like; "
            f"assumed: {usual.size[0]}x{usual.size[1]} pixels, mean {usual.mean}, std {usual.std} "
            f"({usual.origin}). Pass mean, std and image_size if it was trained with others.",
            AssumptionWarning,
            stacklevel=3,
        )
    return usual


def pixels_of(images: np.ndarray, preprocessing: Preprocessing, name: str) -> np.ndarray:
    """An array of images with pixels from 0 to 1, or in the units of the network's own.

    Args:
      images: ``(N, H, W, C)`` or ``(H, W, C)``, integers or floating.
      preprocessing: Says which integer is white.
      name: Of the array, for messages.
    Returns:
      ``(N, H, W, C)``, float32.
    Raises:
      InputError: Another shape or dtype, or pixels out of range.
    """
    images = images[None] if images.ndim == 3 else images
    integers, white = images.dtype.kind in "iu", preprocessing.white
    if images.ndim != 4 or not images.size or not (integers or images.dtype.kind == "f"):
        raise InputError(
            f"{name} is {images.dtype} {images.shape}; images are an array (N, H, W, C) or "
            f"(H, W, C), of integers or floating."
        )
    if white is None:
        if integers:
            raise InputError(
                f"{name} is {images.dtype}, and the network was trained on floating images in "
                f"units of their own. Give images in those."
            )
        return images.astype(np.float32)
    most = white if integers else 1.0
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > most or not np.isfinite((low, high)).all():
        raise InputError(
            f"{name} is {images.dtype} with pixels from {low:g} to {high:g}; expected 0 to "
            f"{most:g}, which is white"
            + (", as in the data that the network was trained on." if white != 255 else ".")
            + ("" if integers else " Give integers for pixels from 0 to 255.")
        )
    return images.astype(np.float32) / np.float32(most)


def normalised(pixels: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """``(pixels - mean) / std`` per channel, float32."""
    return (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def read_image(path: Path, preprocessing: Preprocessing, channels: int) -> np.ndarray:
    """Reads an image file, resized and center-cropped to the same pixels as timm's evaluation
    transform on a PIL image.

    Args:
      path: PNG, JPEG or any other format that Pillow reads.
      preprocessing: Size, crop and filter.
      channels: 1 converts to grey, anything else to RGB.
    Returns:
      ``(height, width, channels)``, float32 from 0 to 1.
    Raises:
      InputError: The file cannot be read as an image, or the network's images have units of their
        own.
    """
    from PIL import Image  # takes long to import

    if preprocessing.white is None:
        raise InputError(
            f"{path} is an image file, and the network was trained on floating arrays in units of "
            f"their own, to which no file can be brought. Give an array in those units."
        )
    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except Exception as error:  # decoders raise many kinds for damaged files
        raise InputError(
            f"{path} cannot be read as an image ({reason(error)}). Give PNG or JPEG files."
        ) from error
    height, width = preprocessing.size
    whole = int(height / preprocessing.crop_pct), int(width / preprocessing.crop_pct)
    name = preprocessing.interpolation
    pillows = getattr(Image.Resampling, (name if name in INTERPOLATIONS else "bicubic").upper())
    image = image.resize(_resized(image, whole, preprocessing.keep_ratio), pillows)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    image = image.crop((left, top, left + width, top + height))  # black outside the image
    return np.asarray(image, np.float32).reshape(height, width, -1) / 255


def _resized(image: Image.Image, whole: tuple[int, int], keep_ratio: bool) -> tuple[int, int]:
    """Width and height at which an image covers ``whole`` (height, width)."""
    height, width = whole
    if not keep_ratio:
        return width, height
    if height == width:  # the longer side is truncated, not rounded, as in torchvision
        short, longer = min(image.size), int(height * max(image.size) / min(image.size))
        return (height, longer) if image.width == short else (longer, height)
    ratio = min(image.height / height, image.width / width)
    return round(image.width / ratio), round(image.height / ratio)


def default_preprocessing(config: Config) -> Preprocessing:
    """The usual preprocessing for a network: resize to ``size * 256 / 224`` and center crop for
    ImageNet stems, plain resize for small ones; ImageNet's constants for RGB."""
    channels = config.in_channels
    mean, std, origin = (0.0,) * channels, (1.0,) * channels, "none (pixels from 0 to 1)"
    if channels == 3:
        mean, std, origin = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's, the usual choice"
    if not isinstance(config, ResNetConfig) or config.image_size == 32:
        return Preprocessing(mean, std, (32, 32), 1.0, "bilinear", False, origin)
    return Preprocessing(mean, std, (224, 224), 224 / 256, "bilinear", True, origin)
