"""A training run in a PyTorch checkpoint, in any of the common spellings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flax_resblock.config import Path
from flax_resblock.convert.run_names import EMA
from flax_resblock.convert.state_map import TensorMap, describe
from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.optimizer_state import (
    OptimizerState,
    find_optimizer,
    only_item,
    read_optimizer,
)
from flax_resblock.runs.param_groups import WEIGHTS_ONLY
from flax_resblock.runs.scheduler_state import ScheduleState, describe_schedule, read_schedule


@dataclass(frozen=True)
class RunEntry:
    """An entry of a training checkpoint.

    Attributes:
      name: Its name in the file.
      use: What was made of it, or why it was left out.
      used: Whether the run needs it.
    """

    name: str
    use: str
    used: bool


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
      found: Every entry of the file beside the weights, and what became of it.
      problem: Why the schedule of the file cannot be carried over.
      ema: Averaged parameters and statistics by Flax path, in Flax's memory layout; empty if none
        are kept.
    """

    optimizer: OptimizerState
    schedule: ScheduleState | None = None
    steps: int | None = None
    epochs: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    found: tuple[RunEntry, ...] = ()
    problem: str | None = None
    ema: Mapping[Path, np.ndarray] = field(default_factory=dict)


OURS = "written_by"
"""Key of ``"args"`` that marks them as settings which this library wrote, to be read back whole."""
EPOCHS_DONE = "epochs_done"
"""Entry that counts epochs done; ``"epoch"`` may mean the last one or the next."""
_SCHEDULERS = (
    *("lr_scheduler", "scheduler", "lr_schedulers", "scheduler_state_dict"),
    *("lr_scheduler_state_dict", "sched", "lr_sched"),
)
_STEPS = ("global_step", "step", "steps", "iteration", "iter", "num_updates", "num_steps")
_EPOCHS = ("epoch", "current_epoch", "start_epoch")
_SETTINGS = ("args", "hyper_parameters", "hparams", "config", "cfg", "trainer_state")
_NAMES = {
    "epochs": ("epochs", "max_epochs", "num_epochs", "num_train_epochs"),
    "batch_size": ("batch_size", "train_batch_size"),
    "label_smoothing": ("label_smoothing", "smoothing"),
}
"""Settings by their usual names."""
_REASONS = {
    name: reason.format(name=name)
    for reason, names in {
        "loss scaling is for float16; float32 and bfloat16 need none": (
            "scaler grad_scaler amp_scaler amp native_amp_scaling_state MixedPrecision"
        ),
        "averaged weights; --entry {name} takes them instead of the trained ones": (
            "model_ema ema state_dict_ema ema_state_dict ema_model"
        ),
        "PyTorch's random state; JAX has its own": (
            "rng rng_state rng_states random_state torch_rng torch_rng_state cuda_rng_state"
        ),
        "of PyTorch's trainer": (
            "loops callbacks pytorch-lightning_version hparams_name datamodule_hparams_name "
            "training_args.bin"
        ),
    }.items()
    for name in names.split()
}
"""Why known entries are not needed."""


def read_run(
    extras: Mapping[str, Any],
    state_map: TensorMap,
    *,
    optimizer: str | None = None,
    per_epoch: bool | None = None,
    source: str = "the checkpoint",
) -> Run:
    """Reads the run in the entries of a PyTorch training checkpoint, written by torchvision's
    reference scripts, timm, Lightning, Hugging Face's Trainer or a plain loop.

    Args:
      extras: The entries beside the weights, with numpy arrays for tensors.
      state_map: Of the model.
      optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``, if the options do not tell.
      per_epoch: Whether the scheduler was stepped once per epoch (or once per batch); None finds it
        from the counters.
      source: For messages.
    Raises:
      CheckpointError: No optimizer, one without counterpart, or one of another model.
    """
    entry = find_optimizer(extras)
    if entry is None:
        held = some(list(map(str, extras))) or "nothing"
        raise CheckpointError(
            f"{source} holds no optimizer that could go on; beside the weights it has: {held}. "
            f"{WEIGHTS_ONLY}"
        )
    name, state = entry
    record = read_optimizer(state, state_map, kind=optimizer, source=f"{source}, entry '{name}'")
    found = {name: RunEntry(name, record.notes[0], True)}
    steps, epoch = _count(extras, _STEPS, found), _count(extras, _EPOCHS, found)
    explicit = steps is not None
    if not explicit and record.steps:
        steps = int(float(next(iter(record.steps.values()))))
    settings = _settings(extras, found)
    run = Run(record, None, steps, epoch, settings)
    entry = next(((key, only_item(extras[key])) for key in _SCHEDULERS if extras.get(key)), None)
    if entry is not None:
        run = _with_schedule(run, *entry, per_epoch, explicit, source, found)
    elif epoch is not None and {"arch", "version"} <= extras.keys():
        run = replace(run, epochs=epoch + 1)  # timm stores the last epoch that was done
    kind = OPTIMIZERS[record.kind]
    buffered = any(kind.buffered(group.options) for group in record.groups)
    if run.steps and buffered and not any(record.tensors.values()):
        raise CheckpointError(
            f"{source} took {run.steps} steps, but its entry '{name}' keeps none of the "
            f"buffers ({some(list(kind.tensors))}) that {record.kind} "
            f"has by then. Without them it would not be the same run. {WEIGHTS_ONLY}"
        )
    done = _count(extras, (EPOCHS_DONE,), found)
    if done is not None:
        run = replace(run, epochs=done)
    if EMA in extras and settings.get("ema"):
        run = replace(run, ema=_averaged(extras[EMA], state_map, f"{source}, entry '{EMA}'"))
        found[EMA] = RunEntry(EMA, f"averaged weights, decay {settings['ema']}", True)
    names = [str(key) for key in extras if key not in found]
    rest = [RunEntry(key, _REASONS.get(key, "not needed to go on"), False) for key in names]
    return replace(run, found=(*found.values(), *rest))


