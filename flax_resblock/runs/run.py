"""A training run in a PyTorch checkpoint, in any of the common spellings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flax_resblock.config import Path
from flax_resblock.convert.state_map import TensorMap
from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs import entries, timm_schedules
from flax_resblock.runs.averages import AverageEntry, read_average
from flax_resblock.runs.entries import EPOCHS_DONE, SCHEDULE_UNIT, RunEntry
from flax_resblock.runs.mmengine_schedules import PARTS, MMEngineSchedule
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.optimizer_state import (
    OptimizerState,
    find_optimizer,
    only_item,
    read_optimizer,
)
from flax_resblock.runs.param_groups import WEIGHTS_ONLY
from flax_resblock.runs.plateau import ReduceLROnPlateau
from flax_resblock.runs.scheduler_state import (
    LRLambda,
    ScheduleState,
    describe_schedule,
    read_schedule,
    with_initial_rates,
)
from flax_resblock.runs.scheduler_writing import scheduled
from flax_resblock.runs.ticks import EPOCH, Counters, Unit, read_unit, unit_of
from flax_resblock.runs.timm_schedules import TimmSchedule
from flax_resblock.runs.timm_script import of_script


@dataclass(frozen=True)
class Run:
    """A training run that can go on.

    Attributes:
      optimizer: Its optimizer.
      schedule: Its learning rate by step; None if there was none, or none that can be carried over
        (``problem``).
      steps: Optimizer steps done; None if unknown.
      epochs: Epochs done; None if unknown.
      settings: The training script's settings that a run needs: ``epochs``, ``batch_size``,
        ``label_smoothing``.
      found: Every entry of the file beside the weights, and what became of it: used, kept or
        ignored, and why.
      problem: Why the schedule of the file cannot be carried over.
      ema: Averaged parameters and statistics by Flax path, in Flax's memory layout; empty if none
        are kept.
      average: How the file has them.
      kept: Entries that JAX does not need and that go back as they are, such as a GradScaler's.
    """

    optimizer: OptimizerState
    schedule: ScheduleState | None = None
    steps: int | None = None
    epochs: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    found: tuple[RunEntry, ...] = ()
    problem: str | None = None
    ema: Mapping[Path, np.ndarray] = field(default_factory=dict)
    average: AverageEntry = field(default_factory=AverageEntry)
    kept: Mapping[str, Any] = field(default_factory=dict)

    @property
    def assumed(self) -> list[str]:
        """What the file does not show and was assumed, with what changes it."""
        return [note for note in self.optimizer.notes if note.startswith("assumed")]


def read_run(
    extras: Mapping[str, Any],
    state_map: TensorMap,
    *,
    optimizer: str | None = None,
    schedule_unit: str | int | None = None,
    lr_lambda: LRLambda | None = None,
    batches: int | None = None,
    source: str = "the checkpoint",
) -> Run:
    """Reads the run in the entries of a PyTorch training checkpoint, written by torchvision's
    reference scripts, timm, Lightning, Hugging Face's Trainer, Accelerate or a plain loop.

    Args:
      extras: The entries beside the weights, with numpy arrays for tensors.
      optimizer, schedule_unit, lr_lambda: See :func:`flax_resblock.load_run`.
      batches: Batches that the model's BatchNorms have seen, if they agree.
    Raises:
      CheckpointError: No optimizer, one without counterpart, or one of another model.
    """
    extras = entries.with_counters(extras)
    entry = find_optimizer(extras)
    if entry is None:
        held = some(list(map(str, extras))) or "nothing"
        raise CheckpointError(
            f"{source} holds no optimizer that could go on; beside the weights it has: {held}. "
            f"{entries.elsewhere(extras)}{WEIGHTS_ONLY}"
        )
    name, state = entry
    others = [one for one in entries.optimizers_in(extras) if one.partition("[")[0] != name]
    beside = f" (there are others: {some(others)})" if others else ""
    where = f"{source}, entry '{name}'{beside}"
    record = read_optimizer(state, state_map, kind=optimizer, source=where)
    found = {name: RunEntry(name, record.notes[0], "used")}
    updates = next((int(float(step)) for step in record.steps.values()), None)
    counters = Counters(
        updates,
        entries.count(extras, entries.STEPS, found),
        batches or None,
        entries.count(extras, entries.EPOCHS, found),
    )
    settings = entries.settings_in(extras, found)
    run = Run(record, None, counters.done, counters.epochs, settings)
    schedulers = entries.schedulers_in(extras)
    entry = (schedulers[0], only_item(extras[schedulers[0]])) if schedulers else None
    unit = None if schedule_unit is None else unit_of(schedule_unit)
    if unit is None and entries.SCHEDULE_UNIT in extras:
        unit = unit_of(extras[entries.SCHEDULE_UNIT])
        found[SCHEDULE_UNIT] = RunEntry(SCHEDULE_UNIT, str(unit), "used")
    if entry is not None and entry[0] == PARTS:
        entry = PARTS, {PARTS: extras[PARTS]}
    if len(schedulers) > 1:
        words = f"{source} has several learning-rate schedulers ({', '.join(schedulers)})"
        run = replace(run, problem=f"{words}, and does not say how they share the rate.")
        found |= {name: RunEntry(name, "one of several", "ignored") for name in schedulers}
    elif entry is not None:
        total = entries.whole_number(extras, "trainer_state", "max_steps")
        known = total, entries.logged_rates(extras)
        run = _with_schedule(run, *entry, unit, counters, lr_lambda, known, source, found)
    else:
        run = _without_scheduler(run, extras, counters, source, found)
    kind = OPTIMIZERS[record.kind]
    buffered = any(kind.buffered(group.options) for group in record.groups)
    if run.steps and buffered and not any(record.tensors.values()):
        raise CheckpointError(
            f"{source} took {run.steps} steps, but its entry '{name}' keeps none of the "
            f"buffers ({some(list(kind.tensors))}) that {record.kind} "
            f"has by then. Without them it would not be the same run. {WEIGHTS_ONLY}"
        )
    done = entries.count(extras, (EPOCHS_DONE,), found)
    if done is not None:
        run = replace(run, epochs=done)
    run = _with_average(run, extras, state_map, source, found)
    run = replace(run, kept=entries.scalers_in(extras, found))
    rest = [str(key) for key in extras if key not in found]
    ignored = [RunEntry(key, entries.reason(key), "ignored") for key in rest]
    return replace(run, found=(*found.values(), *ignored))


def _without_scheduler(
    run: Run, extras: Mapping[str, Any], counters: Counters, source: str, found: dict[str, RunEntry]
) -> Run:
    """The run of a file without a scheduler; timm's script stores what it makes its own of."""
    arguments = entries.named(extras.get("args"))
    groups = [group.options for group in run.optimizer.groups]
    if counters.epochs is not None and {"arch", "version"} <= extras.keys():
        done = counters.epochs + 1  # it stores the last epoch that was done
        run = replace(run, epochs=done)
        if arguments.get("sched", "none") != "none":
            try:
                read = of_script(arguments, counters, done, groups, source)
            except CheckpointError as error:
                return replace(run, problem=str(error))
            schedule, position, total = read
            state = ScheduleState(schedule, position, schedule.unit)
            options = [scheduled(one, schedule, position, n) for n, one in enumerate(groups)]
            pairs = zip(run.optimizer.groups, options, strict=True)
            made = tuple(replace(group, options=one) for group, one in pairs)
            words = f"{found['args'].use}; " if "args" in found else ""
            found["args"] = RunEntry("args", f"{words}{describe_schedule(state)}", "used")
            settings = {**run.settings, "epochs": total}
            optimizer = replace(run.optimizer, groups=made)
            return replace(run, optimizer=optimizer, schedule=state, settings=settings)
    words = ""
    moved = any("initial_lr" in group for group in groups)
    if moved and not any(name in extras for name in entries.SCHEDULERS):
        words = "its param groups have 'initial_lr', which only a scheduler sets."
    elif any(isinstance(group["lr"], np.floating) for group in groups):
        words = (
            "its rate is a number of numpy's, as a program computes it at each step (fastai's "
            "fit_one_cycle does)."
        )
    if words:
        there = f"{source} holds no learning-rate scheduler, but the run had one"
        return replace(run, problem=f"{there}: {words}")
    return run


