"""PyTorch's learning-rate schedules as functions of the step, computed on the host in float64 with
``math`` alone.

``torch.optim.lr_scheduler`` computes most rates from the previous one; these are the closed forms,
which differ from that by rounding only. The fields have torch's names, so that the state dict of a
scheduler fills them (:mod:`flax_resblock.runs.scheduler_state`).

Optax's schedules cannot be used instead. They are evaluated inside the compiled step in float32 (up
to 2e-5 relative). ``optax.cosine_decay_schedule`` stays at its end where torch's climbs again, and
its ``alpha`` is a share of the peak where ``eta_min`` is a rate.
``optax.cosine_onecycle_schedule`` leaves the momentum alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax_resblock.errors import CheckpointError

Options = Mapping[str, Any]
"""A param group without its parameters, as torch has it: ``lr``, ``initial_lr``, ``momentum``."""


def base_rate(group: Options) -> float:
    """The rate that a schedule scales: ``initial_lr`` as torch stores it, or ``lr`` before that."""
    return float(group.get("initial_lr", group["lr"]))


def base_rates(groups: Sequence[Options]) -> list[float]:
    """:func:`base_rate` of every param group."""
    return [base_rate(group) for group in groups]


def refuse_other_bases(bases: Sequence[Any], groups: Sequence[Options], source: str) -> None:
    """Raises CheckpointError if a scheduler scales other rates than the optimizer began with."""
    scaled, began = [float(base) for base in bases], base_rates(groups)
    if scaled != began:
        words = f"scales the learning rates {scaled}, but the optimizer began with {began}"
        raise CheckpointError(f"{source} {words}.")


@dataclass(frozen=True)
class Schedule(ABC):
    """A learning rate by torch's ``last_epoch``, which is 0 at the first optimizer step."""

    @abstractmethod
    def rate(self, step: int, group: Options, number: int = 0) -> float:
        """The learning rate of the param group ``number`` at ``step``, both from 0."""

    def momentum(self, step: int, group: Options, number: int = 0) -> float | None:
        """What becomes of ``momentum`` (or of Adam's first beta); None leaves it alone."""
        del step, group, number

    @property
    def length(self) -> int | None:
        """Steps after which the schedule has ended; None if it never ends."""
        return None

    @property
    def end(self) -> int | None:
        """The last step that has a rate; None if all have."""
        return None


@dataclass(frozen=True)
class Scaled(Schedule):
    """A schedule that multiplies the base rate, the same for all groups."""

    @abstractmethod
    def share(self, step: int) -> float:
        """Share of the base rate."""

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        return base_rate(group) * self.share(step)


@dataclass(frozen=True)
class Fixed(Schedule):
    """No schedule: the rate that every group has."""

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        return float(group["lr"])


@dataclass(frozen=True)
class StepLR(Scaled):
    r""":math:`\gamma^{\lfloor t / s \rfloor}`, with ``step_size`` :math:`s`."""

    step_size: int
    gamma: float

    def share(self, step: int) -> float:
        return self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class MultiStepLR(Scaled):
    r""":math:`\gamma^k` after ``k`` milestones; one that occurs twice counts twice."""

    milestones: tuple[int, ...]
    gamma: float

    def share(self, step: int) -> float:
        return self.gamma ** sum(0 <= milestone <= step for milestone in self.milestones)


@dataclass(frozen=True)
class ExponentialLR(Scaled):
    r""":math:`\gamma^t`."""

    gamma: float

    def share(self, step: int) -> float:
        return self.gamma**step


@dataclass(frozen=True)
class ConstantLR(Scaled):
    """``factor`` before step ``total_iters``, 1 from there."""

    factor: float
    total_iters: int

    def share(self, step: int) -> float:
        # torch never leaves the factor if total_iters is 0
        return self.factor if step < self.total_iters or not self.total_iters else 1.0


@dataclass(frozen=True)
class LinearLR(Scaled):
    """A line from ``start_factor`` to ``end_factor`` in ``total_iters`` steps, then level."""

    start_factor: float
    end_factor: float
    total_iters: int

    def share(self, step: int) -> float:
        if not self.total_iters:
            return self.start_factor
        rise = self.end_factor - self.start_factor
        return self.start_factor + rise * min(step, self.total_iters) / self.total_iters


@dataclass(frozen=True)
class PolynomialLR(Scaled):
    r""":math:`(1 - \min(t, T) / T)^p`, with ``total_iters`` :math:`T` and ``power`` :math:`p`."""

    total_iters: int
    power: float

    def share(self, step: int) -> float:
        if not self.total_iters:
            return 1.0  # torch does nothing
        return (1 - min(step, self.total_iters) / self.total_iters) ** self.power

    @property
    def length(self) -> int:
        return self.total_iters


