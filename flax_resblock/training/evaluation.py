"""Classifying images and measuring the accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_resblock.cpu.switch import compiler_options
from flax_resblock.errors import InputError, raised
from flax_resblock.nn.outputs import logits_of
from flax_resblock.nn.resnet import ResNet
from flax_resblock.nn.variables import STATISTICS
from flax_resblock.training.data import Dataset, DataSource, evaluation_batches
from flax_resblock.training.devices import Placement
from flax_resblock.training.randomness import random_state

EVAL_BATCH = 512

EvalStep = Callable[[nnx.State, nnx.State, nnx.State | None, Any], jax.Array]


class Evaluation(NamedTuple):
    """The predictions for a data set and how good they are.

    Attributes:
      accuracy: In [0, 1].
      predictions: Predicted classes, ``(N,)`` int64.
      logits: ``(N, num_classes)``.
      loss: Mean cross-entropy.
    """

    accuracy: float
    predictions: np.ndarray
    logits: np.ndarray
    loss: float


def evaluate(
    model: nnx.Module, images: np.ndarray, labels: np.ndarray, *, batch_size: int = EVAL_BATCH
) -> Evaluation:
    """Classifies every image exactly once, in evaluation mode; the model does not change.

    Args:
      model: Any network from images to logits.
      images: ``(N, H, W, C)`` with ``N`` at least 1, normalised (:meth:`Dataset.normalised`).
      labels: ``(N,)``, integers.
      batch_size: Images at a time. The last batch is padded so that only one shape is compiled.
    Raises:
      InputError: A model without logits, no images, or not one label per image.
    """
    if not len(images) or len(images) != len(labels):
        raise InputError(
            f"evaluation takes one label per image and at least one image; got {len(images)} "
            f"images and {len(labels)} labels."
        )
    channels = images.shape[-1]
    classes = max(classes_of(model, images.shape[1:]), int(labels.max()) + 1)
    mean, std = (0.0,) * channels, (1.0,) * channels
    source = Dataset(
        name="images", images=images, labels=labels, num_classes=classes, mean=mean, std=std
    )
    return evaluate_source(model, source, batch_size=batch_size)


def evaluate_source(
    model: nnx.Module,
    source: DataSource,
    *,
    placement: Placement | None = None,
    workers: int = 0,
    batch_size: int = EVAL_BATCH,
) -> Evaluation:
    """:func:`evaluate` for a data source: the devices share each batch, ``workers`` processes
    decode images, and every process of a run gets the whole result.
    """
    placement = placement or Placement()
    classes_of(model, source.shape)
    graphdef, params, stats, _ = nnx.split(model, nnx.Param, STATISTICS, ...)
    params, stats = placement.copies((params, stats))
    how = {"placement": placement, "workers": workers, "batch_size": batch_size}
    return evaluate_state(graphdef, params, stats, source, random=random_state(model), **how)


def evaluate_state(
    graphdef: nnx.GraphDef[Any],
    params: nnx.State,
    stats: nnx.State,
    source: DataSource,
    *,
    placement: Placement,
    random: nnx.State | None = None,
    workers: int = 0,
    batch_size: int = EVAL_BATCH,
) -> Evaluation:
    """:func:`evaluate_source` for a split model whose values are already on the devices; ``random``
    are its random streams, if it has any.
    """
    eval_step = make_eval_step(graphdef, placement.mesh)
    rows = -(-min(batch_size, len(source)) // placement.devices) * placement.devices
    pieces = []
    batches = evaluation_batches(
        source, rows, placement.shard, workers=workers, place=placement.spread
    )
    with closing(batches) as coming:
        for number, batch in enumerate(coming):
            logits = np.asarray(eval_step(params, stats, random, batch.images))
            pieces.append(logits[: len(source) - number * rows])  # without the last one's padding
    logits = np.concatenate(pieces)
    predictions = logits.argmax(axis=1)
    accuracy = float(np.mean(predictions == source.labels))
    return Evaluation(accuracy, predictions, logits, _cross_entropy(logits, source.labels))


@lru_cache(maxsize=8)
def make_eval_step(graphdef: nnx.GraphDef[Any], mesh: Mesh | None = None) -> EvalStep:
    """Compiles evaluation, once per structure: ``(params, stats, random, images) -> (N,
    num_classes)``.
    """

    def eval_step(
        params: nnx.State, stats: nnx.State, random: nnx.State | None, images: jax.Array
    ) -> jax.Array:
        rest = () if random is None else (random,)
        model = nnx.merge(graphdef, params, stats, *rest, copy=True)
        model.eval()
        return logits_of(model(images))[0]

    whole = Placement(mesh).copied
    return jax.jit(eval_step, out_shardings=whole, compiler_options=compiler_options())


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts the images of class ``i`` predicted as ``j``, ``(num_classes, num_classes)`` int64."""
    counts = np.zeros((num_classes, num_classes), np.int64)
    np.add.at(counts, (labels, predictions), 1)
    return counts


def _cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the images, in float64; infinite if a label is not among the model's classes."""
    if labels.max() >= logits.shape[1]:
        return float("inf")
    wide = logits.astype(np.float64)
    chosen = wide[np.arange(len(wide)), labels]
    return float(np.mean(np.logaddexp.reduce(wide, axis=1) - chosen))


def classes_of(model: nnx.Module, shape: Sequence[int], *, training: bool = False) -> int:
    """The number of classes that a network knows.

    Args:
      shape: Of the images, ``(H, W, C)``.
    Raises:
      InputError: It does not take such images, or does not return logits ``(N, num_classes)``.
    """
    if isinstance(model, ResNet):
        return _classes_of_resnet(model, shape)
    name, size = type(model).__name__, list(shape)
    graphdef, state = nnx.split(model)

    def logits(state: nnx.State, images: jax.Array) -> Any:
        network: Any = nnx.merge(graphdef, state, copy=True)
        network.train() if training else network.eval()
        return network(images)

    images = jax.ShapeDtypeStruct((2, *shape), np.float32)
    try:
        found = jax.eval_shape(logits, state, images)
    except Exception as error:  # whatever the user's code raises
        raise InputError(
            f"{name} does not take images of shape (N, {', '.join(map(str, size))}): "
            f"{raised(error)}. "
            f"Choose other data, or another size (`image_size=...`)."
        ) from error
    main, others = logits_of(found)
    got: Any = getattr(main, "shape", type(main).__name__)
    shapes = [getattr(one, "shape", type(one).__name__) for one in (others if training else ())]
    fits = isinstance(got, tuple) and len(got) == 2 and got[0] == 2 and main.dtype.kind in "fV"
    if not fits or any(shape != got for shape in shapes):
        mode = "training" if training else "evaluation"
        shown = " and ".join(map(str, [got, *shapes]))
        raise InputError(
            f"{name} returns {shown} for two images of {size} in {mode} mode; it needs to be "
            f"logits, one floating array (N, num_classes), and in training mode more of the same "
            f"shape if it has auxiliary heads. For anything else write the loss and the loop "
            f"yourself (nnx.Optimizer, or train/plain_optax.py)."
        )
    return got[1]


def _classes_of_resnet(model: ResNet, shape: Sequence[int]) -> int:
    classes, channels = model.config.num_classes, model.config.in_channels
    if classes is None:
        raise InputError(
            "training and evaluation need a ResNet with a head; a network with num_classes=None "
            "has no logits."
        )
    if channels != shape[-1]:
        raise InputError(f"the model takes {channels} channels; the images have {shape[-1]}.")
    return classes
