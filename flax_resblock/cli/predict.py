"""``flax-resblock predict``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.table import Table

from flax_resblock.architecture import Config, ResNetConfig, name_of
from flax_resblock.cli.common import Checkpoint, ReadingFlags, output, print_notes, print_table, refuse_unhealthy, status
from flax_resblock.errors import InputError

MANIFEST = "manifest.json"
"""Marks the folder of an exported network."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE...", help="PNG or JPEG files, or an .npz with 'images' (N, H, W, C), uint8.")
]


@dataclass(frozen=True)
class Batch:
    """Images of one size with names.

    Attributes:
      pixels: ``(N, H, W, C)``, float32 from 0 to 1.
      names: One per image.
      labels: True classes where the file had them.
      mean, std: Of the channels where the file had them.
    """

    pixels: np.ndarray
    names: list[str]
    labels: np.ndarray | None = None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None


def _read_npz(path: Path) -> Batch:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in archive.files}
    except Exception as error:  # zipfile, numpy and OS errors alike mean that it is no such file
        raise InputError(f"{path} is not an .npz archive of plain arrays ({error}).") from error
    images = arrays.get("images")
    if images is None or images.ndim != 4 or not len(images):
        raise InputError(f"{path} needs an array 'images' of shape (N, H, W, C); it has { ({k: v.shape for k, v in arrays.items()}) }.")
    scaled = images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    names = [f"{path.name}[{i}]" for i in range(len(images))]
    return Batch(scaled, names, arrays.get("labels"), arrays.get("mean"), arrays.get("std"))


def _read_image(path: Path, size: int, crop: bool, channels: int) -> np.ndarray:
    """Short side to ``size * 256 / 224`` and centre crop for ImageNet stems, plain resize for small ones; antialiased bilinear."""
    from PIL import Image

    from train.data.images import fit, resize

    try:
        with Image.open(path) as opened:
            image = opened.convert("L" if channels == 1 else "RGB")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no image that can be read ({error}). Give PNG or JPEG files.") from error
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    pixels = fit(pixels, size) if crop else resize(pixels, size, size)
    return pixels.astype(np.float32) / 255


def _load(paths: Sequence[Path], config: ResNetConfig, image_size: int | None) -> Batch:
    archives = [path for path in paths if path.suffix == ".npz"]
    if archives:
        if len(paths) > 1:
            raise InputError("give one .npz archive, or image files, not both.")
        return _read_npz(paths[0])
    imagenet = config.stem == "imagenet"
    size = image_size or (224 if imagenet else 32)
    return Batch(np.stack([_read_image(path, size, imagenet, config.in_channels) for path in paths]), [path.name for path in paths])


