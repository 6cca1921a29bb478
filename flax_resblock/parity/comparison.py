"""Runs both frameworks side by side on the same input, part by part, and compares every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from flax_resblock.cpu.switch import Lowering
from flax_resblock.parity.inputs import more_batches, nudged
from flax_resblock.parity.oracle import (
    Comparison,
    Histogram,
    Measurement,
    Tolerance,
    histogram_of,
    relative_l2,
    sampled,
    verdict_of,
)
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, Side
from flax_resblock.parity.parts import (
    Devices,
    Forward,
    Isolated,
    Key,
    Part,
    Statistics,
    Tensors,
    Weights,
    reference_run,
    vanishing,
)
from flax_resblock.parity.taps import trace_torch
from flax_resblock.parity.trajectory import RECIPES, Trajectory, moderate

SPREAD = 8
"""How many more roundings of PyTorch are drawn if one does not explain the error of Flax."""

EXACT = PRECISIONS["float64"]

BATCHES = 5
"""Training batches after which the running statistics are compared again."""


@dataclass(frozen=True)
class Plan:
    """What to compare.

    Attributes:
      train: Also training mode: batch statistics, and running statistics after one batch and after
        :data:`BATCHES`.
      gradients: Also gradients of every parameter, activation and the input (in training mode where
        ``train``, else in evaluation mode).
      precisions: Among ``"float64"``, ``"float32"``, ``"tf32"`` and ``"bfloat16"``. TF32 is what
        CUDA's matrix units make of float32; a device that has none computes in float32.
      isolated: Also every slot by itself, fed PyTorch's own input.
      steps: Also this many training steps with each of ``optimizers``; everything is compared
        after every step.
      optimizers: Among ``"sgd"`` (Nesterov momentum, weight decay) and ``"adamw"``.
      learning_rate: Learning rate of the training steps; None: a moderate one for this network, see
        :func:`flax_resblock.parity.trajectory.moderate`.
      tolerance: Replaces the oracle's criterion.
      conv_lowering: How Flax computes convolutions: as XLA does, which is what a GPU or TPU runs,
        or, on a CPU, in the forms that training and inference take there; see
        :mod:`flax_resblock.nn.conv`. :func:`flax_resblock.parity.api.verify_pair` applies it;
        :func:`compare_pair` uses the setting in force.
    """

    train: bool = True
    gradients: bool = False
    precisions: Sequence[str] = ("float64", "float32")
    isolated: bool = False
    steps: int = 0
    optimizers: Sequence[str] = tuple(RECIPES)
    learning_rate: float | None = None
    tolerance: Tolerance | None = None
    conv_lowering: Lowering = "xla"

    def parts(self, pair: Pair, images: np.ndarray, seed: int) -> Iterator[Part]:
        """The parts to run, in order."""
        cotangent = None
        if self.gradients or self.steps:
            shape = trace_torch(pair.torch(PRECISIONS["float32"]), images[:1], {}).output.shape
            cotangent = np.random.default_rng(seed).standard_normal((len(images), *shape[1:]))
        yield Weights()
        yield Forward(False, cotangent if self.gradients and not self.train else None)
        if self.train:
            yield Forward(True, cotangent if self.gradients else None)
            if any(entry.flax_path[-1] == "var" for entry in pair.entries):
                yield Statistics(more_batches(images, BATCHES, seed))
        if self.isolated:
            for train in (False, True) if self.train else (False,):
                yield Isolated(train, reference_run(pair, images, train=train), self.gradients)
        if self.steps and cotangent is not None:
            for name in self.optimizers:
                recipe = replace(RECIPES[name], learning_rate=self.learning_rate or 0.0)
                yield moderate(
                    Trajectory(recipe, more_batches(images, self.steps, seed), cotangent), pair
                )


def compare_pair(
    pair: Pair,
    images: np.ndarray,
    plan: Plan | None = None,
    *,
    progress: Callable[[str], None] = lambda _: None,
    seed: int = 0,
    devices: Devices | None = None,
) -> Comparison:
    """Verifies a pair: Flax against PyTorch on the same images, every slot.

    Args:
      images: Input of the modules in Flax's memory layout, such as ``(N, H, W, C)``, float64.
      seed: Seed of the output's cotangent and of further batches.
    Returns:
      Every measurement. The float64 truth is PyTorch's, on the CPU.
    """
    plan = plan or Plan()
    referee = _Referee(pair, images, devices or Devices(), plan.tolerance, progress)
    measurements: list[Measurement] = []
    for part in plan.parts(pair, images, seed):
        names = ["float64"] if isinstance(part, Weights) else plan.precisions
        precisions = [PRECISIONS[name] for name in names]
        found = referee.compare(part, precisions)
        for precision in precisions:
            rows = found[precision.name]
            failed = not all(row.verdict.passed for row in rows)
            if failed and precision.name != "float64" and plan.tolerance is None:
                progress(f"{part.title}, {precision.name}: PyTorch's own spread")
                rows = referee.with_spread(part, precision, rows)
            measurements += rows
    return Comparison(tuple(measurements), referee.histogram, plan.tolerance)


@dataclass
class _Referee:
    """Runs both sides of a part in step, compares their tensors, and keeps the histogram of the
    worst one. The tensors themselves are freed as soon as they are compared."""

    pair: Pair
    images: np.ndarray
    devices: Devices
    tolerance: Tolerance | None
    progress: Callable[[str], None]
    histogram: Histogram | None = None

    def run(self, side: Side, part: Part, precision: Precision) -> Iterator[Tensors]:
        """One side of a part."""
        return part.run(side, self.pair, precision, self.images, self.devices.of(precision))

    def compare(self, part: Part, precisions: Sequence[Precision]) -> dict[str, list[Measurement]]:
        """Measurements of one part by precision."""
        rows: dict[str, list[Measurement]] = {precision.name: [] for precision in precisions}
        truths = self.run("torch", part, EXACT)
        runs = {p.name: [self.run(side, part, p) for side in get_args(Side)] for p in precisions}
        count = part.steps if isinstance(part, Trajectory) else None
        for step in range(1, (count or 1) + 1):
            where = part.title if count is None else f"{part.title}, step {step} of {count}"
            self.progress(f"{where}: PyTorch, float64")
            truth = next(truths)
            for precision in precisions:
                flax_side, torch_side = runs[precision.name]
                self.progress(f"{where}: PyTorch and Flax, {precision.name}")
                with precision.on_torch():
                    ours = truth if precision.name == "float64" else next(torch_side)
                floors = _floors(self.pair, truth)
                own = {
                    key: 0.0 if ours is truth else relative_l2(value, truth[key], floors[key])
                    for key, value in ours.items()
                }
                kept = ours
                if self.tolerance is None and ours is not truth:
                    kept = {key: sampled(value) for key, value in ours.items()}
                del ours  # the largest arrays: freed before the other side allocates its own
                flax = next(flax_side)
                number = None if count is None else step
                found = self._compared(part, precision, number, flax, kept, truth, own, floors)
                rows[precision.name] += list(found)
                del flax, kept
        return rows

    def _compared(
        self,
        part: Part,
        precision: Precision,
        step: int | None,
        flax: Tensors,
        ours: Tensors,
        truth: Tensors,
        own: Mapping[Key, float],
        floors: Mapping[Key, float],
    ) -> Iterator[Measurement]:
        for key, reference in own.items():
            value = flax.get(key)
            error = float("inf")
            if value is not None:
                error = relative_l2(value, truth[key], floors[key])
            verdict = verdict_of(error, reference, precision.epsilon, limit64=part.limit64)
            if self.tolerance is not None and value is not None:
                excess = self.tolerance.excess(value, ours[key])
                verdict = replace(verdict, error=excess, limit=1.0, reference_error=0.0)
            row = Measurement(*key, precision.name, verdict, step)
            worst = self.histogram.row.verdict.excess if self.histogram is not None else 0.0
            if value is not None and value.shape == truth[key].shape and verdict.excess > worst:
                self.histogram = histogram_of(row, value, ours[key], truth[key]) or self.histogram
            yield row

    def with_spread(
        self, part: Part, precision: Precision, rows: list[Measurement]
    ) -> list[Measurement]:
        """The measurements with PyTorch's own error taken as the largest of several roundings.

        One run of PyTorch is one draw of its rounding error. It can be lucky: a gradient jumps when
        an activation near zero rounds to the other side of a ReLU, in one framework and not in the
        other. The inputs are therefore also moved by at most one unit in the last place,
        :data:`SPREAD` times.
        """
        rng = np.random.default_rng(1)
        largest = {(row.quantity, row.slot, row.step): row.verdict.reference_error for row in rows}
        stepped = isinstance(part, Trajectory)
        kept: list[Tensors] = []
        for _ in range(SPREAD):
            moved = replace(self, images=nudged(self.images, precision.epsilon, rng))
            again = moved.run("torch", part, precision)
            truths = kept or self.run("torch", part, EXACT)
            if not stepped:  # the steps of a training run together may not fit in memory
                truths = kept = list(truths)
            for step, truth in enumerate(truths, start=1):
                with precision.on_torch():
                    ours = next(again)
                floors = _floors(self.pair, truth)
                for key, value in ours.items():
                    place = (*key, step if stepped else None)
                    error = relative_l2(value, truth[key], floors[key])
                    largest[place] = max(largest[place], error)
        found = []
        for row in rows:
            own = largest[row.quantity, row.slot, row.step]
            verdict = verdict_of(row.verdict.error, own, precision.epsilon, limit64=part.limit64)
            found.append(replace(row, verdict=verdict))
        return found


def _floors(pair: Pair, truth: Tensors) -> dict[Key, float]:
    """The norm below which each tensor counts as small; see ``Pair.gradient_floor`` and
    :func:`flax_resblock.parity.parts.vanishing`."""
    of_parameters = [key for key in truth if pair.gradient_floor and key[0] == "parameter gradient"]
    largest = max((float(np.linalg.norm(truth[key])) for key in of_parameters), default=0.0)
    floors = dict.fromkeys(of_parameters, pair.gradient_floor * largest)
    return {key: max(floors.get(key, 0.0), vanishing(key, truth)) for key in truth}
