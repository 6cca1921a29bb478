"""A training run in a file of any format.

In ``.safetensors`` and Orbax the optimizer's tensors lie beside the weights under
``optimizer.<tensor>.<parameter>``, in the same naming scheme and memory layout as the weights, and
everything else is JSON in the metadata. A ``.pth`` has the entries that torchvision's reference
scripts write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock import checkpoint
from flax_resblock._version import __version__
from flax_resblock.checkpoint import Record
from flax_resblock.convert.opened import JAX_FORMATS, OpenedCheckpoint
from flax_resblock.convert.own import OpenedTensors
from flax_resblock.convert.run_names import AVERAGED, OPTIMIZER, RUN, holds_run
from flax_resblock.convert.state_map import TensorMap
from flax_resblock.errors import InputError, damaged, raised
from flax_resblock.runs.averages import AverageEntry
from flax_resblock.runs.entries import EPOCHS_DONE, OURS, SCHEDULE_UNIT, RunEntry
from flax_resblock.runs.optimizer_state import read_optimizer, write_optimizer
from flax_resblock.runs.param_groups import WEIGHTS_ONLY
from flax_resblock.runs.run import Run, read_run
from flax_resblock.runs.scheduler_state import (
    LRLambda,
    ScheduleState,
    describe_schedule,
    read_schedule,
)
from flax_resblock.runs.scheduler_writing import write_schedule
from flax_resblock.runs.ticks import unit_of, word_of

Opened = OpenedCheckpoint | OpenedTensors


def run_of(
    opened: Opened,
    *,
    optimizer: str | None = None,
    schedule_unit: str | int | None = None,
    lr_lambda: LRLambda | None = None,
) -> Run:
    """The training run in a checkpoint that was opened with ``run=True``: optimizer, schedule and
    counters; the others as for :func:`flax_resblock.load_run`. Raises CheckpointError where it
    holds none, or one that cannot go on; the message says why."""
    record, state_map, source = opened.record, opened.state_map, opened.record.source
    words = "what lies beside its weights is not what a training program writes under these names"
    # a file may hold anything under them, and anything may be raised
    with damaged(f"{source}: {words}", WEIGHTS_ONLY, says=raised):
        if holds_run(record.metadata):
            return unpack_run(
                record.tensors, record.metadata, state_map, lr_lambda=lr_lambda, source=source
            )
        return read_run(
            record.extras,
            state_map,
            optimizer=optimizer,
            schedule_unit=schedule_unit,
            lr_lambda=lr_lambda,
            batches=_batches(record),
            source=source,
        )


def _batches(record: Record) -> int | None:
    """How many batches all BatchNorms have seen; None if they differ, or there are none."""
    name = "num_batches_tracked"
    counts = {int(value) for key, value in record.tensors.items() if key.endswith(name)}
    return counts.pop() if len(counts) == 1 else None


def pack_run(run: Run, state_map: TensorMap) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The run as arrays and metadata, in the names and memory layout of ``state_map``."""
    entries = {entry.flax_path: entry for entry in state_map.parameters}
    record = run.optimizer
    tensors = {
        f"{OPTIMIZER}{name}.{entries[path].torch_key}": entries[path].codec.to_torch(value)
        for name, found in record.tensors.items()
        for path, value in found.items()
        if entries[path].trained
    }
    averages = state_map.to_torch(state_map.whole(run.ema)) if run.ema else {}
    tensors |= {f"{AVERAGED}{key}": value for key, value in averages.items()}
    counter = next(iter(record.steps.values()), None)
    count = counter if counter is None else {"value": float(counter), "dtype": counter.dtype.name}
    groups = [
        {
            "options": group.options,
            "parameters": [entries[path].torch_key for path in group.paths],
            "named": group.named,
            "tensors": {n: [like.shape, like.dtype.name] for n, like in group.tensors.items()},
        }
        for group in record.groups
    ]
    content = {
        "optimizer": record.kind,
        "groups": groups,
        "by_name": record.by_name,
        "count": count,
        "schedule": _written_schedule(run),
        "problem": None if run.schedule else run.problem,
        "schedule_unit": None if run.schedule is None else word_of(run.schedule.unit),
        "steps": run.steps,
        "epochs": run.epochs,
        "settings": dict(run.settings),
        "average": asdict(run.average),
        "kept": dict(run.kept),
    }
    return tensors, {RUN: json.dumps(content, default=_as_number)}


def _as_number(value: Any) -> Any:
    """Numbers that are arrays, as the rates of ``capturable`` optimizers are, as numbers."""
    scalar = isinstance(value, np.ndarray | np.generic) and value.ndim == 0
    return value.item() if scalar else repr(value)


def _written_schedule(run: Run) -> dict[str, Any] | None:
    options = [group.options for group in run.optimizer.groups]
    return None if run.schedule is None else write_schedule(run.schedule, options)


def with_tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with tuples for the lists that JSON made of them."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}


