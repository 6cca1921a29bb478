"""``flax-resblock predict``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.markup import escape
from rich.table import Table

from flax_resblock.cli.common import (
    Checkpoint,
    ReadingFlags,
    output,
    print_notes,
    print_table,
    refuse_unhealthy,
    status,
)
from flax_resblock.cli.images import read_image
from flax_resblock.config import Config, ResNetConfig, name_of
from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.errors import InputError

MANIFEST = "manifest.json"
"""Marks the folder of an exported network."""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Images = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="IMAGE...", help="PNG or JPEG files, or an .npz with 'images' (N, H, W, C), uint8."
    ),
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
    from flax_resblock.training.data.bounded import read_npz

    arrays = read_npz(path)
    images = arrays.get("images")
    if images is None or images.ndim != 4 or not len(images):
        raise InputError(
            f"{path} needs an array 'images' of shape (N, H, W, C); it has "
            f"{ ({k: v.shape for k, v in arrays.items()}) }."
        )
    scaled = (
        images.astype(np.float32) / 255 if images.dtype == np.uint8 else images.astype(np.float32)
    )
    names = [f"{path.name}[{i}]" for i in range(len(images))]
    return Batch(scaled, names, arrays.get("labels"), arrays.get("mean"), arrays.get("std"))


def _default_preprocessing(config: Config) -> Preprocessing:
    """A shorter side of ``size * 256 / 224`` and a centre crop for ImageNet stems, plain resize for
    small ones; ImageNet's constants for colour.
    """
    colour = config.in_channels == 3
    mean, std = (
        (IMAGENET_MEAN, IMAGENET_STD)
        if colour
        else ((0.0,) * config.in_channels, (1.0,) * config.in_channels)
    )
    origin = "ImageNet's, the usual choice" if colour else "none (pixels from 0 to 1)"
    if not isinstance(config, ResNetConfig) or config.stem == "cifar":
        return Preprocessing(mean, std, (32, 32), 1.0, "bilinear", False, origin)
    return Preprocessing(mean, std, (224, 224), 224 / 256, "bilinear", True, origin)


def preprocessing_of(source: OpenedCheckpoint) -> Preprocessing:
    """What a checkpoint's ``config.json`` says of its images; else the usual choice for its
    network.
    """
    hub = source.hub
    return (
        hub.preprocessing
        if hub is not None and hub.preprocessing is not None
        else _default_preprocessing(source.config)
    )


def _load(paths: Sequence[Path], preprocessing: Preprocessing, channels: int) -> Batch:
    archives = [path for path in paths if path.suffix == ".npz"]
    if archives:
        if len(paths) > 1:
            raise InputError("give one .npz archive, or image files, not both.")
        return _read_npz(paths[0])
    return Batch(
        np.stack([read_image(path, preprocessing, channels) for path in paths]),
        [path.name for path in paths],
    )


def normalisation_of(
    file: tuple[np.ndarray | None, np.ndarray | None],
    preprocessing: Preprocessing,
    channels: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Mean and standard deviation of the channels, and where they come from.

    Args:
      file: Those of an archive of images, where it has them.
      preprocessing: Of the network.
      channels: How many it takes.
      mean, std: As given by the person.
    """
    if (mean is None) != (std is None):
        raise InputError("give --mean and --std together.")
    if mean is not None and std is not None:
        chosen, origin = (mean, std), "as given"
    elif file[0] is not None and file[1] is not None:
        chosen, origin = (file[0], file[1]), "from the archive"
    else:
        chosen, origin = (
            (preprocessing.mean, preprocessing.std),
            f"{preprocessing.origin}; --mean and --std change it",
        )
    for name, values in zip(("mean", "std"), chosen, strict=True):
        if np.size(values) != channels:
            raise InputError(
                f"--{name} needs {channels} values, one per channel; got {np.size(values)}."
            )
    if np.any(np.asarray(chosen[1]) <= 0):
        raise InputError("--std must be positive.")
    return np.asarray(chosen[0], np.float32), np.asarray(chosen[1], np.float32), origin


def _class_names(file: Path | None, labels: Sequence[str], count: int) -> list[str]:
    if file is None:
        if len(labels) == count:
            return list(labels)
        return [f"class {i}" for i in range(count)]
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({error}).") from error
    if len(names) != count:
        raise InputError(
            f"{file} has {len(names)} lines; the network has {count} classes, one name per line."
        )
    return names


AT_ONCE = 32
"""Images that are computed together."""


@dataclass(frozen=True)
class _Network:
    """What predicts: a checkpoint, or an exported network.

    Attributes:
      config: What it is.
      forward: Normalised images ``(N, H, W, C)``, float32, to logits.
      preprocessing: What is done to an image.
      labels: Names of the classes, where it has them.
      notes: On how it was read.
    """

    config: Config
    forward: Callable[[np.ndarray], Any]
    preprocessing: Preprocessing
    labels: Sequence[str] = ()
    notes: tuple[str, ...] = ()