def _averaged(state: Any, state_map: TensorMap, source: str) -> dict[Path, np.ndarray]:
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{source} holds no averaged weights, but a {type(state).__name__}. {WEIGHTS_ONLY}"
        )
    misfit = state_map.check(describe(state))
    if len(misfit):
        raise CheckpointError(
            f"{source} is not the state of this model: "
            f"{'; '.join(line.strip() for line in misfit.lines())}. {WEIGHTS_ONLY}"
        )
    return state_map.to_flax(state)


def _with_schedule(
    run: Run,
    name: str,
    state: Any,
    per_epoch: bool | None,
    explicit: bool,
    source: str,
    found: dict[str, RunEntry],
) -> Run:
    """The run with the scheduler's state, or with the reason why it has no counterpart."""
    options = [group.options for group in run.optimizer.groups]
    try:
        if not isinstance(state, Mapping):
            raise CheckpointError(
                f"{source}, entry '{name}' is not the state of one learning-rate scheduler."
            )
        schedule, position = read_schedule(state, options, source=f"{source}, entry '{name}'")
        if per_epoch is None:
            per_epoch = _stepped_per_epoch(run, position, explicit, f"{source}, entry '{name}'")
    except CheckpointError as error:
        found[name] = RunEntry(name, "not carried, see below", False)
        return replace(run, problem=str(error))
    state = ScheduleState(schedule, position, per_epoch)
    found[name] = RunEntry(name, describe_schedule(state), True)
    if per_epoch:
        return replace(run, schedule=state, epochs=position)
    return replace(run, schedule=state, steps=run.steps if explicit else position)


def _stepped_per_epoch(run: Run, position: int, explicit: bool, source: str) -> bool:
    """Whether the scheduler counted epochs; batches otherwise."""
    if explicit and position == run.steps:
        return False
    if run.epochs is not None and position in (run.epochs, run.epochs + 1):
        return True
    if not explicit and run.steps is not None:
        # As many or more are batches: Adam's count lags by the steps that loss scaling skipped.
        return position < run.steps
    if not explicit and run.epochs is not None:
        return False
    counts = f"{run.steps if explicit else 'an unknown number of'} optimizer steps" + (
        "" if run.epochs is None else f" in epoch {run.epochs}"
    )
    raise CheckpointError(
        f"{source} was stepped {position} times in a run of {counts}, which does not show whether "
        "it counts batches or epochs. Say --schedule-unit batch or epoch (per_epoch=... in Python)."
    )


def _number(value: Any) -> int | None:
    if isinstance(value, np.ndarray | np.generic) and value.ndim == 0:
        value = value.item()
    counts = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return int(value) if counts else None


def _count(
    extras: Mapping[str, Any], names: Sequence[str], found: dict[str, RunEntry]
) -> int | None:
    for name in names:
        count = _number(extras.get(name))
        if count is not None:
            found[name] = RunEntry(name, str(count), True)
            return count
    return None


def _settings(extras: Mapping[str, Any], found: dict[str, RunEntry]) -> dict[str, Any]:
    """Batch size, epochs and label smoothing, from whatever holds the script's settings."""
    for name in _SETTINGS:
        values = extras.get(name)
        values = values if isinstance(values, Mapping) else getattr(values, "__dict__", {})
        if str(values.get(OURS, "")).startswith("flax-resblock"):
            found[name] = RunEntry(name, "all settings of the run", True)
            return {key: value for key, value in values.items() if key != OURS}
        chosen = {}
        for ours, theirs in _NAMES.items():
            numbers = (values[key] for key in theirs if isinstance(values.get(key), int | float))
            value = next(numbers, None)
            if value is not None and not isinstance(value, bool) and value >= 0:
                chosen[ours] = value if ours == "label_smoothing" else int(value)
        if chosen:
            words = ", ".join(f"{key} {value}" for key, value in chosen.items())
            found[name] = RunEntry(name, words, True)
            return chosen
    return {}
