"""The images that a command is given, and their normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.errors import InputError, some
from flax_resblock.images import default_preprocessing, pixels_of, read_image


@dataclass(frozen=True)
class ImageBatch:
    """Images of one size with names: ``pixels`` ``(N, H, W, C)``, float32 from 0 to 1; the true
    classes, and mean and standard deviation of the channels, if the file has them."""

    pixels: np.ndarray
    names: list[str]
    labels: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


def load_images(paths: Sequence[Path], preprocessing: Preprocessing, channels: int) -> ImageBatch:
    """Loads image files, or one ``.npz`` archive of images, which is not preprocessed; raises
    InputError for both kinds together, or a file that cannot be read."""
    if any(path.suffix == ".npz" for path in paths):
        if len(paths) > 1:
            raise InputError("give one .npz archive, or image files, not both.")
        return _read_archive(paths[0], preprocessing)
    pixels = np.stack([read_image(path, preprocessing, channels) for path in paths])
    names = [path.name for path in paths]
    if len(set(names)) < len(set(paths)):  # as in train/cat/15.png and train/dog/15.png
        names = [str(path) for path in paths]
    return ImageBatch(pixels, names)


def _read_archive(path: Path, preprocessing: Preprocessing) -> ImageBatch:
    from flax_resblock.checkpoint.bounded import read_npz

    arrays = read_npz(path)
    images = arrays.get("images")
    if images is None or images.ndim != 4 or not len(images):
        shapes = {name: array.shape for name, array in arrays.items()}
        raise InputError(f"{path} needs an array 'images' of shape (N, H, W, C); it has {shapes}.")
    mean, std = arrays.get("mean"), arrays.get("std")
    if mean is not None and std is not None:  # then the archive says its units, on that scale
        pixels = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
    else:
        pixels = pixels_of(images, preprocessing, f"{path}: its array 'images'")
    names = [f"{path.name}[{number}]" for number in range(len(images))]
    return ImageBatch(pixels, names, arrays.get("labels"), mean, std)


def refuse_nonfinite(logits: np.ndarray, names: Sequence[str]) -> None:
    """Raises InputError for images with logits ``(N, classes)`` from which no class follows."""
    wrong = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(wrong):
        whose = some([names[number] for number in wrong.tolist()])
        raise InputError(
            f"the network's logits are not finite for {len(wrong)} of {len(logits)} images: "
            f"{whose}. No class follows from them. Look for extreme "
            "values in the images and in the checkpoint. If both are as they should be, "
            "this version of jax computes the network wrongly: compare it with `flax-resblock "
            "verify`, and try another version."
        )


def preprocessing_of(source: OpenedCheckpoint) -> Preprocessing:
    """The preprocessing that a checkpoint says, else the usual one for its network."""
    return source.images.preprocessing or default_preprocessing(source.config)


def normalisation_of(
    file: tuple[np.ndarray | None, np.ndarray | None],
    preprocessing: Preprocessing,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and standard deviation of the channels, and where they come from: as given by the user,
    else those in ``file``, an archive of images, else those of the network."""
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
