"""Programs of several processes that share the parameters among them, for
:mod:`parity_tests.programs`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint import state_dict as parts
from torch.distributed.checkpoint.format_utils import torch_save_to_dcp
from torch.optim import lr_scheduler

from parity_tests import runs

WHOLE = parts.StateDictOptions(full_state_dict=True, cpu_offload=True)


def _started(shard: Callable[[Any], Any]) -> runs.TorchRun:
    distributed.init_process_group("gloo")
    optimizer = runs.adamw(runs.no_bias_decay)
    return runs.started(
        lambda model: optimizer(shard(model)), lambda o: lr_scheduler.ExponentialLR(o, 0.97)
    )


def _written(path: Path, run: runs.TorchRun, rates: list[float]) -> None:
    whole = parts.get_model_state_dict(run.model, options=WHOLE)
    if distributed.get_rank() == 0:
        np.savez(path, rates=np.array(rates), **{key: v.numpy() for key, v in whole.items()})


def _finished(folder: Path, run: runs.TorchRun, rates: list[float], task: str) -> None:
    _written(folder / ("resumed.npz" if task == "resume" else "stayed.npz"), run, rates)
    distributed.barrier()
    distributed.destroy_process_group()


def _load(run: runs.TorchRun, state: dict[str, Any], options: parts.StateDictOptions) -> None:
    """Puts a run where a checkpoint was written."""
    parts.set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )
    assert run.scheduler is not None
    run.scheduler.load_state_dict(state["lr_scheduler"])
    run.epoch = state["epoch"] + 1


def _sharded(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def folders(
    task: str,
    folder: Path,
    gone_on: Callable[[runs.TorchRun, int], list[float]],
    on: int,
    back: int,
) -> None:
    """FSDP2 with ``torch.distributed.checkpoint``."""
    run = _started(_sharded)

    def content() -> dict[str, Any]:
        model, optimizer = parts.get_state_dict(run.model, run.optimizer)
        assert run.scheduler is not None
        return {
            "model": model,
            "optimizer": optimizer,
            "lr_scheduler": run.scheduler.state_dict(),
            "epoch": run.epoch - 1,
            "step": run.step,
        }

    if task == "begin":
        run.epochs(runs.DONE)
        checkpoint.save(content(), checkpoint_id=folder / "saved")
        _finished(folder, run, gone_on(run, on), task)
        return
    if distributed.get_rank() == 0:
        torch_save_to_dcp(folder / "back.pth", folder / "back")
    distributed.barrier()
    state = content()
    checkpoint.load(state, checkpoint_id=folder / "back")
    _load(run, state, parts.StateDictOptions())
    _finished(folder, run, gone_on(run, back), task)


def files(
    task: str,
    folder: Path,
    gone_on: Callable[[runs.TorchRun, int], list[float]],
    on: int,
    back: int,
) -> None:
    """FSDP2 with full state dicts in one file, whose optimizer has names in place of numbers."""
    run = _started(_sharded)
    assert run.scheduler is not None
    if task == "begin":
        run.epochs(runs.DONE)
        model, optimizer = parts.get_state_dict(run.model, run.optimizer, options=WHOLE)
        rest = {"scheduler": run.scheduler.state_dict(), "epoch": run.epoch - 1}
        if distributed.get_rank() == 0:
            torch.save({"model": model, "optimizer": optimizer, **rest}, folder / "saved.pt")
        _finished(folder, run, gone_on(run, on), task)
        return
    came = torch.load(folder / "back.pth", weights_only=True)
    _load(run, came, parts.StateDictOptions(full_state_dict=True))
    _finished(folder, run, gone_on(run, back), task)
