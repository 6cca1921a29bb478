"""Mixup and CutMix: each image of a batch is mixed with the one before it, as in torchvision."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flax_resblock.training.data.augment import Augmentation


class Mixing(NamedTuple):
    """How a batch is mixed.

    Attributes:
      weight: Share of an image's own label, in [0, 1].
      box: Top, left, bottom and right of the region taken from the partner; None averages all
        pixels.
    """

    weight: float
    box: tuple[int, int, int, int] | None


def draw_mixing(
    augmentation: Augmentation, rng: np.random.Generator, height: int, width: int
) -> Mixing:
    """Draws the mixing of a batch of images of ``height`` by ``width`` pixels."""
    cut = augmentation.cutmix > 0 and (augmentation.mixup == 0 or rng.random() < 0.5)
    alpha = augmentation.cutmix if cut else augmentation.mixup
    weight = float(rng.beta(alpha, alpha))
    return (
        cut_box(weight, rng.random(), rng.random(), height, width) if cut else Mixing(weight, None)
    )


def cut_box(weight: float, row: float, column: float, height: int, width: int) -> Mixing:
    """A box of ``1 - weight`` of the area around a point in [0, 1), cut off at the border; the
    weight becomes the share of the pixels outside it.
    """
    half = 0.5 * math.sqrt(1 - weight)
    middle_row, middle_column = int(row * height), int(column * width)
    half_height, half_width = int(half * height), int(half * width)
    top, bottom = max(middle_row - half_height, 0), min(middle_row + half_height, height)
    left, right = max(middle_column - half_width, 0), min(middle_column + half_width, width)
    share = (bottom - top) * (right - left) / (height * width)
    return Mixing(1 - share, (top, left, bottom, right))


def mix(images: np.ndarray, partners: np.ndarray, mixing: Mixing) -> np.ndarray:
    """Mixes normalised images with their partners, ``(N, H, W, C)`` float32."""
    if mixing.box is None:
        return np.float32(mixing.weight) * images + np.float32(1 - mixing.weight) * partners
    top, left, bottom, right = mixing.box
    mixed = images.copy()
    mixed[:, top:bottom, left:right] = partners[:, top:bottom, left:right]
    return mixed
