"""State dicts of ``torch.optim.lr_scheduler`` to :mod:`flax_resblock.runs.schedules` and back."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from typing import Any

from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs import schedules
from flax_resblock.runs.schedules import (
    MultiStepLR,
    OneCycleLR,
    Options,
    Phase,
    Schedule,
    SequentialLR,
    base_rate,
)

PLAIN_SCHEDULES = (
    *(schedules.StepLR, schedules.CosineAnnealingLR, schedules.LinearLR),
    *(schedules.ConstantLR, schedules.PolynomialLR, schedules.ExponentialLR),
)
"""Schedules whose fields are the entries of the state dict."""
_COMMON = frozenset(
    {
        *("base_lrs", "last_epoch", "verbose", "_last_lr"),
        *("_step_count", "_is_initial", "_get_lr_called_within_step"),
    }
)
"""Entries that every scheduler may have."""
_ONE_CYCLE = frozenset(
    {
        *("total_steps", "_schedule_phases", "_anneal_func_type", "anneal_func"),
        *("cycle_momentum", "use_beta1"),
    }
)
_WITHOUT_COUNTERPART = {
    "lr_lambdas": (
        "LambdaLR (or MultiplicativeLR) keeps its function in the program, not in the file"
    ),
    "patience": "ReduceLROnPlateau depends on what was measured, not on the step",
    "T_0": "CosineAnnealingWarmRestarts has no counterpart here",
    "_anneal_strategy": "SWALR has no counterpart here",
    "max_lrs": "CyclicLR has no counterpart here",
}
"""Entries that only one scheduler has, and why that one is refused."""
_NEAR = 1e-9
"""Relative difference between the closed form's rate and torch's own that rounding explains."""


@dataclass(frozen=True)
class ScheduleState:
    """A schedule and how far it is.

    Attributes:
      schedule: The learning rate by step.
      position: How often the scheduler was stepped; torch's ``last_epoch``.
      per_epoch: Stepped once per epoch, not once per batch.
    """

    schedule: Schedule
    position: int
    per_epoch: bool = False


def describe_schedule(state: ScheduleState) -> str:
    """In a few words: ``"SequentialLR at step 66, one per batch"``."""
    return (
        f"{type(state.schedule).__name__} at step {state.position}, one per "
        f"{'epoch' if state.per_epoch else 'batch'}"
    )


def read_schedule(
    state: Mapping[str, Any], groups: Sequence[Options], *, source: str = "the scheduler"
) -> tuple[Schedule, int]:
    """Reads the schedule in a scheduler's state dict, and its position.

    Args:
      state: What ``scheduler.state_dict()`` gave.
      groups: The optimizer's param groups, whose rates must be the schedule's.
      source: For messages.
    Raises:
      CheckpointError: A scheduler without counterpart, a damaged state, or rates that are not on
        the schedule.
    """
    try:
        schedule, position = _schedule(state, groups, source), int(state["last_epoch"])
        for number, group in enumerate(groups):
            expected, found = schedule.rate(position, group), float(group["lr"])
            if not abs(expected - found) <= _NEAR * max(abs(expected), base_rate(group)):
                raise CheckpointError(
                    f"{source} gives param group {number} the learning rate {expected:.9g} at "
                    f"its step {position}, but the optimizer has {found:.9g}: it was "
                    "changed by other means than the schedule."
                )
    except CheckpointError:
        raise
    except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(
            f"{source} is no complete state of a learning-rate scheduler "
            f"({type(error).__name__}: {error})."
        ) from error
    return schedule, position


def _schedule(state: Mapping[str, Any], groups: Sequence[Options], source: str) -> Schedule:
    for marker, why in _WITHOUT_COUNTERPART.items():
        if marker in state:
            raise CheckpointError(f"{source}: {why}.")
    if "_schedulers" in state:
        return _sequence(state, groups, source)
    schedule = _simple(state, state.keys() - _COMMON, source)
    bases = [float(base) for base in state["base_lrs"]]
    if bases != [base_rate(group) for group in groups]:
        raise CheckpointError(
            f"{source} scales the learning rates {bases}, but the optimizer began with "
            f"{[base_rate(group) for group in groups]}."
        )
    return schedule


def _simple(state: Mapping[str, Any], own: Set[str], source: str) -> Schedule:
    """A schedule that has no others in it, by the entries that are its own."""
    if "_schedule_phases" in own and own <= _ONE_CYCLE:
        phases = tuple(Phase(**phase) for phase in state["_schedule_phases"])
        anneal = {"cos": "cos", "linear": "linear"}[state["_anneal_func_type"]]
        moves, beta = bool(state["cycle_momentum"]), bool(state.get("use_beta1"))
        return OneCycleLR(int(state["total_steps"]), phases, anneal, moves, beta)
    if own == {"milestones", "gamma"}:
        counts = {int(step): int(count) for step, count in state["milestones"].items()}
        return MultiStepLR(
            tuple(sorted(step for step, count in counts.items() for _ in range(count))),
            float(state["gamma"]),
        )
    for kind in PLAIN_SCHEDULES:
        if own == set(kind.__dataclass_fields__):
            return kind(**{name: state[name] for name in own})
    raise CheckpointError(
        f"{source} is no learning-rate scheduler with a counterpart here: it has "
        f"{some(sorted(map(str, own))) or 'nothing of its own'}."
    )


def _sequence(state: Mapping[str, Any], groups: Sequence[Options], source: str) -> SequentialLR:
    if "_milestones" not in state:
        raise CheckpointError(f"{source}: ChainedScheduler has no counterpart here.")
    members = tuple(_schedule(part, groups, source) for part in state["_schedulers"])
    for number, member in enumerate(members):
        words = type(member).__name__
        if isinstance(member, SequentialLR | OneCycleLR):
            raise CheckpointError(
                f"{source}: a {words} inside a SequentialLR has no counterpart here."
            )
        if number and getattr(member, "total_iters", 1) == 0:
            raise CheckpointError(
                f"{source}: a {words} of 0 steps after another schedule has no counterpart here."
            )
    return SequentialLR(members, tuple(int(step) for step in state["_milestones"]))


def scheduled(options: Options, schedule: Schedule, position: int) -> dict[str, Any]:
    """A param group's options as torch's scheduler leaves them at ``position``, its ``last_epoch``:
    ``initial_lr``, ``lr``, and the momentum where the schedule moves it.
    """
    now = {**options, "initial_lr": base_rate(options), "lr": schedule.rate(position, options)}
    momentum = schedule.momentum(position, options)
    if momentum is None:
        return now
    if "betas" in options:
        return {**now, "betas": (momentum, *options["betas"][1:])}
    return {**now, "momentum": momentum}


def write_schedule(state: ScheduleState, groups: Sequence[Options]) -> dict[str, Any]:
    """What ``load_state_dict`` of a scheduler of the same kind takes (any but ``Fixed``), for the
    optimizer's param groups at this position.
    """
    return _state(state.schedule, state.position, groups, [float(group["lr"]) for group in groups])


def _state(
    schedule: Schedule, position: int, groups: Sequence[Options], rates: list[float]
) -> dict[str, Any]:
    if isinstance(schedule, SequentialLR):
        current = bisect_right(schedule.milestones, position)
        starts = (0, *schedule.milestones)
        parts = []
        for index, part in enumerate(schedule.schedules):
            last = (
                position if index == current else starts[index + 1] - 1 if index < current else -1
            )
            since = last - starts[index] if index <= current else -1
            its_rates = [part.rate(max(since, 0), group) for group in groups]
            parts.append(_state(part, since, groups, rates if index == current else its_rates))
        own = {"_milestones": list(schedule.milestones), "last_epoch": position}
        return own | {"_last_lr": rates, "_schedulers": parts}
    if isinstance(schedule, OneCycleLR):
        own: dict[str, Any] = {
            "total_steps": schedule.total_steps,
            "_schedule_phases": [asdict(phase) for phase in schedule.phases],
            "_anneal_func_type": schedule.anneal,
            "cycle_momentum": schedule.cycle_momentum,
            **({"use_beta1": schedule.use_beta1} if schedule.cycle_momentum else {}),
        }
    elif isinstance(schedule, MultiStepLR):
        own = {"milestones": Counter(schedule.milestones), "gamma": schedule.gamma}
    else:
        own = {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}
    return {
        **own,
        "base_lrs": [base_rate(group) for group in groups],
        "last_epoch": position,
        "_step_count": max(position + 1, 1),
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": rates,
    }