def _with_average(
    run: Run,
    extras: Mapping[str, Any],
    state_map: TensorMap,
    source: str,
    found: dict[str, RunEntry],
) -> Run:
    """The run with the first averaged weights that are this model's."""
    decay = run.settings.get("ema")
    for name in entries.AVERAGES:
        if name not in extras:
            continue
        try:
            values, form = read_average(extras[name], state_map, name, source)
        except CheckpointError:
            if decay:  # this library wrote them
                raise
            continue
        words = f"averaged weights, decay {decay}"
        if not decay:
            words = (
                f"averaged weights, for the way back; {entries.how_averaged(extras)}: `ema=DECAY` "
                "goes on with them, without it they end with the first step"
            )
        found[name] = RunEntry(name, words, "used" if decay else "kept")
        return replace(run, ema=values, average=form)
    return run


def _with_schedule(
    run: Run,
    name: str,
    state: Any,
    unit: Unit | None,
    counters: Counters,
    lr_lambda: LRLambda | None,
    known: tuple[int | None, Sequence[tuple[int, float]]],
    source: str,
    found: dict[str, RunEntry],
) -> Run:
    """The run with the scheduler's state, or with the reason why it has no counterpart."""
    where, (total, logged) = f"{source}, entry '{name}'", known
    try:
        if not isinstance(state, Mapping):
            raise CheckpointError(f"{where} is not the state of one learning-rate scheduler.")
        optimizer = with_initial_rates(run.optimizer, state)
        options = [group.options for group in optimizer.groups]
        timm_schedules.refuse_plateau(state, where)
        if timm_schedules.is_timm(state):
            state = timm_schedules.located(state, counters, options, where)
        schedule, position = read_schedule(
            state, options, lr_lambda=lr_lambda, total=total, logged=logged, source=where
        )
        if isinstance(schedule, TimmSchedule | MMEngineSchedule):
            unit = schedule.unit
        unit = unit or read_unit(position, counters, where)
        if isinstance(schedule, ReduceLROnPlateau) and unit != EPOCH:
            raise CheckpointError(
                f"{where} is a ReduceLROnPlateau that was stepped {position} times, {unit}. Here "
                "it is stepped once per epoch, by what is measured on the test images."
            )
    except CheckpointError as error:
        found[name] = RunEntry(name, "not carried, see below", "ignored")
        return replace(run, problem=str(error))
    read = ScheduleState(schedule, position, unit)
    found[name] = RunEntry(name, f"{describe_schedule(read)} ({counters})", "used")
    run = replace(run, optimizer=optimizer, schedule=read)
    if not unit.per_epoch:
        return replace(run, steps=counters.steps_at(position, unit))
    epochs = counters.epochs
    other = epochs is not None and position not in (epochs, epochs + 1)
    return run if other else replace(run, epochs=position)
