"""The learning rates and momenta of a run by step, for every param group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from flax_resblock.convert.state_map import TensorMap
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.optimizer_state import fresh_optimizer
from flax_resblock.runs.optimizers import moving
from flax_resblock.runs.plateau import ReduceLROnPlateau
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState
from flax_resblock.runs.scheduler_writing import scheduled
from flax_resblock.runs.schedules import Fixed, Schedule, warmup_cosine
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.reports import EvaluationReport


class Rates(NamedTuple):
    """The rates of a step.

    Attributes:
      learning_rates: One per param group, ``(groups,)``.
      momenta: ``(groups, 3)`` if the schedule changes the momentum, else None.
    """

    learning_rates: np.ndarray
    momenta: np.ndarray | None = None


def schedule_of(config: TrainConfig, steps: int) -> Schedule:
    """The configured schedule, stepped once per batch, with ``steps`` steps per epoch."""
    return warmup_cosine(config.warmup(steps), config.end(steps), config.warmup_factor)


def settings_of(config: TrainConfig) -> dict[str, object]:
    """The configuration without the network, as it is stored in checkpoints."""
    return {name: value for name, value in asdict(config).items() if name != "model"}


def new_run(config: TrainConfig, steps: int, tensors: TensorMap) -> Run:
    """The configured run of a model with these tensors before its first step, with ``steps`` steps
    per epoch.
    """
    own: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    if OPTIMIZERS[config.optimizer].counts:
        own = {"betas": config.betas}
    own |= {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    record = fresh_optimizer(config.optimizer, tensors, decay=config.decay, **own)
    schedule = ScheduleState(schedule_of(config, steps), 0)
    return at(Run(record, schedule, 0, 0, settings_of(config)), 0)


def at(run: Run, position: int) -> Run:
    """The run with its schedule and its learning rates at another position."""
    if run.schedule is None:
        return run
    schedule = run.schedule.schedule
    moved = _with_options(
        run, lambda options, number: scheduled(options, schedule, position, number)
    )
    return replace(moved, schedule=replace(run.schedule, position=position))


def _with_options(run: Run, change: Callable[[Mapping[str, Any], int], Mapping[str, Any]]) -> Run:
    """The run with the options of its param groups as a function of these and of their number."""
    groups = (
        replace(group, options=change(group.options, number))
        for number, group in enumerate(run.optimizer.groups)
    )
    return replace(run, optimizer=replace(run.optimizer, groups=tuple(groups)))


def rescaled(run: Run, learning_rate: float | None) -> Run:
    """The run with another base rate; its param groups keep their ratios."""

    def base_of(options: Mapping[str, Any]) -> float:
        return float(options.get("initial_lr", options["lr"]))

    first = base_of(run.optimizer.groups[0].options)
    factor = 1.0 if learning_rate is None or not first else learning_rate / first

    def scaled(options: Mapping[str, Any], _: int) -> Mapping[str, Any]:
        return {**options, **dict.fromkeys(("lr", "initial_lr"), base_of(options) * factor)}

    return _with_options(run, scaled)


def metric_of(schedule: ReduceLROnPlateau, evaluation: EvaluationReport) -> float:
    """What steps a ReduceLROnPlateau: the test loss where it waits for a minimum, else the test
    accuracy, in percent if the best so far is.
    """
    if schedule.mode == "min":
        return evaluation.loss
    return evaluation.accuracy * (100 if schedule.best > 1 else 1)


@dataclass(frozen=True)
class Pace:
    """The rates of a run by step.

    Attributes:
      steps: Steps per epoch.
      start: Step at which it continues, from 0 over the whole run.
    """

    run: Run
    steps: int
    start: int

    @classmethod
    def of(cls, run: Run, steps: int) -> Pace:
        """Starts at the run's steps, or at its epochs if the steps are unknown or misfit them."""
        epochs = run.epochs or 0
        by_steps = run.steps is not None and (
            not epochs or epochs * steps <= run.steps <= (epochs + 1) * steps
        )
        return cls(run, steps, run.steps or 0 if by_steps else epochs * steps)

    def position(self, step: int) -> int:
        """How often a PyTorch scheduler would have been stepped before ``step``."""
        state = self.run.schedule
        if state is None:
            return 0
        if isinstance(state.schedule, ReduceLROnPlateau):
            return state.position
        epochs = step // self.steps - self.start // self.steps
        count = epochs if state.unit.per_epoch else step - self.start
        return state.position + state.unit.ticks * count

    def after(self, step: int) -> Run:
        """The run after ``step`` steps, with unchanged buffers."""
        return replace(at(self.run, self.position(step)), steps=step, epochs=step // self.steps)

    def seeing(self, evaluation: EvaluationReport) -> Pace:
        """The pace after an epoch's evaluation, which steps a ReduceLROnPlateau."""
        state = self.run.schedule
        if state is None or not isinstance(state.schedule, ReduceLROnPlateau):
            return self
        schedule, reduced = state.schedule.seen(metric_of(state.schedule, evaluation))

        def slower(options: Mapping[str, Any], number: int) -> Mapping[str, Any]:
            return {**options, "lr": schedule.reduced(float(options["lr"]), number)}

        run = _with_options(self.run, slower) if reduced else self.run
        seen = replace(state, schedule=schedule, position=state.position + 1)
        return replace(self, run=replace(run, schedule=seen))

    def rates(self, step: int) -> Rates:
        """The rates of the step numbered ``step``."""
        groups = [group.options for group in self.run.optimizer.groups]
        schedule = Fixed() if self.run.schedule is None else self.run.schedule.schedule
        position = self.position(step)
        momenta = [schedule.momentum(position, group, n) for n, group in enumerate(groups)]
        moved = [momentum for momentum in momenta if momentum is not None]
        return Rates(
            np.array([schedule.rate(position, group, n) for n, group in enumerate(groups)]),
            moving(moved) if moved else None,
        )
