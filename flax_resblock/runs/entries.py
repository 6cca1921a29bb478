"""The entries of a PyTorch training checkpoint: their usual names, and what becomes of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flax_resblock.checkpoint.trainer_arguments import TRAINER_ARGUMENTS
from flax_resblock.checkpoint.zero_writing import LAYOUT
from flax_resblock.runs.mmengine_schedules import gradient_settings


@dataclass(frozen=True)
class RunEntry:
    """An entry of a training checkpoint: its name, what was made of it or why it was left out, and
    whether the run needs it (``"used"``), JAX does not, but it goes back to PyTorch as it was
    (``"kept"``), or it ends here (``"ignored"``)."""

    name: str
    use: str
    status: Literal["used", "kept", "ignored"]


OURS = "written_by"
"""Key of ``"args"`` that marks them as settings which this library wrote, to be read back whole."""
EPOCHS_DONE = "epochs_done"
"""Entry that counts epochs done; ``"epoch"`` may mean the last one or the next."""
SCHEDULE_UNIT = "schedule_unit"
"""Entry that says what the scheduler counts, where this library wrote the file."""
SCHEDULERS = (
    *("lr_scheduler", "scheduler", "lr_schedulers", "scheduler_state_dict"),
    *("lr_scheduler_state_dict", "sched", "lr_sched", "param_schedulers"),
)
STEPS = (
    *("global_step", "global_steps", "step", "steps", "iteration", "iter"),
    *("num_updates", "num_steps", "updates"),
)
EPOCHS = ("epoch", "current_epoch", "start_epoch")
AVERAGES = ("model_ema", "ema", "state_dict_ema", "ema_state_dict", "ema_model")
SCALERS = (
    *("scaler", "grad_scaler", "amp_scaler", "amp", "native_amp_scaling_state", "MixedPrecision"),
    "loss_scaler",
)
_SETTINGS = (
    *("args", "hyper_parameters", "hparams", "config", "cfg", "meta"),
    *("trainer_state", TRAINER_ARGUMENTS, "ds_config"),
)
_NAMES = {
    "epochs": ("epochs", "max_epochs", "num_epochs", "num_train_epochs"),
    "batch_size": ("batch_size", "train_batch_size"),
    "label_smoothing": ("label_smoothing", "smoothing", "label_smoothing_factor"),
    "clip_norm": ("clip_grad_norm", "gradient_clipping", "clip_grad", "max_grad_norm"),
}
"""Settings by their usual names."""
_RANDOM = "PyTorch's random state; JAX has its own"
_REASONS = {
    name: reason.format(name=name)
    for reason, names in {
        "loss scaling is for float16; float32 and bfloat16 need none": " ".join(SCALERS),
        "averaged weights; `entry={name}` takes them instead of the trained ones": (
            " ".join(AVERAGES)
        ),
        _RANDOM: "rng rng_state rng_states random_state torch_rng torch_rng_state cuda_rng_state",
        "of MMEngine: its log, configuration and random state": "meta message_hub",
        "of PyTorch's trainer": (
            "loops callbacks pytorch-lightning_version hparams_name datamodule_hparams_name"
        ),
        "no numbers were found in it; gradients are clipped as it says, to max_grad_norm=1.0 "
        "unless it was changed: `clip_norm=1.0`": TRAINER_ARGUMENTS,
        "of DeepSpeed: parallelism and counts, which are not needed to go on": (
            "buffer_names param_shapes frozen_param_shapes shared_params frozen_param_fragments "
            "data_sampler random_ltd skipped_steps global_samples dp_world_size mp_world_size "
            "checkpoint_parallel_dimensions ds_config ds_version sparse_tensor_module_names"
        ),
    }.items()
    for name in names.split()
}
"""Why known entries are not needed."""
_BEGINNINGS = {
    "rng_state": _RANDOM,
    "random_states": _RANDOM,
    "sampler": "the order of the images in PyTorch; JAX has its own",
    "dl_state_dict": "the order of the images in PyTorch; JAX has its own",
    "custom_checkpoint": "an object of the program's own, which is not opened",
    "optimizer_1": "of a second optimizer",
    "scheduler_1": "of a second scheduler",
}
"""The same by how the names of files begin."""


def reason(name: str) -> str:
    """Why an entry that nothing has used is not needed."""
    begins = (why for start, why in _BEGINNINGS.items() if name.startswith(start))
    return _REASONS.get(name) or next(begins, "not needed to go on")


def _number(value: Any) -> int | None:
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    counts = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
    return int(value) if counts else None


def count(
    extras: Mapping[str, Any], names: Sequence[str], found: dict[str, RunEntry]
) -> int | None:
    """The first counter of these names; others are listed as ignored."""
    counts = {name: n for name in names if (n := _number(extras.get(name))) is not None}
    taken = next(iter(counts), None)
    for name, value in counts.items():
        if name == taken:
            found[name] = RunEntry(name, str(value), "used")
        else:
            found[name] = RunEntry(name, f"{value}; '{taken}' was taken", "ignored")
    return None if taken is None else counts[taken]


def whole_number(extras: Mapping[str, Any], entry: str, name: str) -> int | None:
    """A number in an entry that is a mapping."""
    values = extras.get(entry)
    return _number(values.get(name)) if isinstance(values, Mapping) else None


def with_counters(extras: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entries with the counters that MMEngine keeps in another one."""
    about = named(extras.get("meta"))
    counts = {name: about[name] for name in ("epoch", "iter") if name in about}
    return {**counts, **extras} if "mmengine_version" in about else extras


