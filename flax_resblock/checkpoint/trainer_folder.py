"""What a Hugging Face Trainer writes beside the weights: one file per subject, in one folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from flax_resblock.checkpoint.limits import LIMITS, Limits, check_files
from flax_resblock.errors import CheckpointError

_PICKLED: Mapping[str, str] = MappingProxyType(
    {"optimizer": "optimizer.pt", "scheduler": "scheduler.pt"}
)
_NOT_READ = ("training_args.bin", "scaler.pt", "rng_state.pth")
_STATE = "trainer_state.json"


def beside(folder: Path, limits: Limits = LIMITS) -> dict[str, Any]:
    """The entries of a training checkpoint that lie in files of their own: optimizer, scheduler,
    counters.

    Args:
      folder: Where the weights are.
      limits: What each file may declare.
    Returns:
      By entry name, arrays for tensors; files that are of no use to another framework with None.
    Raises:
      CheckpointError: A damaged file, or one that would execute code.
      MissingDependencyError: There is something in it that only PyTorch can read, and torch is not
        installed.
    """
    found: dict[str, Any] = {}
    for name, file in _PICKLED.items():
        if (folder / file).is_file():
            from flax_resblock.checkpoint import torch_file

            found[name] = torch_file.load(folder / file, limits)
    if (folder / _STATE).is_file():
        check_files([folder / _STATE], replace(limits, max_bytes=limits.header), folder / _STATE)
        try:
            state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
            found |= {name: state[name] for name in ("epoch", "global_step") if name in state}
        except (ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{folder / _STATE} is damaged ({error}). Copy the folder again."
            ) from error
        found["trainer_state"] = state
    return found | {name: None for name in _NOT_READ if (folder / name).is_file()}
