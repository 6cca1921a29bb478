"""What a network that was trained on data has to be told of its images later."""

from __future__ import annotations

import math

import numpy as np

from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.image_facts import ImageFacts
from flax_resblock.training.data.dataset import Dataset, DataSource
from flax_resblock.training.data.folder import FolderDataset
from flax_resblock.training.data.images import shorter_side


def image_facts(source: DataSource) -> ImageFacts:
    """Class names, size, crop and normalisation of the evaluation images of a source."""
    height, width, _ = source.shape
    white = _white(source)
    unit = white or 1.0
    mean, std = (tuple(value / unit for value in each) for each in (source.mean, source.std))
    cropped = isinstance(source, FolderDataset)
    part = _kept_part(height, shorter_side(height)) if cropped else 1.0
    wanted = (height, width), part, "bilinear", cropped
    origin = f"as {source.name}"
    return ImageFacts(Preprocessing(mean, std, *wanted, origin, white), source.class_names or ())


def _white(source: DataSource) -> float | None:
    """The pixel value of white; None for floating pixels that do not lie between 0 and 1."""
    pixels = source.fitted(slice(0)).dtype
    if np.issubdtype(pixels, np.integer):
        return getattr(source, "white", None) or 255.0
    within = isinstance(source, Dataset) and source.images.min() >= 0 and source.images.max() <= 1
    return 1.0 if within else None


def _kept_part(size: int, short: int) -> float:
    """The part of the shorter side that a crop keeps, such that ``int(size / part) == short``."""
    part = size / short
    while int(size / part) < short:
        part = math.nextafter(part, 0)
    return part
