"""Both frameworks side by side on the same input: forward, statistics and gradients, in float64 and float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch

from flax_resblock.parity.oracle import Judgement, judge
from flax_resblock.parity.taps import Trace, trace_flax, trace_torch
from flax_resblock.parity.twins import Twins

SPREAD = 8
"""Roundings of PyTorch that are drawn where one does not explain the error of Flax."""

PRECISIONS = {"float64": np.float64, "float32": np.float32}


@dataclass(frozen=True)
class Measurement:
    """One tensor in both frameworks, judged.

    Attributes:
      quantity: ``"eval forward"``, ``"train forward"``, ``"running statistics"``, ``"parameter gradient"``, ``"activation gradient"``.
      slot: Slot name, with the tensor's name behind a slash where the slot has several; ``"output"`` and ``"input"``.
      precision: ``"float64"`` or ``"float32"``.
      judgement: Errors and limit.
    """

    quantity: str
    slot: str
    precision: str
    judgement: Judgement


@dataclass(frozen=True)
class Comparison:
    """All measurements of one verification, in forward order within each quantity."""

    measurements: tuple[Measurement, ...]

    @property
    def passed(self) -> bool:
        """Whether every measurement is within its limit."""
        return all(measurement.judgement.passed for measurement in self.measurements)

    def groups(self) -> Iterator[tuple[str, str, list[Measurement]]]:
        """Precision, quantity and its measurements."""
        keys = dict.fromkeys((m.precision, m.quantity) for m in self.measurements)
        for precision, quantity in keys:
            yield precision, quantity, [m for m in self.measurements if (m.precision, m.quantity) == (precision, quantity)]

    def first_divergence(self, quantity: str, precision: str) -> Measurement | None:
        """The first slot in forward order that failed."""
        rows = (m for m in self.measurements if (m.quantity, m.precision) == (quantity, precision))
        return next((m for m in rows if not m.judgement.passed), None)


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
      train: Also training mode: batch statistics, and running statistics after one batch.
      gradients: Also gradients of every parameter, activation and the input (in training mode where ``train``, else in evaluation mode).
      precisions: Among ``"float64"`` and ``"float32"``.
    """

    train: bool = True
    gradients: bool = False
    precisions: Sequence[str] = ("float64", "float32")


def run_torch(twins: Twins, images: np.ndarray, precision: str, *, train: bool, cotangent: np.ndarray | None) -> Trace:
    """Trace of the PyTorch side in one precision; arguments as for :func:`flax_resblock.parity.taps.trace_torch`."""
    dtype = PRECISIONS[precision]
    weight = None if cotangent is None else cotangent.astype(dtype)
    return trace_torch(twins.torch(dtype), images.astype(dtype), twins.torch_slots, train=train, cotangent=weight)


def run_flax(twins: Twins, images: np.ndarray, precision: str, *, train: bool, cotangent: np.ndarray | None) -> Trace:
    """Trace of the Flax side in one precision; arguments as for :func:`flax_resblock.parity.taps.trace_flax`."""
    dtype = PRECISIONS[precision]
    weight = None if cotangent is None else cotangent.astype(dtype)
    with jax.enable_x64(True) if precision == "float64" else nullcontext():
        return trace_flax(twins.flax(dtype), images.astype(dtype), twins.flax_slots, train=train, cotangent=weight)


