"""Scikit-learn's handwritten digits: 1797 grey images of 8x8 pixels, installed with the package."""

from __future__ import annotations

import numpy as np

from flax_resblock.errors import optional
from flax_resblock.training.data.dataset import Dataset, Splits, held_out, splits_of


def digits() -> Splits[Dataset]:
    """Loads 1437 training and 360 test images, ``(N, 8, 8, 1)`` uint8 in 0..16. The split is fixed
    and stratified. Both parts are normalised by the moments of the training pixels.

    Raises:
      MissingDependencyError: Scikit-learn is not installed.
    Reference: Alpaydin & Kaynak 1998, https://archive.ics.uci.edu/dataset/80
    """
    words = "the digits come with scikit-learn: pip install 'flax-resblock[train]'."
    bunch = optional("sklearn.datasets", words).load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    in_test = held_out(labels)
    pixels = images[~in_test].astype(np.float64)
    mean, std = (float(pixels.mean()),), (float(pixels.std()),)
    parts = [(images[chosen], labels[chosen]) for chosen in (~in_test, in_test)]
    names = tuple(str(digit) for digit in range(10))
    about = {"num_classes": 10, "class_names": names, "white": 16.0}
    return splits_of("digits", parts, mean=mean, std=std, **about)
