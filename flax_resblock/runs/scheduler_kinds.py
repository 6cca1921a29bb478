"""The schedules that a scheduler's state dict can be told from, by its entries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs import schedules
from flax_resblock.runs.other_schedules import CosineAnnealingWarmRestarts, CyclicLR
from flax_resblock.runs.plateau import ReduceLROnPlateau
from flax_resblock.runs.schedules import MultiStepLR, OneCycleLR, Phase, Schedule

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
_CYCLIC = {one.name for one in fields(CyclicLR)} | {"_scale_fn_custom"}
_RESTARTS = {"T_0", "T_i", "T_mult", "eta_min", "T_cur"}
PLATEAU = tuple(one.name for one in fields(ReduceLROnPlateau))


def one_schedule(state: Mapping[str, Any], source: str) -> Schedule:
    """A schedule without others in it, by its own entries; else CheckpointError."""
    own = state.keys() - _COMMON
    if "_schedule_phases" in own and own <= _ONE_CYCLE:
        phases = tuple(Phase(**phase) for phase in state["_schedule_phases"])
        anneal = {"cos": "cos", "linear": "linear"}[state["_anneal_func_type"]]
        moves, beta = bool(state["cycle_momentum"]), bool(state.get("use_beta1"))
        return OneCycleLR(int(state["total_steps"]), phases, anneal, moves, beta)
    if own == _RESTARTS:
        if min(int(state["T_0"]), int(state["T_mult"])) < 1:
            raise ValueError("its T_0 and T_mult are at least 1")
        return CosineAnnealingWarmRestarts(
            int(state["T_0"]), int(state["T_mult"]), float(state["eta_min"])
        )
    if "max_lrs" in own and own <= _CYCLIC:
        return _cyclic(state, source)
    if own and own <= set(PLATEAU) and "patience" in own:
        values = {name: state[name] for name in PLATEAU}
        return ReduceLROnPlateau(**{**values, "min_lrs": tuple(state["min_lrs"])})
    if "_anneal_strategy" in own:
        raise CheckpointError(f"{source}: SWALR has no counterpart here.")
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


def _cyclic(state: Mapping[str, Any], source: str) -> CyclicLR:
    values: dict[str, Any] = {
        one.name: tuple(value) if isinstance(value := state[one.name], list) else value
        for one in fields(CyclicLR)
        if one.name in state
    }
    schedule = CyclicLR(**values)
    usual = "iterations" if schedule.mode == "exp_range" else "cycle"
    if state.get("_scale_fn_custom") is not None or schedule.scale_mode != usual:
        raise CheckpointError(
            f"{source}: a CyclicLR with a scale_fn of the program's own has no counterpart here."
        )
    return schedule