def _open(
    path: Path, reading: ReadingFlags, image_size: int | None, allow_nonfinite: bool, exact: bool
) -> _Network:
    if (path / MANIFEST).is_file():
        return _open_exported(path, image_size)
    source = reading.open(path)
    refuse_unhealthy(source, allow_nonfinite)

    def forward(images: np.ndarray) -> Any:
        import jax
        from flax import nnx

        from flax_resblock.export.inference import compile_inference
        from flax_resblock.io import to_model

        model = to_model(source)
        with jax.default_matmul_precision("highest"):
            if not exact:
                return compile_inference(model, images[:AT_ONCE])(images)
            graphdef, state = nnx.split(model)
            return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)

    return _Network(
        source.config,
        forward,
        _sized(preprocessing_of(source), image_size),
        source.hub.labels if source.hub else (),
        source.notes,
    )


def _open_exported(folder: Path, image_size: int | None) -> _Network:
    from flax_resblock.export.stablehlo import open_exported

    exported = open_exported(folder)
    if exported.fixed_size is not None and image_size not in (None, exported.fixed_size):
        raise InputError(
            f"{folder} was exported for images of {exported.fixed_size} pixels; leave "
            f"--image-size out, or export with --any-image-size."
        )
    recorded, usual = (
        exported.manifest.get("preprocessing", {}),
        _default_preprocessing(exported.config),
    )
    mean, std = (tuple(recorded.get(name, getattr(usual, name))) for name in ("mean", "std"))
    preprocessing = (
        replace(usual, mean=mean, std=std, origin="from the export") if recorded else usual
    )
    return _Network(
        exported.config, exported, _sized(preprocessing, image_size or exported.fixed_size)
    )


def _sized(preprocessing: Preprocessing, image_size: int | None) -> Preprocessing:
    return (
        preprocessing
        if image_size is None
        else replace(preprocessing, size=(image_size, image_size))
    )


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
    exact: bool = False,
    force: bool = False,
    allow_nonfinite: bool = False,
) -> int:
    """Classifies images with a checkpoint of any format, or with the folder that export wrote, in
    JAX.

    Class names, size, crop and normalisation are those of the checkpoint's config.json where it has
    one (transformers, timm) or was converted from one.

    Args:
      reading: How to read the checkpoint.
      top: How many classes to show.
      class_names: Text file with one class name per line.
      mean: Of the channels, for pixels from 0 to 1.
      std: Of the channels.
      image_size: Side of the square that images are brought to; by default 224 (centre crop) for
        ImageNet stems, 32 for small ones.
      logits: Also write the logits (N, classes) to this .npy file.
      exact: Leave the batch norms as they are instead of folding them into the convolutions:
        slower, and the last bits are those of the model and its export.
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
    network = _open(checkpoint, reading, image_size, allow_nonfinite, exact)
    config = network.config
    if not isinstance(config, ResNetConfig) or config.num_classes is None:
        raise InputError(
            f"{checkpoint} is a {name_of(config)} without a classification head; predict needs "
            f"a network with logits."
        )
    batch = _load(images, network.preprocessing, config.in_channels)
    if batch.pixels.shape[-1] != config.in_channels:
        raise InputError(
            f"{images[0]} has {batch.pixels.shape[-1]} channels; the network takes "
            f"{config.in_channels}."
        )
    shift, scale, origin = normalisation_of(
        (batch.mean, batch.std), network.preprocessing, config.in_channels, mean, std
    )
    names = _class_names(class_names, network.labels, config.num_classes)

    with status.status("predicting"):
        values = np.asarray(network.forward((batch.pixels - shift) / scale), np.float32)
    seen = f"{batch.pixels.shape[1]}x{batch.pixels.shape[2]} pixels"
    output.print(
        f"[bold]{name_of(config)}[/]  {escape(str(checkpoint))}; {seen}; normalisation "
        f"{escape(origin)}",
        soft_wrap=True,
    )
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
    table = Table(
        "image",
        *(["label"] if batch.labels is not None else []),
        *(f"top {i}" for i in range(1, top + 1)),
    )
    for i, name in enumerate(batch.names):
        order = np.argsort(-logits[i], kind="stable")[:top]
        label = [] if batch.labels is None else [names[int(batch.labels[i])]]
        table.add_row(
            name, *label, *(f"{escape(names[j])} {probabilities[i, j]:.1%}" for j in order)
        )
    print_table(table)
    if batch.labels is not None:
        right = int(np.sum(logits.argmax(axis=1) == batch.labels))
        output.print(f"{right} of {len(logits)} right", style="bold")