def schedulers_in(extras: Mapping[str, Any]) -> list[str]:
    """The names of the learning-rate schedulers' states: the usual ones, and others by form."""
    usual = [name for name in SCHEDULERS if extras.get(name)]
    others = (str(name) for name, value in extras.items() if _is_scheduler(named(value)))
    return list(dict.fromkeys((*usual, *others)))


def _is_scheduler(state: Mapping[str, Any]) -> bool:
    own = {"base_lrs", "_schedulers", "base_values"}
    return bool(own & state.keys()) or {"last_epoch", "_last_lr"} <= state.keys()


def optimizers_in(extras: Mapping[str, Any]) -> list[str]:
    """The names of the optimizers' states, also of those in lists and mappings of several."""
    found = []
    for name, value in extras.items():
        items = dict(enumerate(value)) if isinstance(value, list | tuple) else named(value)
        inside = [f"{name}[{key!r}]" for key, one in items.items() if "param_groups" in named(one)]
        found += [str(name)] if "param_groups" in items else inside
    return found


def elsewhere(extras: Mapping[str, Any]) -> str:
    """A sentence on an optimizer that a known program keeps in another way; may be empty."""
    if len(several := optimizers_in(extras)) > 1:
        return f"It has {len(several)} optimizers ({', '.join(several)}), and a run here has one. "
    if {"param_shapes", "ds_version"} <= extras.keys():
        return (
            "DeepSpeed's ZeRO keeps the optimizer in shards, *_optim_states.pt: give the file "
            "with the shards of all processes beside it. Those of stage 3 are put together by "
            "DeepSpeed alone, without the optimizer: run `python zero_to_fp32.py . merged` in the "
            "folder above this one, and give merged/pytorch_model.bin. "
        )
    if any(
        str(key).startswith("param_groups.") for value in extras.values() for key in named(value)
    ):
        return (
            "It is flattened (flatten_optimizer_state_dict=True of torch.distributed.checkpoint), "
            "which takes its param groups apart. Save it without that option. "
        )
    return ""


def logged_rates(extras: Mapping[str, Any]) -> list[tuple[int, float]]:
    """Steps and learning rates that a Trainer has logged."""
    log = named(extras.get("trainer_state")).get("log_history")
    lines = [named(line) for line in log] if isinstance(log, list) else []
    pairs = ((line.get("step"), line.get("learning_rate")) for line in lines)
    return [(n, float(r)) for n, r in pairs if type(n) is int and isinstance(r, int | float)]


def named(values: Any) -> Mapping[str, Any]:
    """The values of a mapping or a namespace; none of anything else."""
    return values if isinstance(values, Mapping) else getattr(values, "__dict__", {})


