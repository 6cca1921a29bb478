"""Images as a network expects them: read from files, resized, cropped and normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from flax_resblock.config import Config, ResNetConfig
from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.errors import InputError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILTERS = {
    name: getattr(Image.Resampling, name.upper())
    for name in ("nearest", "bilinear", "bicubic", "lanczos")
}
"""Pillow's filters by the names that timm and transformers use."""


@dataclass(frozen=True)
class ImageBatch:
    """Images of one size with names.

    Attributes:
      pixels: ``(N, H, W, C)``, float32 from 0 to 1.
      names: One per image.
      labels: True classes, if the file has them.
      mean, std: Of the channels, if the file has them.
    """

    pixels: np.ndarray
    names: list[str]
    labels: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


def load_images(paths: Sequence[Path], preprocessing: Preprocessing, channels: int) -> ImageBatch:
    """Loads image files, or one ``.npz`` archive of images, which is not preprocessed.

    Raises:
      InputError: Both kinds together, or a file that cannot be read.
    """
    if any(path.suffix == ".npz" for path in paths):
        if len(paths) > 1:
            raise InputError("give one .npz archive, or image files, not both.")
        return _read_archive(paths[0])
    pixels = np.stack([read_image(path, preprocessing, channels) for path in paths])
    return ImageBatch(pixels, [path.name for path in paths])


def _read_archive(path: Path) -> ImageBatch:
    from flax_resblock.checkpoint.bounded import read_npz

    arrays = read_npz(path)
    images = arrays.get("images")
    if images is None or images.ndim != 4 or not len(images):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise InputError(f"{path} needs an array 'images' of shape (N, H, W, C); it has {shapes}.")
    pixels = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    names = [f"{path.name}[{number}]" for number in range(len(images))]
    return ImageBatch(pixels, names, arrays.get("labels"), arrays.get("mean"), arrays.get("std"))


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
      InputError: The file cannot be read as an image.
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
    ImageNet stems, plain resize for small ones; ImageNet's constants for RGB.
    """
    channels = config.in_channels
    mean, std, origin = (0.0,) * channels, (1.0,) * channels, "none (pixels from 0 to 1)"
    if channels == 3:
        mean, std, origin = IMAGENET_MEAN, IMAGENET_STD, "ImageNet's, the usual choice"
    if not isinstance(config, ResNetConfig) or config.image_size == 32:
        return Preprocessing(mean, std, (32, 32), 1.0, "bilinear", False, origin)
    return Preprocessing(mean, std, (224, 224), 224 / 256, "bilinear", True, origin)


def preprocessing_of(source: OpenedCheckpoint) -> Preprocessing:
    """The preprocessing in a checkpoint's ``config.json``, else the usual one for its network."""
    if source.hub is not None and source.hub.preprocessing is not None:
        return source.hub.preprocessing
    return default_preprocessing(source.config)


def normalisation_of(
    file: tuple[np.ndarray | None, np.ndarray | None],
    preprocessing: Preprocessing,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and standard deviation of the channels, and where they come from: as given by the user,
    else those in ``file``, an archive of images, else those of the network.
    """
    if (mean is None) != (std is None):
        raise InputError("give --mean and --std together.")
    if mean is not None and std is not None:
        chosen, origin = (mean, std), "as given"
    elif file[0] is not None and file[1] is not None:
        chosen, origin = (file[0], file[1]), "from the archive"
    else:
        chosen = (preprocessing.mean, preprocessing.std)
        origin = f"{preprocessing.origin}; --mean and --std change it"
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if np.size(values) != channels:
            raise InputError(
                f"--{name} needs {channels} values, one per channel; got {np.size(values)}."
            )
    if np.any(np.asarray(chosen[1]) <= 0):
        raise InputError("--std must be positive.")
    return np.asarray(chosen[0], np.float32), np.asarray(chosen[1], np.float32), origin
