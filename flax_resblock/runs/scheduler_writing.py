"""Schedules at a position to state dicts of ``torch.optim.lr_scheduler`` and its param groups."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from flax_resblock.runs import mmengine_schedules, timm_schedules, transformers_schedules
from flax_resblock.runs.mmengine_schedules import MMEngineSchedule
from flax_resblock.runs.other_schedules import (
    ChainedScheduler,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
)
from flax_resblock.runs.plateau import ReduceLROnPlateau
from flax_resblock.runs.scheduler_kinds import PLATEAU
from flax_resblock.runs.scheduler_state import ScheduleState
from flax_resblock.runs.schedules import (
    MultiStepLR,
    OneCycleLR,
    Options,
    Schedule,
    SequentialLR,
    base_rate,
    base_rates,
)
from flax_resblock.runs.timm_schedules import TimmSchedule
from flax_resblock.runs.transformers_schedules import TransformersSchedule


def scheduled(
    options: Options, schedule: Schedule, position: int, number: int = 0
) -> dict[str, Any]:
    """The options of the param group ``number`` as torch's scheduler leaves them at ``position``,
    its ``last_epoch``: ``initial_lr``, ``lr``, and the momentum where the schedule moves it."""
    if isinstance(schedule, ReduceLROnPlateau):
        return dict(options)
    rate = schedule.rate(position, options, number)
    now = {**options, "initial_lr": base_rate(options), "lr": rate}
    momentum = schedule.momentum(position, options, number)
    if momentum is None:
        return now
    if "betas" in options:
        return {**now, "betas": (momentum, *options["betas"][1:])}
    return {**now, "momentum": momentum}


def write_schedule(state: ScheduleState, groups: Sequence[Options]) -> dict[str, Any]:
    """What ``load_state_dict`` of a scheduler of the same kind takes (any but ``Fixed``), for the
    optimizer's param groups at this position."""
    return _state(state.schedule, state.position, groups, [float(group["lr"]) for group in groups])


def _state(
    schedule: Schedule, position: int, groups: Sequence[Options], rates: list[float]
) -> dict[str, Any]:
    if isinstance(schedule, SequentialLR):
        return _sequence_state(schedule, position, groups, rates)
    if isinstance(schedule, ChainedScheduler):
        members = schedule.schedules
        parts = []
        for last, member in enumerate(members):
            # each sees the rate that those behind it left one step earlier
            now, before = (
                ChainedScheduler(members[: last + 1]),
                ChainedScheduler(members[last + 1 :]),
            )
            so_far = [
                now.rate(position, group, n)
                * (before.rate(position - 1, group, n) / base_rate(group) if position else 1.0)
                for n, group in enumerate(groups)
            ]
            parts.append(_state(member, position, groups, so_far))
        return {"_last_lr": rates, "_schedulers": parts}
    if isinstance(schedule, ReduceLROnPlateau):
        own = {name: getattr(schedule, name) for name in PLATEAU}
        own["min_lrs"] = list(schedule.min_lrs)
        return own | {"last_epoch": position, "_last_lr": rates}
    if isinstance(schedule, MMEngineSchedule):
        return mmengine_schedules.written(schedule, position, groups, rates)
    if isinstance(schedule, TimmSchedule):
        return timm_schedules.written(schedule, position, groups)
    bases, counted = base_rates(groups), True
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
    elif isinstance(schedule, CosineAnnealingWarmRestarts):
        now, length = schedule.since(max(position, 0))
        own, counted = {**asdict(schedule), "T_cur": now, "T_i": length}, False
    elif isinstance(schedule, CyclicLR):
        moving = {"use_beta1", "base_momentums", "max_momentums"}
        left = set() if schedule.cycle_momentum else moving
        values = {name: v for name, v in asdict(schedule).items() if name not in left}
        own = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        own["_scale_fn_custom"] = None
    elif isinstance(schedule, TransformersSchedule):
        own = transformers_schedules.written(schedule, len(groups))
    elif isinstance(schedule, LambdaLR):
        own = {"lr_lambdas": list(schedule.states)}
    else:
        own = {name: getattr(schedule, name) for name in schedule.__dataclass_fields__}
    return {
        **own,
        "base_lrs": bases,
        "last_epoch": position,
        "_step_count": max(position + 1, 1) if counted else 0,
        "_is_initial": False,
        "_get_lr_called_within_step": False,
        "_last_lr": rates,
    }


def _sequence_state(
    schedule: SequentialLR, position: int, groups: Sequence[Options], rates: list[float]
) -> dict[str, Any]:
    current = bisect_right(schedule.milestones, position)
    starts = (0, *schedule.milestones)
    parts = []
    for index, part in enumerate(schedule.schedules):
        last = position if index == current else starts[index + 1] - 1 if index < current else -1
        since = last - starts[index] if index <= current else -1
        based = [
            {**group, "initial_lr": schedule.bases[index][n]} if schedule.bases else group
            for n, group in enumerate(groups)
        ]
        own = [schedule.rate_of(index, max(since, 0), g, n) for n, g in enumerate(groups)]
        parts.append(_state(part, since, based, rates if index == current else own))
    own = {"_milestones": list(schedule.milestones), "last_epoch": position}
    return own | {"_last_lr": rates, "_schedulers": parts}