def normalisation_of(
    file_mean: np.ndarray | None, file_std: np.ndarray | None, config: Config, mean: Sequence[float] | None, std: Sequence[float] | None, file: str = "archive"
) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and standard deviation of the channels, and where they come from.

    Args:
      file_mean, file_std: Of the archive of images, or whatever ``file`` names.
      config: Of the network.
      mean, std: As given by the person.
      file: Where the first two come from.
    """
    if (mean is None) != (std is None):
        raise InputError("give --mean and --std together.")
    if mean is not None and std is not None:
        chosen, origin = (mean, std), "as given"
    elif file_mean is not None and file_std is not None:
        chosen, origin = (file_mean, file_std), f"from the {file}"
    elif config.in_channels == 3:
        chosen, origin = (IMAGENET_MEAN, IMAGENET_STD), "ImageNet's, the usual choice; --mean and --std change it"
    else:
        chosen, origin = ((0.0,) * config.in_channels, (1.0,) * config.in_channels), "none (pixels from 0 to 1); --mean and --std change it"
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if np.size(values) != config.in_channels:
            raise InputError(f"--{name} needs {config.in_channels} values, one per channel; got {np.size(values)}.")
    if np.any(np.asarray(chosen[1]) <= 0):
        raise InputError("--std must be positive.")
    return np.asarray(chosen[0], np.float32), np.asarray(chosen[1], np.float32), origin


def _class_names(file: Path | None, count: int) -> list[str]:
    if file is None:
        return [f"class {i}" for i in range(count)]
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({error}).") from error
    if len(names) != count:
        raise InputError(f"{file} has {len(names)} lines; the network has {count} classes, one name per line.")
    return names


@dataclass(frozen=True)
class _Network:
    """What predicts: a checkpoint, or an exported network.

    Attributes:
      config: What it is.
      forward: Normalised images ``(N, H, W, C)``, float32, to logits.
      image_size: That images are brought to; None: the usual one of the stem.
      mean, std: Of the channels, where an exported network records them.
      notes: On how it was read.
    """

    config: Config
    forward: Callable[[np.ndarray], Any]
    image_size: int | None
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    notes: tuple[str, ...] = ()


def _open(path: Path, reading: ReadingFlags, image_size: int | None, allow_nonfinite: bool) -> _Network:
    if (path / MANIFEST).is_file():
        return _open_exported(path, image_size)
    source = reading.open(path)
    refuse_unhealthy(source, allow_nonfinite)

    def forward(images: np.ndarray) -> Any:
        import jax
        from flax import nnx

        from flax_resblock.transfer import to_model

        graphdef, state = nnx.split(to_model(source))
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)

    return _Network(source.config, forward, image_size, notes=source.notes)


def _open_exported(folder: Path, image_size: int | None) -> _Network:
    from flax_resblock.export import open_exported

    exported = open_exported(folder)
    if exported.fixed_size is not None and image_size not in (None, exported.fixed_size):
        raise InputError(f"{folder} was exported for images of {exported.fixed_size} pixels; leave --image-size out, or export with --any-image-size.")
    recorded = exported.manifest.get("preprocessing", {})
    mean, std = (np.asarray(recorded[name], np.float32) if name in recorded else None for name in ("mean", "std"))
    return _Network(exported.config, exported, image_size or exported.fixed_size, mean, std)


def predict(
    checkpoint: Checkpoint,
    images: Images,
    reading: ReadingFlags,
    top: int = 3,
    class_names: Path | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    image_size: int | None = None,
    logits: Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
) -> int:
    """Classifies images with a checkpoint of any format, or with the folder that export wrote, in JAX.

    Args:
      reading: How to read the checkpoint.
      top: How many classes to show.
      class_names: Text file with one class name per line.
      mean: Of the channels, for pixels from 0 to 1.
      std: Of the channels.
      image_size: Side of the square that images are brought to; 224 (centre crop) for ImageNet stems, 32 for small ones.
      logits: Also write the logits (N, classes) to this .npy file.
      force: Replace that file if it exists.
      allow_nonfinite: Use the checkpoint even if it holds NaN, infinities or negative variances.
    """
    from flax_resblock.checkpoint.atomic import refuse_existing, replacing

    if not images:
        raise InputError("give at least one image, or an .npz archive of images.")
    if top < 1 or (image_size is not None and image_size < 1):
        raise InputError(f"--top {top} and --image-size {image_size} must be positive.")
    if logits is not None:
        refuse_existing(logits, force)
    network = _open(checkpoint, reading, image_size, allow_nonfinite)
    config = network.config
    if not isinstance(config, ResNetConfig) or config.num_classes is None:
        raise InputError(f"{checkpoint} is a {name_of(config)} without a classification head; predict needs a network with logits.")
    batch = _load(images, config, network.image_size)
    if batch.pixels.shape[-1] != config.in_channels:
        raise InputError(f"{images[0]} has {batch.pixels.shape[-1]} channels; the network takes {config.in_channels}.")
    found = (batch.mean, batch.std, "archive") if batch.mean is not None and batch.std is not None else (network.mean, network.std, "export")
    shift, scale, origin = normalisation_of(found[0], found[1], config, mean, std, file=found[2])
    names = _class_names(class_names, config.num_classes)

    with status.status("predicting"):
        values = np.asarray(network.forward((batch.pixels - shift) / scale), np.float32)
    output.print(f"[bold]{name_of(config)}[/]  {checkpoint}; normalisation {origin}", soft_wrap=True)
    print_notes(network.notes)
    _print_predictions(values, batch, names, top)
    if logits is not None:
        with replacing(logits, force=force) as temporary, temporary.open("wb") as handle:
            np.save(handle, values)
        output.print(f"wrote {logits}", markup=False)
    return 0


def _print_predictions(logits: np.ndarray, batch: Batch, names: list[str], top: int) -> None:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    top = min(top, logits.shape[1])
    table = Table("image", *(["label"] if batch.labels is not None else []), *(f"top {i}" for i in range(1, top + 1)))
    for i, name in enumerate(batch.names):
        order = np.argsort(-logits[i], kind="stable")[:top]
        label = [] if batch.labels is None else [names[int(batch.labels[i])]]
        table.add_row(name, *label, *(f"{names[j]} {probabilities[i, j]:.1%}" for j in order))
    print_table(table)
    if batch.labels is not None:
        right = int(np.sum(logits.argmax(axis=1) == batch.labels))
        output.print(f"{right} of {len(logits)} right", style="bold")
