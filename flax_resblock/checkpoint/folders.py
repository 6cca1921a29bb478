"""Folders of checkpoints as Orbax, Hugging Face's hub and its Trainer write them.

On the hub the weights have well-known names, and JSON files lie beside them. The Trainer and
Accelerate add files for the optimizer and the schedule.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax_resblock.checkpoint.limits import LIMITS, Limits, check_files
from flax_resblock.checkpoint.trainer_arguments import TRAINER_ARGUMENTS, trainer_arguments
from flax_resblock.errors import CheckpointError, damaged, reason, visible

CONFIG_FILE, PREPROCESSOR_FILE = "config.json", "preprocessor_config.json"
WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "flax_model.msgpack",
)
"""Names of the weights, in order of preference."""

_LONGEST = 255
"""Bytes of a name that file systems take."""
_LARGEST = 16 << 20
"""Bytes; a configuration with a thousand class names has 70 thousand."""


def is_orbax(path: Path) -> bool:
    """Whether a folder is an Orbax checkpoint."""
    return any(
        (path / name).exists() for name in ("_CHECKPOINT_METADATA", "_METADATA", "orbax.checkpoint")
    )


RUN_FOLDER = "checkpoints"
"""Where the folder of a training run has its Orbax folders; the last by name is the newest."""


def orbax_in(path: Path) -> Path | None:
    """The Orbax folder that a path is, or the newest of a run or of a folder of steps, if any."""
    steps = sorted(path.glob("*"), key=_step, reverse=True) if path.is_dir() else []
    folders = (path, *sorted((path / RUN_FOLDER).glob("*"), reverse=True), *steps)
    return next((folder for folder in folders if is_orbax(folder)), None)


def _step(path: Path) -> tuple[int, str]:
    """The number at the end of a name: ``100``, ``checkpoint_100``."""
    digits = re.search(r"\d{1,18}$", path.name)
    return (int(digits.group()) if digits else -1), path.name


def msgpack_in(path: Path) -> Path | None:
    """The newest ``checkpoint_100`` that ``flax.training.checkpoints`` wrote, if there is one."""
    files = [one for one in path.glob("checkpoint_*") if one.is_file()]
    return max(files, key=_step, default=None)


def metadata_in(path: Path) -> dict[str, str]:
    """What this library wrote beside the tensors of an Orbax folder, or of the newest of a run;
    empty for anything else. The tensors are not read. Raises CheckpointError if it is damaged."""
    from flax_resblock.checkpoint.orbax_folder import METADATA_FILE, read_metadata

    folder = orbax_in(path)
    return {} if folder is None else read_metadata(folder / METADATA_FILE)


DISTRIBUTED_SHARD, DISTRIBUTED_PLAN = ".distcp", ".metadata"
"""A shard of ``torch.distributed.checkpoint``, and the file that says what is in which."""
FSDP_MODEL, FSDP_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"
"""Folders of ``torch.distributed.checkpoint`` in what Accelerate saves of a run with FSDP."""


def distributed_in(path: Path) -> Path | None:
    """The folder of ``torch.distributed.checkpoint`` that a path is, or is a file of, if any."""
    inside = path.suffix == DISTRIBUTED_SHARD or path.name == DISTRIBUTED_PLAN
    folder = path.parent if inside else path
    places = (folder, folder / FSDP_MODEL)
    return next((one for one in places if (one / DISTRIBUTED_PLAN).is_file()), None)


FSDP_WHOLE = "pytorch_model_fsdp.bin"
"""The weights where Accelerate saves a full state dict of FSDP."""
ZERO_MODEL = "mp_rank_00_model_states.pt"
"""The file of DeepSpeed that holds the weights."""
ZERO_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d{1,6})_mp_rank_00_optim_states\.pt")
"""Files beside it, each with a part of the optimizer."""


def shards_of(path: Path) -> list[Path]:
    """DeepSpeed's parts of the optimizer beside a file of weights, in order; empty for others."""
    if path.name != ZERO_MODEL:
        return []
    found = {
        int(match[1]): one
        for one in path.parent.iterdir()
        if (match := ZERO_SHARD.fullmatch(one.name))
    }
    return [found[number] for number in sorted(found)]


PORTED = ("port.json", "weights.safetensors")
"""Files of a network that ``flax-resblock port`` wrote: the table of its tensors, and they."""


def is_ported(path: Path) -> bool:
    """Whether a path is the folder of a ported network."""
    return all((path / name).is_file() for name in PORTED)


