"""Which learning rate and momentum a run has at which step, for every param group."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from flax_resblock.convert import StateMap
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.optimizer_state import fresh_optimizer
from flax_resblock.runs.optimizers import moving
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState, scheduled
from flax_resblock.runs.schedules import Fixed, Schedule, warmup_cosine
from flax_resblock.training.config import TrainConfig


class Rates(NamedTuple):
    """What changes from step to step, for every param group: learning rates ``(groups,)`` and,
    where the schedule moves it, the momentum ``(groups, 3)``.
    """

    learning_rates: np.ndarray
    momenta: np.ndarray | None = None


def schedule_of(config: TrainConfig, steps: int) -> Schedule:
    """The configured schedule with ``steps`` steps per epoch, once per batch."""
    return warmup_cosine(config.warmup(steps), config.end(steps), config.warmup_factor)


def settings_of(config: TrainConfig) -> dict[str, object]:
    """The configuration without the network, as a checkpoint keeps it."""
    return {name: value for name, value in asdict(config).items() if name != "model"}


def new_run(config: TrainConfig, steps: int) -> Run:
    """The configured run before its first step.

    Args:
      config: The run.
      steps: Steps per epoch.
    """
    own: dict[str, Any] = (
        {"betas": config.betas}
        if OPTIMIZERS[config.optimizer].counts
        else {"momentum": config.momentum, "nesterov": config.nesterov}
    )
    record = fresh_optimizer(
        config.optimizer,
        StateMap(config.model, "torchvision"),
        decay=config.decay,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        **own,
    )
    return at(
        Run(record, ScheduleState(schedule_of(config, steps), 0), 0, 0, settings_of(config)), 0
    )


def at(run: Run, position: int) -> Run:
    """The run with its schedule, and the rates of its param groups, at another position."""
    if run.schedule is None:
        return run
    schedule = run.schedule.schedule
    groups = tuple(
        replace(group, options=scheduled(group.options, schedule, position))
        for group in run.optimizer.groups
    )
    return replace(
        run,
        optimizer=replace(run.optimizer, groups=groups),
        schedule=replace(run.schedule, position=position),
    )


@dataclass(frozen=True)
class Pace:
    """A run's rates by step.

    Attributes:
      run: Where it goes on.
      steps: Steps per epoch.
      start: Step at which it goes on, from 0 over the whole run.
    """

    run: Run
    steps: int
    start: int

    @classmethod
    def of(cls, run: Run, steps: int) -> Pace:
        """From the run's own counters: steps done; epochs done, where the steps are unknown or
        belong to epochs of another length.
        """
        epochs = run.epochs or 0
        by_steps = run.steps is not None and (
            not epochs or epochs * steps <= run.steps <= (epochs + 1) * steps
        )
        return cls(run, steps, run.steps or 0 if by_steps else epochs * steps)

    def position(self, step: int) -> int:
        """How often a scheduler of torch would have been stepped before ``step``."""
        state = self.run.schedule
        if state is None:
            return 0
        return state.position + (
            step // self.steps - self.start // self.steps if state.per_epoch else step - self.start
        )

    def after(self, step: int) -> Run:
        """The run when ``step`` steps are done, with the buffers that it had."""
        return replace(at(self.run, self.position(step)), steps=step, epochs=step // self.steps)

    def rates(self, step: int) -> Rates:
        """Of the step numbered ``step``."""
        groups = [group.options for group in self.run.optimizer.groups]
        schedule = Fixed() if self.run.schedule is None else self.run.schedule.schedule
        position = self.position(step)
        momenta = [schedule.momentum(position, group) for group in groups]
        moved = [momentum for momentum in momenta if momentum is not None]
        return Rates(
            np.array([schedule.rate(position, group) for group in groups]),
            moving(moved) if moved else None,
        )
