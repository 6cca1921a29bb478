"""The curves of a run as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.errors import optional
from flax_resblock.training.reports import EvaluationReport

NEEDED = "pictures need matplotlib: pip install 'flax-resblock[train]'."
_SMOOTH = 50
"""The bold lines are averaged over this many steps at most."""
_TRAINING = "tab:blue"
_TESTS = (
    ("", "test", "o-", "tab:orange"),
    ("ema_", "test, averaged weights", "s--", "tab:red"),
)
"""Prefix of the fields of an evaluation, label, marks and colour."""


def draw_curves(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[EvaluationReport], path: Path
) -> None:
    """Draws loss, accuracy and learning rate of the entries of ``metrics.jsonl``, and the
    evaluations, as a PNG; raises MissingDependencyError without matplotlib.
    """
    figure = _figure(10, 7)
    loss, accuracy, rate = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    numbers = np.array([step["step"] + 1 for step in steps])
    _noisy(loss, numbers, np.array([step["loss"] for step in steps]), "training")
    _noisy(accuracy, numbers, 100 * np.array([step["accuracy"] for step in steps]), "training")
    for name, label, style, color in _TESTS:
        present = [one for one in evaluations if getattr(one, f"{name}accuracy") is not None]
        if present:
            at = [one.step for one in present]
            losses = [getattr(one, f"{name}loss") for one in present]
            shares = [100 * getattr(one, f"{name}accuracy") for one in present]
            look = {"color": color, "label": label, "markersize": 4}
            loss.plot(at, losses, style, **look)
            accuracy.plot(at, shares, style, **look)
    rate.plot(numbers, [step["learning_rate"] for step in steps], color="tab:green")
    titles = {loss: "cross-entropy", accuracy: "accuracy, %", rate: "learning rate"}
    for axes, words in titles.items():
        axes.set_ylabel(words)
        axes.grid(alpha=0.3)
    loss.set_yscale("log")
    loss.legend(frameon=False)
    accuracy.legend(frameon=False)
    rate.set_xlabel("steps")
    figure.savefig(path, dpi=120, format="png")


def _noisy(axes: Any, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    axes.plot(steps, values, color=_TRAINING, alpha=0.25, linewidth=0.7)
    width = max(1, min(_SMOOTH, len(values) // 10))
    means = np.convolve(values, np.full(width, 1 / width), mode="valid")
    label = f"{label}, mean of {width} steps" if width > 1 else label
    axes.plot(steps[width - 1 :], means, color=_TRAINING, label=label)


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Draws counts of images by true and predicted class, ``(K, K)``, as a PNG; raises
    MissingDependencyError without matplotlib.
    """
    side = min(max(5.0, 0.45 * len(names)), 30.0)
    figure = _figure(side + 1, side)
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="share of the images of a class")
    if len(names) <= 50:
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
    if len(names) <= 20:
        for row, column in np.argwhere(counts):
            count, color = counts[row, column], "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.savefig(path, dpi=120, format="png")


def _figure(width: float, height: float) -> Any:
    figure = optional("matplotlib.figure", NEEDED)
    return figure.Figure(figsize=(width, height), layout="constrained")