def _with_prefix(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def unpack_run(
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    state_map: TensorMap,
    *,
    lr_lambda: LRLambda | None = None,
    source: str = "the checkpoint",
) -> Run:
    """Restores the run from the arrays and metadata that :func:`pack_run` made; raises
    CheckpointError if they are damaged or do not fit the model."""
    words = f"{source}: its record of the training run is damaged"
    with damaged(words, WEIGHTS_ONLY, says=raised):
        content = json.loads(metadata[RUN])
        kind, counter = content["optimizer"], content["count"]
        numbers: dict[str, int] = {}
        groups, state = [], {}
        for group in content["groups"]:
            for key in group["parameters"]:
                numbers[key] = len(numbers)
            names = list(group["parameters"])
            members = {"params": [numbers[key] for key in names], "param_names": names}
            options = with_tuples(group["options"]) | members
            for option, (shape, dtype) in group["tensors"].items():
                options[option] = np.full(shape, options[option], dtype)
            groups.append(options)
        for name, value in _with_prefix(tensors, OPTIMIZER).items():
            tensor, _, key = name.partition(".")
            state.setdefault(numbers[key], {})[tensor] = value
        if counter is not None:
            for found in state.values():
                found["step"] = np.asarray(counter["value"], counter["dtype"])
        schedule = content["schedule"]
        if schedule is not None:
            options = [with_tuples(group["options"]) for group in content["groups"]]
            read = read_schedule(schedule, options, lr_lambda=lr_lambda, source=source)
            schedule = ScheduleState(*read, unit_of(content["schedule_unit"]))
        steps, epochs, settings = content["steps"], content["epochs"], content["settings"]
        named = [bool(group["named"]) for group in content["groups"]]
        by_name, problem = bool(content.get("by_name")), content.get("problem")
        average, kept = AverageEntry(**content["average"]), dict(content["kept"])
    written, where = {"state": state, "param_groups": groups}, f"{source}, its optimizer"
    record = read_optimizer(written, state_map, kind=kind, source=where)
    pairs = zip(record.groups, named, strict=True)
    groups = tuple(replace(group, named=name) for group, name in pairs)
    record = replace(record, groups=groups, by_name=by_name)
    found = [RunEntry("optimizer", record.notes[0], "used")]
    averages = state_map.to_flax(_with_prefix(tensors, AVERAGED))
    if averages:
        found.append(RunEntry("ema", "averaged weights and statistics", "used"))
    if schedule is not None:
        found.append(RunEntry("schedule", describe_schedule(schedule), "used"))
    counters = {"steps": steps, "epochs": epochs}
    found += [RunEntry(key, str(n), "used") for key, n in counters.items() if n is not None]
    found += [RunEntry(key, "for the way back", "kept") for key in kept]
    return Run(
        record,
        schedule,
        steps,
        epochs,
        settings,
        tuple(found),
        problem,
        ema=averages,
        average=average,
        kept=kept,
    )


def run_entries(run: Run, state_map: TensorMap) -> dict[str, Any]:
    """The entries of a PyTorch training checkpoint beside ``"model"``, as torchvision's reference
    scripts name them, with numpy arrays for tensors. ``"epoch"`` is the number, from 0, of the last
    epoch that was completed, as there; ``"epochs_done"`` and ``"step"`` count those done."""
    entries: dict[str, Any] = {"optimizer": write_optimizer(run.optimizer, state_map)}
    if run.schedule is not None or not run.problem:  # else reading misses it again
        entries["lr_scheduler"] = _written_schedule(run)
    if run.epochs is not None:
        entries["epoch"] = run.epochs - 1
        entries[EPOCHS_DONE] = run.epochs
    if run.schedule is not None:
        entries[SCHEDULE_UNIT] = word_of(run.schedule.unit)
    if run.steps is not None:
        entries["step"] = run.steps
    if run.settings:
        entries["args"] = {OURS: f"flax-resblock {__version__}", **run.settings}
    if run.ema:
        averages = state_map.to_torch(state_map.whole(run.ema))
        entries[run.average.name] = run.average.written(averages)
    return {**run.kept, **entries}


def write_with_run(
    path: Path,
    tensors: dict[str, np.ndarray],
    metadata: Mapping[str, str],
    run: Run | None,
    state_map: TensorMap,
    *,
    files: Mapping[str, str] | None = None,
    force: bool = False,
    release: bool = False,
) -> None:
    """Writes weights and run to a checkpoint of any format, in the names and layouts of
    ``state_map``. Without a run, the weights are written alone; ``release`` empties ``tensors``
    once they are written. The rest, and the errors, are as for
    :func:`flax_resblock.checkpoint.write`."""
    extras = None
    if run is not None and checkpoint.output_format(path) == "pytorch":
        extras = run_entries(run, state_map)
    elif run is not None and checkpoint.output_format(path) in JAX_FORMATS:
        raise InputError(
            f"{path} would hold the variables of a JAX program, which have no place for a training "
            f"run. Write a .pth, a .safetensors or an Orbax folder, or leave the run behind."
        )
    elif run is not None:
        more, about = pack_run(run, state_map)
        tensors |= more
        metadata = {**metadata, **about}
    checkpoint.write(
        path, tensors, metadata=metadata, extras=extras, files=files, force=force, release=release
    )
