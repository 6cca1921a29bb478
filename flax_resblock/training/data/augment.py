"""Random crops and flips of raw pixels: random choices, and pure functions of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flax_resblock.errors import InputError
from flax_resblock.training.data.dataset import Dataset, DataSource
from flax_resblock.training.data.images import resize
from flax_resblock.training.errors import check_fields

_ATTEMPTS = 10
_ASPECTS = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of the training images.

    Attributes:
      pad: Zero pixels added on each side before a window of the original size is cut out.
      flip: Mirror each image left to right with probability 1/2.
      random_resized_crop: Least and greatest share of an image's area; a random window of such an
        area and of an aspect ratio from 3/4 to 4/3 is resized. ImageNet's usual range is 0.08 to 1.
      size: Side in pixels of the resized crop; None takes that of the evaluation images.
      mixup: Alpha of mixup's beta distribution; 0 disables it.
      cutmix: Alpha of CutMix's beta distribution; 0 disables it. With both, each batch takes one of
        them with equal chances.
    Raises:
      InputError: A value out of its range; the message names it.
    Reference: Szegedy et al. 2014, arXiv:1409.4842 (resized crops); Zhang et al. 2017,
      arXiv:1710.09412 (mixup); Yun et al. 2019, arXiv:1905.04899 (CutMix)
    """

    pad: int = 0
    flip: bool = False
    random_resized_crop: tuple[float, float] | None = None
    size: int | None = None
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, self._rules())

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        pad, area, size = self.pad, self.random_resized_crop, self.size
        yield "pad", isinstance(pad, int) and pad >= 0, "0 or a positive number of pixels"
        in_range = area is None or (len(area) == 2 and 0 < area[0] <= area[1] <= 1)
        shares = "two shares of the area, 0 < least <= greatest <= 1"
        yield "random_resized_crop", in_range, shares
        only_one = f"None where pad is {pad}: both cut a window; take one"
        yield "random_resized_crop", area is None or not pad, only_one
        positive = size is None or (isinstance(size, int) and size >= 1)
        yield "size", positive, "a positive number of pixels"
        needless = "None without random_resized_crop, whose output it is"
        yield "size", size is None or area is not None, needless
        for name in ("mixup", "cutmix"):
            valid = math.isfinite(alpha := getattr(self, name)) and alpha >= 0
            yield name, valid, "0 or a positive number, the alpha of a beta distribution"

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0

    def shape_of(self, source: DataSource) -> tuple[int, int, int]:
        """``(H, W, C)`` of the augmented images; raises InputError if they do not suit it."""
        height, width, channels = source.shape
        if self.pad >= min(height, width):
            raise InputError(
                f"pad={self.pad} is not below the {min(height, width)} pixels that the images "
                f"of {source.name} have on their shorter side."
            )
        dtype = source.images.dtype if isinstance(source, Dataset) else np.uint8
        if self.random_resized_crop is not None and dtype != np.uint8:
            raise InputError(
                f"random_resized_crop needs uint8 images; those of {source.name} are {dtype}. Take "
                "pad and flip."
            )
        return (self.size, self.size, channels) if self.size else (height, width, channels)


class Choices(NamedTuple):
    """Random numbers in [0, 1) for ``N`` images.

    Attributes:
      place: Position of the window, ``(N, 2)``.
      mirror: ``(N,)``.
      windows: Windows to try, ``(N, 10, 4)``; None without resized crops.
    """

    place: np.ndarray
    mirror: np.ndarray
    windows: np.ndarray | None

    def of(self, rows: np.ndarray) -> Choices:
        """The numbers for some of the images."""
        windows = None if self.windows is None else self.windows[rows]
        return Choices(self.place[rows], self.mirror[rows], windows)


def draw(augmentation: Augmentation, rng: np.random.Generator, count: int) -> Choices:
    """Draws the numbers for ``count`` images."""
    uniform = rng.random((count, 3))
    crop = augmentation.random_resized_crop is not None
    windows = rng.random((count, _ATTEMPTS, 4)) if crop else None
    return Choices(uniform[:, :2], uniform[:, 2], windows)


def augmented(
    augmentation: Augmentation, source: DataSource, indices: np.ndarray, choices: Choices
) -> np.ndarray:
    """The images at ``indices``, augmented but not yet mixed, ``(n, H, W, C)``, as stored."""
    area = augmentation.random_resized_crop
    if area is not None and choices.windows is not None:
        height, width, _ = augmentation.shape_of(source)
        pairs = zip(indices.tolist(), choices.windows, strict=True)
        images = np.stack(
            [_resized_crop(source.raw(index), area, tries, height, width) for index, tries in pairs]
        )
    else:
        images = source.fitted(indices)
    if augmentation.pad:
        corners = np.floor(choices.place * (2 * augmentation.pad + 1)).astype(np.int64)
        images = pad_crop(images, augmentation.pad, corners)
    if augmentation.flip:
        mirrored = choices.mirror < 0.5
        images[mirrored] = images[mirrored, :, ::-1]
    return images


def pad_crop(images: np.ndarray, pad: int, corners: np.ndarray) -> np.ndarray:
    """Pads images ``(N, H, W, C)`` with ``pad`` zeros on each side and cuts out windows of their
    size, whose upper left ``corners``, ``(N, 2)``, are in the padded images, from 0 to ``2 * pad``.
    """
    _, height, width, _ = images.shape
    padded = np.pad(images, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    windows = np.empty_like(images)
    for window, canvas, (top, left) in zip(windows, padded, corners.tolist(), strict=True):
        window[:] = canvas[top : top + height, left : left + width]
    return windows


def crop_window(
    height: int, width: int, area: tuple[float, float], tries: np.ndarray
) -> tuple[int, int, int, int]:
    """Chooses the window of a random resized crop as torchvision's ``RandomResizedCrop`` does from
    the same uniform numbers.

    Args:
      height, width: Size of the image.
      area: Least and greatest share of the area.
      tries: Numbers in [0, 1) for area, aspect ratio, row and column of each attempt, ``(attempts,
        4)``. The first window that lies in the image is taken, or else the largest central one
        whose aspect ratio is allowed.
    Returns:
      Top, left, height and width.
    """
    least, greatest = (math.log(aspect) for aspect in _ASPECTS)
    for share, aspect, row, column in tries.tolist():
        target = height * width * (area[0] + share * (area[1] - area[0]))
        ratio = math.exp(least + aspect * (greatest - least))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(row * (height - h + 1)), int(column * (width - w + 1)), h, w
    h, w = min(height, round(width / _ASPECTS[0])), min(width, round(height * _ASPECTS[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized_crop(
    image: np.ndarray, area: tuple[float, float], tries: np.ndarray, height: int, width: int
) -> np.ndarray:
    top, left, h, w = crop_window(image.shape[0], image.shape[1], area, tries)
    return resize(image[top : top + h, left : left + w], height, width)