def measure(twins: Twins, precision: str, mode: str, flax: Trace, ours: Trace, truth: Trace) -> Iterator[Measurement]:
    """Judges every quantity of a pair of traces.

    Args:
      twins: Whose map pairs the names.
      precision: Of ``flax`` and ``ours``.
      mode: ``"eval"`` or ``"train"``.
      flax, ours: The traces of Flax and PyTorch.
      truth: PyTorch's float64 trace.
    """
    epsilon = float(ml_dtypes.finfo(PRECISIONS[precision]).eps)

    def row(quantity: str, slot: str, pick: Callable[[Trace], np.ndarray], of_flax: np.ndarray) -> Measurement:
        return Measurement(quantity, slot, precision, judge(of_flax, pick(ours), pick(truth), epsilon))

    for name in ours.activations:
        yield row(f"{mode} forward", name, lambda t, n=name: t.activations[n], flax.activations[name])
    yield row(f"{mode} forward", "output", lambda t: t.output, flax.output)
    for entry in twins.state_map.entries:
        slot, tensor = ".".join(map(str, entry.flax_path[:-1])), entry.flax_path[-1]
        key, codec = entry.torch_key, entry.codec
        if mode == "train" and tensor in ("mean", "var", "num_batches_tracked"):
            yield row("running statistics", f"{slot}/{tensor}", lambda t, k=key: t.statistics[k], flax.statistics[entry.flax_path])
        if entry.flax_path in flax.gradients:
            yield row("parameter gradient", f"{slot}/{tensor}", lambda t, k=key, c=codec: c.to_flax(t.gradients[k]), flax.gradients[entry.flax_path])
    for name in ours.activation_gradients:
        yield row("activation gradient", name, lambda t, n=name: t.activation_gradients[n], flax.activation_gradients[name])
    if flax.input_gradient is not None and ours.input_gradient is not None:
        yield row("activation gradient", "input", lambda t: _known(t.input_gradient), flax.input_gradient)


def _with_spread(
    twins: Twins, precision: str, mode: str, images: np.ndarray, rows: list[Measurement], flax: Trace, truth: Trace, cotangent: np.ndarray | None
) -> list[Measurement]:
    """The measurements with PyTorch's own error taken as the largest of several roundings.

    One run of PyTorch is one draw of its rounding error. It can be lucky: a gradient jumps when an activation near zero rounds to the other side of a
    ReLU, in one framework and not in the other. The inputs are therefore also moved by at most one unit in the last place, :data:`SPREAD` times.
    """
    dtype = PRECISIONS[precision]
    module, rng = twins.torch(dtype), np.random.default_rng(1)
    weight = None if cotangent is None else cotangent.astype(dtype)
    for _ in range(SPREAD):
        moved = (images * (1 + float(ml_dtypes.finfo(dtype).eps) * rng.integers(-1, 2, images.shape))).astype(dtype)
        again = trace_torch(module, moved, twins.torch_slots, train=mode == "train", cotangent=weight)
        fresh = measure(twins, precision, mode, flax, again, truth)
        rows = [new if new.judgement.limit > old.judgement.limit else old for old, new in zip(rows, fresh, strict=True)]
    return rows


def _known(array: np.ndarray | None) -> np.ndarray:
    if array is None:
        raise AssertionError("every trace with a cotangent has an input gradient")
    return array


def compare_twins(twins: Twins, images: np.ndarray, plan: Plan | None = None, *, progress: Callable[[str], None] = lambda _: None, seed: int = 0) -> Comparison:
    """Verifies a network: Flax against PyTorch on the same images, every slot.

    Args:
      twins: The network in both frameworks.
      images: ``(N, H, W, C)``, float64.
      plan: What to compare.
      progress: Called with a sentence before each step.
      seed: Of the cotangent from which gradients flow back.
    Returns:
      Every measurement. The float64 truth is PyTorch's.
    """
    plan = plan or Plan()
    measurements: list[Measurement] = []
    cotangent: np.ndarray | None = None
    if plan.gradients:
        with torch.no_grad():
            shape = trace_torch(twins.torch(np.float32), images[:1].astype(np.float32), {}).output.shape
        cotangent = np.random.default_rng(seed).standard_normal((len(images), *shape[1:]))
    for mode in ("eval", "train") if plan.train else ("eval",):
        weight = cotangent if mode == "train" or not plan.train else None
        arguments: dict[str, Any] = {"train": mode == "train", "cotangent": weight}
        progress(f"{mode} mode, float64")
        truth = run_torch(twins, images, "float64", **arguments)
        for precision in plan.precisions:
            progress(f"{mode} mode, {precision}")
            ours = truth if precision == "float64" else run_torch(twins, images, precision, **arguments)
            flax = run_flax(twins, images, precision, **arguments)
            rows = list(measure(twins, precision, mode, flax, ours, truth))
            if precision != "float64" and not all(row.judgement.passed for row in rows):
                progress(f"{mode} mode, {precision}: PyTorch's own spread")
                rows = _with_spread(twins, precision, mode, images, rows, flax, truth, weight)
            measurements += rows
            del ours, flax
        del truth  # before the next mode makes its own: these are the largest arrays of a verification
    return Comparison(tuple(measurements))
