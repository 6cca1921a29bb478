"""The schedule of timm's training script, which stores no scheduler.

It stores its arguments, of which it makes the same schedule again when it resumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax_resblock.errors import CheckpointError
from flax_resblock.runs.schedules import Options
from flax_resblock.runs.ticks import Counters
from flax_resblock.runs.timm_schedules import KINDS, TimmSchedule, fitting, refuse_noise


def of_script(
    arguments: Mapping[str, Any],
    counters: Counters,
    done: int,
    groups: Sequence[Options],
    source: str,
) -> tuple[TimmSchedule, int, int]:
    """The schedule of timm's training script, by its stored ``arguments`` and the epochs ``done``;
    its position; and the epochs of the whole run. Raises CheckpointError for one without
    counterpart, counters that do not give the position, or rates that are not on the schedule."""

    def said(name: str, otherwise: Any) -> Any:
        return otherwise if arguments.get(name) is None else arguments[name]

    name, where = str(arguments["sched"]), f"{source}: timm's schedule '{arguments['sched']}'"
    if name not in (*KINDS, "constant"):
        why = {"plateau": "follows a metric, and timm does not store what it has counted"}
        raise CheckpointError(f"{where} {why.get(name, 'has no counterpart here')}.")
    refuse_noise(arguments.get("lr_noise"), where)
    in_epochs, scale = not said("sched_on_updates", False), 1
    if not in_epochs:
        alone = said("grad_accum_steps", 1) == 1 and counters.batches
        updates = counters.batches if alone else counters.updates
        scale, rest = divmod(updates or 0, done)
        if rest or not scale:
            raise CheckpointError(
                f"{where} counts updates, and the file does not say how many an epoch has: it has "
                f"{counters}."
            )
    kind, rate = ("step", 1.0) if name == "constant" else (name, float(said("decay_rate", 0.1)))
    each = 1 if name == "constant" else said("decay_epochs", 90) * scale
    milestones = tuple(epoch * scale for epoch in said("decay_milestones", (90, 180, 270)))
    values = {
        "t_in_epochs": in_epochs,
        "warmup_t": said("warmup_epochs", 0) * scale,
        "warmup_lr_init": float(said("warmup_lr", 1e-5)),
        "warmup_prefix": bool(said("warmup_prefix", False)),
        "t_initial": int(said("epochs", 300)) * scale,
        "lr_min": float(said("min_lr", 0.0)),
        "cycle_mul": float(said("lr_cycle_mul", 1.0)),
        "cycle_decay": float(said("lr_cycle_decay", 0.1)),
        "cycle_limit": int(said("lr_cycle_limit", 1)),
        "k_decay": float(said("lr_k_decay", 1.0)),
        "power": rate,
        "lb": -7.0,
        "ub": 3.0,
        "decay_t": milestones if kind == "multistep" else each,
        "decay_rate": rate,
    }
    schedule = TimmSchedule(kind, **{entry: values[entry] for entry in KINDS[kind]})
    position = done * scale
    # the script stores the rates of the last epoch, before it sets those of the next
    if not fitting(schedule, groups, [position, position - 1] if in_epochs else [position]):
        given = [f"{schedule.rate(position, group, n):.9g}" for n, group in enumerate(groups)]
        has = [f"{float(group['lr']):.9g}" for group in groups]
        raise CheckpointError(
            f"{where}, as the script's arguments have it, gives the learning rates "
            f"{', '.join(given)} after {done} epochs, but the optimizer has {', '.join(has)}."
        )
    total = int(said("epochs", 300))
    if kind in ("step", "multistep"):
        total += int(said("warmup_epochs", 0)) if schedule.warmup_prefix else 0
    else:
        total = schedule.cycles // scale + int(said("cooldown_epochs", 0))
    return schedule, position, total
