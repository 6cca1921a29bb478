"""Known mistakes of batch norms, of their running statistics, and of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flax_resblock.parity.causes import Candidate, Cause, LayerRun, explain


def _another_eps(
    found: float, eps: float, formula: Callable[[], np.ndarray]
) -> Iterator[Candidate]:
    """That a norm has ``found``, which the data give, instead of ``eps``."""
    if np.isfinite(found) and found > -1e-12:
        yield "eps", f"has eps={float(f'{found:.4g}'):g} instead of {eps:g}", formula


def norm_candidates(layer: LayerRun, value: np.ndarray) -> Iterator[Candidate]:
    x, eps = layer.x, float(layer.module.eps)  # pyright: ignore[reportArgumentType]
    axes = tuple(range(x.ndim - 1))
    scale = layer.tensors.get("scale", np.ones(x.shape[-1]))
    bias = layer.tensors.get("bias", np.zeros(x.shape[-1]))
    n = x.size // x.shape[-1]
    batch = (x.mean(axes), x.var(axes))
    running = (layer.tensors["mean"], layer.tensors["var"]) if "mean" in layer.tensors else batch
    right, other = (batch, running) if layer.train else (running, batch)

    def norm(
        moments: Any = right, scale: Any = scale, bias: Any = bias, eps: float = eps
    ) -> np.ndarray:
        with np.errstate(all="ignore"):
            return (x - moments[0]) / np.sqrt(moments[1] + eps) * scale + bias

    mode = "with the batch's own statistics, as in training mode"
    if layer.train:
        mode = "with the running statistics, as in evaluation mode"
    yield "train-eval-mode", f"normalises {mode}", lambda: norm(other)
    with np.errstate(all="ignore"):
        centred = (x - right[0]) * scale
        inverse = (
            np.sum((value - bias) * centred, axes) / np.sum(centred**2, axes)
            if value.shape == x.shape
            else np.full(x.shape[-1], np.nan)
        )
        found = float(np.median(1 / inverse**2 - right[1]))
    yield from _another_eps(found, eps, lambda: norm(eps=found))
    words = "normalises with the unbiased variance"
    yield "unbiased-normalisation", words, lambda: norm((right[0], right[1] * n / max(n - 1, 1)))
    words = "uses scale and bias the wrong way round"
    yield "swapped-tensor", words, lambda: norm(scale=bias, bias=scale)
    words = "uses mean and variance the wrong way round"
    yield "swapped-tensor", words, lambda: norm((right[1], right[0]))
    yield "no-affine", "applies neither scale nor bias", lambda: norm(scale=1.0, bias=0.0)
    yield "no-affine", "leaves the scale out", lambda: norm(scale=1.0)
    yield "no-affine", "leaves the bias out", lambda: norm(bias=0.0)
    yield "no-mean", "does not subtract the mean", lambda: norm((0.0, right[1]))
    words = "divides by the variance instead of its square root"
    yield "variance-as-deviation", words, lambda: norm((right[0], (right[1] + eps) ** 2 - eps))
    words = "adds eps to the standard deviation instead of the variance"
    yield "eps-outside-root", words, lambda: norm((right[0], (np.sqrt(right[1]) + eps) ** 2 - eps))
    yield "no-norm", "does nothing: the output is the input", lambda: x
    if x.ndim == 4:
        for words, over in (
            ("each sample and channel by itself (instance normalisation)", (1, 2)),
            ("each sample by itself (layer normalisation)", (1, 2, 3)),
        ):
            yield (
                "other-norm",
                f"normalises {words}",
                lambda o=over: norm((x.mean(o, keepdims=True), x.var(o, keepdims=True))),
            )
    for name, theirs in layer.others.get("var", {}).items():
        mean = layer.others["mean"].get(name)
        if mean is not None and theirs.shape == np.shape(right[1]):
            words = f"normalises with the running statistics of {name}"
            yield "swapped-tensor", words, lambda m=mean, v=theirs: norm((m, v))


def sample_norm_candidates(layer: LayerRun, value: np.ndarray) -> Iterator[Candidate]:
    """Of norms that take their moments from each sample: GroupNorm, LayerNorm over a whole sample,
    InstanceNorm without running statistics."""
    module: Any = layer.module
    x, eps = layer.x, float(module.eps)
    channels = x.shape[-1]
    groups = int(getattr(module, "num_groups", 1))
    if type(module).__name__.startswith("InstanceNorm"):
        groups = channels
    scale = layer.tensors.get("scale", np.ones(channels))
    bias = layer.tensors.get("bias", np.zeros(channels))
    if channels % groups or scale.shape != (channels,) or value.shape != x.shape:
        return
    split = x.reshape(len(x), -1, groups, channels // groups)
    mean, var = split.mean((1, 3), keepdims=True), split.var((1, 3), keepdims=True)
    centred = (split - mean).reshape(x.shape) * scale

    def norm(eps: float) -> np.ndarray:
        spread = np.broadcast_to(np.sqrt(var + eps), split.shape).reshape(x.shape)
        return centred / spread + bias

    with np.errstate(all="ignore"):
        parts = ((value - bias) * centred).reshape(split.shape), (centred**2).reshape(split.shape)
        above, below = (part.sum((1, 3), keepdims=True) for part in parts)
        found = float(np.median((below / above) ** 2 - var))
    yield from _another_eps(found, eps, lambda: norm(found))


def explain_statistics(layer: LayerRun, mean: np.ndarray, var: np.ndarray) -> Cause | None:
    """The mistake by which a norm's running statistics are ``mean`` and ``var`` after one batch in
    training mode."""
    momentum = layer.module.momentum
    if momentum is None or "mean" not in layer.tensors:
        return None
    weight = float(momentum)  # pyright: ignore[reportArgumentType]
    axes = tuple(range(layer.x.ndim - 1))
    n = layer.x.size // layer.x.shape[-1]
    batch, unbiased = layer.x.mean(axes), layer.x.var(axes, ddof=1)
    old = np.concatenate([layer.tensors["mean"], layer.tensors["var"]])
    value = np.concatenate([mean, var])
    variances = {"unbiased": unbiased, "biased": unbiased * (n - 1) / n}
    with np.errstate(all="ignore"):
        found = float(np.median((mean - layer.tensors["mean"]) / (batch - layer.tensors["mean"])))

    def update(weight: float, kind: str) -> np.ndarray:
        return (1 - weight) * old + weight * np.concatenate([batch, variances[kind]])

    ratio = (
        f"the new share of the variance is {(n - 1) / n:.6f} = (n - 1) / n of PyTorch's, n = {n}"
    )

    def candidates() -> Iterator[Candidate]:
        yield "frozen-statistics", "does not update the running statistics", lambda: old
        words = f"updates the running variance with the biased estimate: {ratio}"
        yield "biased-variance", words, lambda: update(weight, "biased")
        words = (
            f"weighs the new batch by {1 - weight:g} instead of {weight:g}: momentum counts the "
            f"other way round"
        )
        yield "momentum-complement", words, lambda: update(1 - weight, "unbiased")
        words = f"has momentum {float(f'{found:.6g}'):g} instead of {weight:g}"
        yield "momentum", words, lambda: update(found, "unbiased")
        words = (
            f"updates with the biased variance and weighs the new batch by {found:.6g} instead of "
            f"{weight:g} ({ratio})"
        )
        yield "biased-variance", words, lambda: update(found, "biased")
        right = update(weight, "unbiased")
        for name, words, halves in (
            ("no-mean", "updates the variance only", (old[: len(mean)], right[len(mean) :])),
            ("frozen-statistics", "updates the mean only", (right[: len(mean)], old[len(mean) :])),
        ):
            yield name, words, lambda halves=halves: np.concatenate(halves)

    return explain(value, candidates())
