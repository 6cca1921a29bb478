"""Classifying images and measuring the accuracy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from flax_resblock.cpu.switch import compiler_options
from flax_resblock.errors import InputError
from flax_resblock.nn.resnet import Model, ResNet
from flax_resblock.training.data import Dataset, DataSource, evaluation_batches
from flax_resblock.training.devices import Placement

EVAL_BATCH = 512

EvalStep = Callable[[nnx.State, nnx.State, Any], jax.Array]


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
    model: Model, images: np.ndarray, labels: np.ndarray, *, batch_size: int = EVAL_BATCH
) -> Evaluation:
    """Classifies every image exactly once, in evaluation mode; the model does not change.

    Args:
      model: A network with a head.
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
    network = with_head(model)
    classes = max(network.config.num_classes or 0, int(labels.max()) + 1)
    channels = images.shape[-1]
    mean, std = (0.0,) * channels, (1.0,) * channels
    source = Dataset(
        name="images", images=images, labels=labels, num_classes=classes, mean=mean, std=std
    )
    return evaluate_source(network, source, batch_size=batch_size)


def evaluate_source(
    model: Model,
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
    graphdef, params, stats = nnx.split(with_head(model), nnx.Param, nnx.BatchStat)
    params, stats = placement.copies((params, stats))
    return evaluate_state(
        graphdef, params, stats, source, placement=placement, workers=workers, batch_size=batch_size
    )


def evaluate_state(
    graphdef: nnx.GraphDef[ResNet],
    params: nnx.State,
    stats: nnx.State,
    source: DataSource,
    *,
    placement: Placement,
    workers: int = 0,
    batch_size: int = EVAL_BATCH,
) -> Evaluation:
    """:func:`evaluate_source` for a split model whose values are already on the devices."""
    eval_step = make_eval_step(graphdef, placement.mesh)
    rows = -(-min(batch_size, len(source)) // placement.devices) * placement.devices
    pieces = []
    with closing(evaluation_batches(source, rows, placement.shard, workers=workers)) as coming:
        for number, batch in enumerate(coming):
            logits = np.asarray(eval_step(params, stats, placement.spread(batch.images)))
            pieces.append(logits[: len(source) - number * rows])  # without the last one's padding
    logits = np.concatenate(pieces)
    predictions = logits.argmax(axis=1)
    accuracy = float(np.mean(predictions == source.labels))
    return Evaluation(accuracy, predictions, logits, _cross_entropy(logits, source.labels))


@lru_cache(maxsize=8)
def make_eval_step(graphdef: nnx.GraphDef[ResNet], mesh: Mesh | None = None) -> EvalStep:
    """Compiles evaluation, once per structure: ``(params, stats, images) -> (N, num_classes)``."""

    def eval_step(params: nnx.State, stats: nnx.State, images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params, stats, copy=True)
        return model(images, use_running_average=True)

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
    wide -= wide.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(wide).sum(axis=1))
    return float(np.mean(log_sum - wide[np.arange(len(wide)), labels]))


def with_head(model: Model) -> ResNet:
    """Returns the model; raises InputError for a bare block or a network without head."""
    if not isinstance(model, ResNet) or model.config.num_classes is None:
        raise InputError(
            "training and evaluation need a ResNet with a head; a bare block, or a network "
            "with num_classes=None, has no logits."
        )
    return model