def settings_in(extras: Mapping[str, Any], found: dict[str, RunEntry]) -> dict[str, Any]:
    """Batch size, epochs, label smoothing and the clipping of gradients, from whatever holds the
    script's settings; the first that says so counts."""
    settings: dict[str, Any] = {}
    for name in _SETTINGS:
        values = named(extras.get(name))
        if name == "meta":
            values = gradient_settings(values.get("cfg"))
        if name == "ds_config" and "ds_version" in extras:
            values = {"gradient_clipping": _clipping(str(extras["ds_version"])), **values}
        if str(values.get(OURS, "")).startswith("flax-resblock"):
            found[name] = RunEntry(name, "all settings of the run", "used")
            return {key: value for key, value in values.items() if key != OURS}
        chosen = {}
        for ours, theirs in _NAMES.items():
            numbers = (values[key] for key in theirs if isinstance(values.get(key), int | float))
            value = next(numbers, None)
            whole = ours in ("epochs", "batch_size")
            if value is not None and not isinstance(value, bool) and value >= 0:
                chosen[ours] = int(value) if whole else value
        if not chosen.get("clip_norm") or values.get("clip_mode", "norm") != "norm":
            chosen.pop("clip_norm", None)
        decay = _decay(values, _number(extras.get("epoch")) or 0)
        chosen |= {} if decay is None else {"ema": decay}
        accumulated = _number(values.get("gradient_accumulation_steps")) or 1
        if name == TRAINER_ARGUMENTS and accumulated > 1 and "batch_size" in settings:
            chosen["batch_size"] = settings.pop("batch_size") * accumulated
        chosen = {key: value for key, value in chosen.items() if key not in settings}
        words = [f"{key} {value}" for key, value in chosen.items()]
        if values.get("clip_grad") and values.get("clip_mode", "norm") != "norm":
            how = values["clip_mode"]
            words.append(f"clipping by {how} has no counterpart, and ends here")
        if words:
            found[name] = RunEntry(name, ", ".join(words), "used" if chosen else "ignored")
        settings |= chosen
    return settings


def _clipping(version: str) -> float:
    """The norm to which DeepSpeed clips gradients where its configuration does not say; 0 for none.
    It clips to 1 in 0.19.8, and did not in older versions."""
    numbers = re.findall(r"\d+", version)[:3]
    return 1.0 if tuple(map(int, numbers)) >= (0, 19, 8) else 0.0


def _decay(values: Mapping[str, Any], epoch: int) -> float | None:
    """The decay of averaged weights that are updated with each step; None if they are not, or if
    ``values``, the script's settings, are neither of timm's script (which has ``sched``) nor of
    torchvision's, whose average begins after its warm-up, by the last ``epoch`` that was done."""
    decay = values.get("model_ema_decay") if values.get("model_ema") else None
    if not isinstance(decay, float):
        return None
    if "sched" in values:
        return None if values.get("model_ema_warmup") else decay
    if values.get("model_ema_steps") != 1 or epoch < values.get("lr_warmup_epochs", 0):
        return None
    images = values["world_size"] * values["batch_size"] / values["epochs"]
    return 1.0 - min(1.0, (1.0 - decay) * images)


def how_averaged(extras: Mapping[str, Any]) -> str:
    """Why the decay of averaged weights is not one number that the file says."""
    if named(extras.get("args")).get("model_ema_warmup"):
        return "their decay warms up by the step (model_ema_warmup), and here it is constant"
    return "the file does not say how they are averaged"


def scalers_in(extras: Mapping[str, Any], found: dict[str, RunEntry]) -> dict[str, Any]:
    """States of gradient scalers and ZeRO's layout: numbers that go back as they are."""
    names = (*SCALERS, LAYOUT)
    kept = {name: extras[name] for name in names if extras.get(name) and _plain(extras[name])}
    words = "loss scaling, for the way back; float32 and bfloat16 need none"
    found |= {name: RunEntry(name, words, "kept") for name in kept}
    if LAYOUT in kept:
        words = "how DeepSpeed's processes share the optimizer, for the way back"
        found[LAYOUT] = RunEntry(LAYOUT, words, "kept")
    return kept


def _plain(value: Any) -> bool:
    """Whether a value is numbers and text in mappings and lists, which JSON holds as well."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)
