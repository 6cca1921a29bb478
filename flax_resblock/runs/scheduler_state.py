"""State dicts of ``torch.optim.lr_scheduler`` to :mod:`flax_resblock.runs.schedules`; the way back
is :mod:`flax_resblock.runs.scheduler_writing`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flax_resblock.errors import CheckpointError, damaged, raised
from flax_resblock.runs import mmengine_schedules, timm_schedules, transformers_schedules
from flax_resblock.runs.optimizer_state import OptimizerState
from flax_resblock.runs.other_schedules import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LRLambda,
    chains,
    ended,
    misfits,
    of_functions,
)
from flax_resblock.runs.plateau import ReduceLROnPlateau
from flax_resblock.runs.scheduler_kinds import one_schedule
from flax_resblock.runs.schedules import (
    OneCycleLR,
    Options,
    Schedule,
    SequentialLR,
    base_rates,
    refuse_other_bases,
)
from flax_resblock.runs.ticks import BATCH, Unit
from flax_resblock.runs.timm_schedules import TimmSchedule
from flax_resblock.runs.transformers_schedules import Logged, TransformersSchedule, recognised


@dataclass(frozen=True)
class ScheduleState:
    """A schedule, its steps so far (torch's ``last_epoch``), and how often it is stepped."""

    schedule: Schedule
    position: int
    unit: Unit = BATCH


def describe_schedule(state: ScheduleState) -> str:
    """In a few words: ``"SequentialLR at step 66, one per batch"``."""
    words = f"{type(state.schedule).__name__} at step {state.position}, {state.unit}"
    if isinstance(state.schedule, ReduceLROnPlateau):
        metric = "loss" if state.schedule.mode == "min" else "accuracy"
        words += f", by the test {metric} (what the program measured is not in the file)"
    if isinstance(state.schedule, TimmSchedule):
        words += f", the {state.schedule.kind} one"
    if isinstance(state.schedule, TransformersSchedule):
        words += (
            f", recognised by its rate as the {state.schedule.kind} one with "
            f"{state.schedule.warmup} warm-up steps of {state.schedule.total}"
        )
    if isinstance(state.schedule, CyclicLR):
        words += ", without a scale_fn (which would not be in the file)"
    return words


def bases_of(state: Mapping[str, Any]) -> list[float] | None:
    """The base rates in a scheduler's state dict, or in that of the last scheduler in it."""
    parts = state.get("_schedulers")
    state = parts[-1] if isinstance(parts, list) and parts else state
    found = state.get("base_lrs") if isinstance(state, Mapping) else None
    return [float(base) for base in found] if isinstance(found, list) else None


def with_initial_rates(optimizer: OptimizerState, state: Mapping[str, Any]) -> OptimizerState:
    """The optimizer with the scheduler's ``initial_lr`` where its param groups have lost it."""
    bases = bases_of(state)
    lost = not any("initial_lr" in group.options for group in optimizer.groups)
    if bases is None or not lost or len(bases) != len(optimizer.groups):
        return optimizer
    pairs = zip(optimizer.groups, bases, strict=True)
    groups = [replace(g, options={**g.options, "initial_lr": base}) for g, base in pairs]
    return replace(optimizer, groups=tuple(groups))


def read_schedule(
    state: Mapping[str, Any],
    groups: Sequence[Options],
    *,
    lr_lambda: LRLambda | None = None,
    total: int | None = None,
    logged: Logged = (),
    source: str = "the scheduler",
) -> tuple[Schedule, int]:
    """Reads the schedule in a scheduler's state dict, and its position.

    Args:
      groups: The optimizer's param groups, whose rates must be the schedule's.
      lr_lambda: The function of a LambdaLR or MultiplicativeLR, or one per group.
      total, logged: Steps of the whole run, and rates by step, if a Trainer says them.
    Raises:
      CheckpointError: A scheduler without counterpart, a damaged state, or rates that are not on
        the schedule.
    """
    words = f"{source} is no complete state of a learning-rate scheduler"
    with damaged(words, says=raised):
        schedule = _schedule(state, groups, lr_lambda, total, logged, source)
        position = _position(state, source)
        _check_place(schedule, position, state, source)
        _check_rates(schedule, position, groups, source)
    return schedule, position


def _position(state: Mapping[str, Any], source: str) -> int:
    if mmengine_schedules.PARTS in state:
        return int(state[mmengine_schedules.PARTS][0]["_global_step"])
    if "last_epoch" in state or not state.get("_schedulers"):
        return int(state["last_epoch"])
    positions = {int(part["last_epoch"]) for part in state["_schedulers"]}  # a ChainedScheduler
    if len(positions) > 1:
        raise CheckpointError(
            f"{source}: the members of its ChainedScheduler are at different steps, "
            f"{sorted(positions)}, which has no counterpart here."
        )
    return positions.pop()


def _check_rates(schedule: Schedule, position: int, groups: Sequence[Options], source: str) -> None:
    for number in misfits(schedule, position, groups):
        group = groups[number]
        raise CheckpointError(
            f"{source} gives param group {number} the learning rate "
            f"{schedule.rate(position, group, number):.9g} at its step {position}, but the "
            f"optimizer has {float(group['lr']):.9g}: it was changed by other means than the "
            "schedule."
        )


def _check_place(schedule: Schedule, position: int, state: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError if the schedule is not where its own state says it is."""
    if isinstance(schedule, CosineAnnealingWarmRestarts):
        place = state["T_cur"], state["T_i"]
        if place != schedule.since(position):
            raise CheckpointError(
                f"{source}: its CosineAnnealingWarmRestarts is {place[0]:g} steps after its last "
                f"restart, of {place[1]:g}, at its step {position}. It was stepped by fractions of "
                "an epoch or by numbers of the program's own, which has no counterpart here."
            )
    if isinstance(schedule, OneCycleLR) and state.get("_step_count", position + 1) > position + 1:
        raise CheckpointError(
            f"{source}: its OneCycleLR has counted {state['_step_count']} calls by its step "
            f"{position}, as Accelerate makes it when it accumulates gradients. It would end it by "
            "that count, which has no counterpart here."
        )
    if isinstance(schedule, ChainedScheduler) and position > (schedule.end or position):
        raise CheckpointError(
            f"{source}: a ChainedScheduler with a cosine that has ended, at its step "
            f"{schedule.end}, has no counterpart here."
        )


def _schedule(
    state: Mapping[str, Any],
    groups: Sequence[Options],
    lr_lambda: LRLambda | None,
    total: int | None,
    logged: Logged,
    source: str,
) -> Schedule:
    if "lr_lambdas" in state:
        schedule = transformers_schedules.read_written(state)
        theirs = not any(one is None for one in state["lr_lambdas"])
        if schedule is None and lr_lambda is None and theirs and total:
            schedule = recognised(int(state["last_epoch"]), groups, total, logged)
        schedule = schedule or of_functions(state, groups, lr_lambda, source)
    elif "_schedulers" in state:
        return _several(state, groups, lr_lambda, source)
    elif mmengine_schedules.PARTS in state:
        return mmengine_schedules.read_parts(state[mmengine_schedules.PARTS], groups, source)[0]
    elif timm_schedules.is_timm(state):
        return timm_schedules.read_timm(state, groups, source)
    else:
        schedule = one_schedule(state, source)
        if isinstance(schedule, ReduceLROnPlateau):
            rates, last = [float(group["lr"]) for group in groups], state.get("_last_lr")
            if last is not None and [float(rate) for rate in last] != rates:
                raise CheckpointError(
                    f"{source} left the learning rates {[float(rate) for rate in last]}, but the "
                    f"optimizer has {rates}: they were changed by other means than the schedule."
                )
            return schedule
    refuse_other_bases(state["base_lrs"], groups, source)
    return schedule


def _several(
    state: Mapping[str, Any], groups: Sequence[Options], lr_lambda: LRLambda | None, source: str
) -> Schedule:
    """A SequentialLR or a ChainedScheduler."""
    name = "SequentialLR" if "_milestones" in state else "ChainedScheduler"
    now = bisect_right(state.get("_milestones", ()), state.get("last_epoch", 0))
    members: list[Schedule] = []
    for number, part in enumerate(state["_schedulers"]):
        of_functions_here = "lr_lambdas" in part and name == "SequentialLR"
        if of_functions_here and number == now:
            members.append(of_functions(part, groups, lr_lambda, source))
        elif of_functions_here and number < now:
            members.append(ended(part))
        elif "_schedulers" in part or "lr_lambdas" in part:
            inner = "sequence or chain" if "_schedulers" in part else "LambdaLR"
            later = " that is still to come" if of_functions_here else ""
            raise CheckpointError(
                f"{source}: a {inner}{later} inside a {name} has no counterpart here."
            )
        else:
            members.append(one_schedule(part, source))
    bases = tuple(tuple(float(base) for base in part["base_lrs"]) for part in state["_schedulers"])
    own = tuple(base_rates(groups))
    for number, member in enumerate(members):
        words = type(member).__name__
        known = not isinstance(member, CyclicLR | ReduceLROnPlateau)
        if not known or (name == "ChainedScheduler" and not chains(member)):
            raise CheckpointError(f"{source}: a {words} inside a {name} has no counterpart here.")
        if number and name == "SequentialLR" and getattr(member, "total_iters", 1) == 0:
            raise CheckpointError(
                f"{source}: a {words} of 0 steps after another schedule has no counterpart here."
            )
    one_cycle = any(isinstance(member, OneCycleLR) for member in members)
    if any(base != own for base in bases) and not one_cycle:
        raise CheckpointError(
            f"{source} scales the learning rates {list(map(list, dict.fromkeys(bases)))}, but the "
            f"optimizer began with {list(own)}."
        )
    if name == "ChainedScheduler":
        return ChainedScheduler(tuple(members))
    milestones = tuple(int(step) for step in state["_milestones"])
    return SequentialLR(tuple(members), milestones, bases if one_cycle else ())