def weights_in(folder: Path) -> Path | None:
    """The weights of a folder; None where there are none."""
    names = (*WEIGHTS, FSDP_WHOLE, ZERO_MODEL)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads(object_pairs_hook=)``; raises ValueError for two entries of
    one name, as which of them counts would depend on the reader."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has {visible(key[:120])!r} twice")
        found[key] = value
    return found


def shards(index: Path, limits: Limits) -> list[Path]:
    """The files that an index of a sharded checkpoint names, in order; raises CheckpointError for
    no such index, one beyond the limits, or a shard that is not there."""
    limits.check(index, "max_header_bytes", index.stat().st_size, "bytes of index")
    try:
        weight_map = json.loads(
            index.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates
        )["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{index} is not an index of shards: it has no 'weight_map' of tensor names to "
            f"file names."
        ) from error
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name == visible(name)
        if not plain or len(name.encode()) > _LONGEST:
            raise CheckpointError(
                f"{index} names the shard {str(name)[:200]!r}, which is not a plain file name "
                f"in its folder."
            )
        if not (index.parent / name).is_file():
            raise CheckpointError(
                f"{index} names the shard {name}, which is not there. Copy all shards into "
                f"{index.parent}."
            )
    return [index.parent / name for name in names]


def texts_beside(weights: Path) -> dict[str, str]:
    """The JSON files beside weights of a known name; raises CheckpointError for one that is no
    text."""
    if weights.name not in WEIGHTS:
        return {}
    texts = {}
    for name in (CONFIG_FILE, PREPROCESSOR_FILE):
        file = weights.parent / name
        if file.is_file() and file.stat().st_size <= _LARGEST:
            try:
                texts[name] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise CheckpointError(
                    f"{file} cannot be read as text ({reason(error)}). Copy the folder again, or "
                    f"remove that file."
                ) from error
    return texts


_PICKLED = {
    "optimizer": ("optimizer.pt", "optimizer.bin"),
    "scheduler": ("scheduler.pt", "scheduler.bin"),
    "scaler": ("scaler.pt",),
}
"""Files of the Trainer and of Accelerate's ``save_state`` by the entry that they stand for."""
_STATE = "trainer_state.json"
_ASKED = frozenset({"max_grad_norm", "label_smoothing_factor", "gradient_accumulation_steps"})
"""What the Trainer's arguments are asked for."""


def trainer_files(folder: Path, limits: Limits = LIMITS) -> dict[str, Any]:
    """The entries of a training checkpoint that lie in files of their own: optimizer, scheduler,
    counters; arrays for tensors. Every other file, none of which is opened, comes with None.

    Raises:
      CheckpointError: A damaged file, or one that would execute code.
      MissingDependencyError: It holds something that only PyTorch, which is absent, can read.
    """
    found: dict[str, Any] = {}
    read = {_STATE, CONFIG_FILE, PREPROCESSOR_FILE, FSDP_WHOLE, ZERO_MODEL, *WEIGHTS}
    read |= {shard.name for shard in shards_of(folder / ZERO_MODEL)}
    if (folder / FSDP_OPTIMIZER / DISTRIBUTED_PLAN).is_file():
        from flax_resblock.checkpoint.distributed_folder import read_content

        found |= read_content(folder / FSDP_OPTIMIZER, limits)
    for name, files in _PICKLED.items():
        file = next((file for file in files if (folder / file).is_file()), None)
        if file is not None:
            from flax_resblock.checkpoint import torch_file

            found[name] = torch_file.load_torch(folder / file, limits)
            read.add(file)
    if (folder / _STATE).is_file():
        check_files([folder / _STATE], replace(limits, max_bytes=limits.header), folder / _STATE)
        with damaged(f"{folder / _STATE} is damaged", "Copy the folder again."):
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            found |= {name: state[name] for name in ("epoch", "global_step") if name in state}
        found["trainer_state"] = state
    if (folder / TRAINER_ARGUMENTS).is_file():
        found[TRAINER_ARGUMENTS] = trainer_arguments(folder / TRAINER_ARGUMENTS, _ASKED, limits)
        read.add(TRAINER_ARGUMENTS)
    taken = {FSDP_MODEL, *([FSDP_OPTIMIZER] if "optimizer" in found else [])}
    others = sorted(file.name for file in folder.iterdir() if file.name not in taken)
    weights = ("model-", "pytorch_model-")  # shards
    plan = {DISTRIBUTED_PLAN} if distributed_in(folder) else set()
    rest = [name for name in others if name not in read | plan and not name.startswith(weights)]
    rest = [name for name in rest if not (plan and name.endswith(DISTRIBUTED_SHARD))]
    return found | dict.fromkeys(rest)