@dataclass(frozen=True)
class CosineAnnealingLR(Schedule):
    r""":math:`\eta_{min} + \tfrac{1}{2} (\eta - \eta_{min}) (1 + \cos(\pi t / T))` with ``T_max``
    :math:`T`; past it the rate climbs again. ``eta_min`` is a rate, the same for all groups.

    Reference: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    T_max: int
    eta_min: float

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        height = base_rate(group) - self.eta_min
        return self.eta_min + height * (1 + math.cos(math.pi * step / self.T_max)) / 2

    @property
    def length(self) -> int:
        return self.T_max


@dataclass(frozen=True)
class Phase:
    """A piece of :class:`OneCycleLR`, by names of param group options, such as ``max_lr``."""

    end_step: float
    start_lr: str
    end_lr: str
    start_momentum: str
    end_momentum: str


@dataclass(frozen=True)
class OneCycleLR(Schedule):
    """Up to ``max_lr`` and down again in ``total_steps``, by ``"cos"`` or ``"linear"`` phases; the
    momentum goes the other way if ``cycle_momentum``, as Adam's ``betas[0]`` if ``use_beta1``.

    Reference: Smith & Topin 2019, arXiv:1708.07120.
    """

    total_steps: int
    phases: tuple[Phase, ...]
    anneal: str
    cycle_momentum: bool
    use_beta1: bool

    def _between(self, step: int, group: Options, what: str) -> float:
        ends = [phase.end_step for phase in self.phases]
        if not ends:
            raise ValueError("a one-cycle schedule has at least one phase")
        index = min(bisect_left(ends, step), len(ends) - 1)
        phase, start = self.phases[index], ends[index - 1] if index else 0.0
        names = (getattr(phase, f"{end}_{what}") for end in ("start", "end"))
        first, last = (float(group[name]) for name in names)
        share = (step - start) / (phase.end_step - start)
        if self.anneal == "linear":
            return (last - first) * share + first
        return last + (first - last) / 2 * (1 + math.cos(math.pi * share))

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        return self._between(min(step, self.total_steps), group, "lr")

    def momentum(self, step: int, group: Options, number: int = 0) -> float | None:
        if not self.cycle_momentum:
            return None
        return self._between(min(step, self.total_steps), group, "momentum")

    @property
    def length(self) -> int:
        return self.total_steps

    @property
    def end(self) -> int:
        return self.total_steps


@dataclass(frozen=True)
class SequentialLR(Schedule):
    """One schedule after the other, each counting from its own start, at the milestones.

    ``bases`` are the base rates of each schedule, one per param group, where they have their own: a
    OneCycleLR that is made after another sets new ones. Empty where all have the group's.
    """

    schedules: tuple[Schedule, ...]
    milestones: tuple[int, ...]
    bases: tuple[tuple[float, ...], ...] = ()

    def _now(self, step: int) -> tuple[int, int]:
        index = bisect_right(self.milestones, step)
        return index, step - (self.milestones[index - 1] if index else 0)

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        return self.rate_of(*self._now(step), group, number)

    def rate_of(self, index: int, since: int, group: Options, number: int) -> float:
        """The rate of one schedule at its own step; the first begins with the group's rate."""
        own = {"initial_lr": self.bases[index][number]} if self.bases and index else {}
        return self.schedules[index].rate(since, {**group, **own}, number)

    def momentum(self, step: int, group: Options, number: int = 0) -> float | None:
        index, since = self._now(step)
        starts = (0, *self.milestones)
        before = [(i, starts[i + 1] - 1 - starts[i]) for i in range(index - 1, -1, -1)]
        after = [(i, 0) for i in range(index + 1, len(self.schedules))]
        # one that leaves it alone keeps what the last one set, or the next when it was made
        places = [(index, since), *before, *after]
        found = (self.schedules[i].momentum(at, group, number) for i, at in places)
        return next((momentum for momentum in found if momentum is not None), None)

    def _behind_the_last(self, steps: int | None) -> int | None:
        return None if steps is None else steps + max(self.milestones, default=0)

    @property
    def length(self) -> int | None:
        return self._behind_the_last(self.schedules[-1].length)

    @property
    def end(self) -> int | None:
        return self._behind_the_last(self.schedules[-1].end)


def warmup_cosine(warmup_steps: int, total_steps: int, warmup_factor: float = 0.1) -> Schedule:
    """A linear warm-up from ``warmup_factor`` of the base rate, in (0, 1], then half a cosine down
    to 0; raises ValueError for numbers that make no schedule.

    Reference: Goyal et al. 2017, arXiv:1706.02677.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"{warmup_steps=} must be at least 0 and below {total_steps=}.")
    if not 0 < warmup_factor <= 1:
        raise ValueError(f"{warmup_factor=} must be above 0 and at most 1.")
    cosine = CosineAnnealingLR(total_steps - warmup_steps, 0.0)
    if not warmup_steps:
        return cosine
    return SequentialLR((LinearLR(warmup_factor, 1.0, warmup_steps), cosine), (warmup_steps,))
