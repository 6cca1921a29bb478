"""``flax-resblock predict``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.markup import escape
from rich.table import Table

from flax_resblock.checkpoint import replacing
from flax_resblock.cli import common
from flax_resblock.cli.images import (
    ImageBatch,
    load_images,
    normalisation_of,
    preprocessing_of,
    refuse_nonfinite,
)
from flax_resblock.config import BlockConfig, ResNetConfig, name_of
from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.image_facts import IMAGES, read_images
from flax_resblock.errors import InputError, reason
from flax_resblock.images import default_preprocessing, normalised

MANIFEST = "manifest.json"
"""Marks the folder of an exported network."""
AT_ONCE = 32
"""Images that are computed together. For no more than these, the program that compiles soonest
answers first; for more, the one that computes fastest."""

Images = Annotated[
    tuple[Path, ...],
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="IMAGE...",
        help="PNG or JPEG files, or an .npz archive with images (N, H, W, C), uint8.",
    ),
]


def predict(
    checkpoint: common.Checkpoint,
    images: Images,
    reading: common.ReadingFlags,
    top: int = 3,
    class_names: Path | None = None,
    model: str | None = None,
    mean: common.Mean = None,
    std: common.Std = None,
    image_size: int | None = None,
    logits: Path | None = None,
    exact: bool = False,
    force: common.Force = False,
    allow_nonfinite: common.AllowNonfinite = False,
) -> int:
    """Classifies images in JAX, with a checkpoint of any format or the folder of an exported
    network.

    For example:

      flax-resblock predict resnet50.pth cat.jpg dog.png --class-names imagenet.txt

    Class names, size, crop and normalisation are taken from the checkpoint: from what `train` wrote
    into it, or from a config.json (transformers, timm), also after a conversion.

    Args:
      top: Number of classes to show.
      class_names: Text file with one class name per line.
      model: FILE.py:NAME, the code of a network of your own, such as `port` writes; CKPT is its
        folder, a run or a checkpoint. Importing it runs the code.
      image_size: Side of the square to which images are resized. Where the checkpoint does not say,
        224 (center crop) for ImageNet stems and 32 for small ones.
      logits: Also write the logits (N, classes) to this .npy file.
      exact: Do not fold the batch norms into the convolutions. This is slower, and the last bits
        are those of the model and of its export.
    """
    if not images:
        raise InputError("give at least one image, or an .npz archive of images.")
    if top < 1 or (image_size is not None and image_size < 1):
        raise InputError(f"--top {top} and --image-size {image_size} must be positive.")
    common.refuse_all_existing(force, logits)
    if model is not None:
        network = _open_own(checkpoint, model, reading, image_size, allow_nonfinite)
    else:
        network = _open(checkpoint, reading, image_size, allow_nonfinite, exact)
    if network.classes is None:
        raise InputError(
            f"{checkpoint} is a {network.name} without a classification head; predict needs "
            f"a network with logits."
        )
    batch = load_images(images, network.preprocessing, network.channels)
    height, width, channels = batch.pixels.shape[1:]
    if channels != network.channels:
        raise InputError(
            f"{images[0]} has {channels} channels; the network takes {network.channels}."
        )
    shift, scale, origin = normalisation_of(
        (batch.mean, batch.std), network.preprocessing, channels, mean, std
    )
    names = _class_names(class_names, network.labels, network.classes)
    with common.status.status("predicting"):
        values = np.asarray(network.forward(normalised(batch.pixels, shift, scale)), np.float32)
    if not allow_nonfinite:
        refuse_nonfinite(values, batch.names)
    common.print_title(
        network.name, f"{checkpoint}; {height}x{width} pixels; normalisation {origin}"
    )
    common.print_notes(network.notes)
    _print_predictions(values, batch, names, top)
    if logits is not None:
        with replacing(logits, force=force) as temporary, temporary.open("wb") as handle:
            np.save(handle, values)
        common.say(f"wrote {logits}")
    return 0


@dataclass(frozen=True)
class _Network:
    """A checkpoint or an export; ``forward`` maps normalised ``(N, H, W, C)`` images to logits, of
    which there are ``classes``, None if the network has no head."""

    name: str
    channels: int
    classes: int | None
    forward: Callable[[np.ndarray], Any]
    preprocessing: Preprocessing
    labels: Sequence[str] = ()
    notes: tuple[str, ...] = ()


def _open(
    path: Path,
    reading: common.ReadingFlags,
    image_size: int | None,
    allow_nonfinite: bool,
    exact: bool,
) -> _Network:
    if (path / MANIFEST).is_file():
        return _open_exported(path, image_size)
    source = reading.open(path)
    common.refuse_unhealthy(source, allow_nonfinite)

    def forward(images: np.ndarray) -> Any:
        import jax
        from flax import nnx

        from flax_resblock.export.inference import compile_inference
        from flax_resblock.io import to_model

        model = to_model(source)
        with jax.default_matmul_precision("highest"):
            if not exact:
                quick = len(images) <= AT_ONCE
                return compile_inference(model, images[:AT_ONCE], quick=quick)(images)
            graphdef, state = nnx.split(model)
            return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)

    preprocessing = _sized(preprocessing_of(source), image_size)
    config = source.config
    classes = config.num_classes if isinstance(config, ResNetConfig) else None
    told = name_of(config), config.in_channels, classes, forward, preprocessing
    return _Network(*told, source.images.labels, source.all_notes)


def _open_own(
    path: Path, spec: str, reading: common.ReadingFlags, image_size: int | None, nonfinite: bool
) -> _Network:
    import jax
    from flax import nnx

    from flax_resblock.cli.train_own import own_network
    from flax_resblock.cpu.compiling import options_for
    from flax_resblock.cpu.switch import compiler_options, conv_lowering
    from flax_resblock.nn.outputs import logits_of
    from flax_resblock.training.evaluation import classes_of

    model, facts, wanted = own_network(spec, path, reading, nonfinite)
    preprocessing = _sized(wanted, image_size)
    channels = len(preprocessing.mean)
    graphdef, state = nnx.split(model)

    def forward(images: np.ndarray) -> Any:
        def run(state: nnx.State, x: jax.Array) -> Any:
            return logits_of(nnx.merge(graphdef, state)(x))[0]

        few = len(images) <= AT_ONCE
        with jax.default_matmul_precision("highest"), conv_lowering("xla" if few else "auto"):
            options = options_for(None) if few else compiler_options()
            return jax.jit(run, compiler_options=options)(state, images)

    classes = classes_of(model, (*preprocessing.size, channels))
    name = spec.rpartition(":")[2]
    return _Network(name, channels, classes, forward, preprocessing, facts.labels)


def _open_exported(folder: Path, image_size: int | None) -> _Network:
    from flax_resblock.export.exported import open_exported

    exported = open_exported(folder)
    if exported.fixed_size is not None and image_size not in (None, exported.fixed_size):
        raise InputError(
            f"{folder} was exported for images of {exported.fixed_size} pixels; leave "
            f"--image-size out, or export with --any-image-size."
        )
    stored = exported.manifest.get(IMAGES)
    facts = read_images({IMAGES: json.dumps(stored)} if stored else {}, str(folder))
    config = exported.config
    plain = BlockConfig(in_channels=exported.channels, out_channels=exported.channels)
    preprocessing = facts.preprocessing or default_preprocessing(config or plain)
    if recorded := exported.manifest.get("preprocessing", {}):
        changes = {name: tuple(recorded[name]) for name in ("mean", "std") if name in recorded}
        preprocessing = replace(preprocessing, **changes, origin="from the export")
    size = image_size or exported.fixed_size
    has_logits = config is None or getattr(config, "num_classes", None) is not None
    classes = int(exported.manifest["output"]["shape"][-1]) if has_logits else None
    told = exported.architecture, exported.channels, classes, exported
    return _Network(*told, _sized(preprocessing, size), facts.labels)


def _sized(preprocessing: Preprocessing, size: int | None) -> Preprocessing:
    return preprocessing if size is None else replace(preprocessing, size=(size, size))


def _class_names(file: Path | None, labels: Sequence[str], count: int) -> list[str]:
    if file is None:
        known = list(labels) if len(labels) <= count else []
        return known + [f"class {i}" for i in range(len(known), count)]
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as text ({reason(error)}).") from error
    if len(names) != count:
        raise InputError(
            f"{file} has {len(names)} lines; the network has {count} classes, one name per line."
        )
    return names


def _print_predictions(logits: np.ndarray, batch: ImageBatch, names: list[str], top: int) -> None:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True), dtype=np.float64)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    top = min(top, logits.shape[1])
    columns = [] if batch.labels is None else ["label"]
    table = Table("image", *columns, *(f"top {i}" for i in range(1, top + 1)))
    for i, name in enumerate(batch.names):
        order = np.argsort(-logits[i], kind="stable")[:top]
        label = [] if batch.labels is None else [names[int(batch.labels[i])]]
        shown = (f"{escape(names[j])} {probabilities[i, j]:.1%}" for j in order)
        table.add_row(name, *label, *shown)
    common.print_table(table)
    if batch.labels is not None:
        right = int(np.sum(logits.argmax(axis=1) == batch.labels))
        common.output.print(f"{right} of {len(logits)} right", style="bold")
