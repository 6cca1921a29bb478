"""Training programs that save a run in their own way, for :mod:`parity_tests.test_programs`.

Run as ``python -m parity_tests.programs PROGRAM TASK FOLDER``, where the program is installed:

- ``begin`` trains, saves the run with the program's own functions to ``FOLDER/saved``, goes on for
  20 steps, and writes what it has then to ``FOLDER/stayed.npz``.
- ``resume`` loads ``FOLDER/back.pth``, goes on for 10 steps, and writes ``FOLDER/resumed.npz``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

from parity_tests import loop_programs, runs, trainer_programs
from parity_tests.support import import_torchvision

ON, BACK = 4, 2
"""Epochs after the file was saved, and after the run has come back."""


def _adamw() -> runs.TorchRun:
    return runs.started(
        runs.adamw(runs.no_bias_decay), lambda o: lr_scheduler.ExponentialLR(o, 0.97)
    )


def _written(path: Path, run: runs.TorchRun, rates: list[float]) -> None:
    state = {key.removeprefix("module."): value for key, value in run.state().items()}
    np.savez(path, rates=np.array(rates), **state)


def _gone_on(run: runs.TorchRun, epochs: int) -> list[float]:
    """Trains, and returns the rate of each epoch's first step."""
    rates = []
    for _ in range(epochs):
        rates.append(float(run.optimizer.param_groups[0]["lr"]))
        run.epochs(1)
    return rates


def accelerate(task: str, folder: Path) -> None:
    """Accelerate, in two processes that see the same images."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator, run = Accelerator(cpu=True), _adamw()
    set_seed(0)
    first = accelerator.is_main_process
    if task == "resume":
        back = torch.load(folder / "back.pth", weights_only=True)
        run.model.load_state_dict(back["model"], strict=True)
    run.model, run.optimizer, run.scheduler = accelerator.prepare(
        run.model, run.optimizer, run.scheduler
    )
    if task == "resume":
        run.optimizer.load_state_dict(back["optimizer"])
        run.scheduler.load_state_dict(back["lr_scheduler"])  # type: ignore[union-attr]
        run.epoch = back["epoch"] + 1
        rates = _gone_on(run, BACK)
    else:
        run.epochs(runs.DONE)
        accelerator.save_state(str(folder / "saved"))
        rates = _gone_on(run, ON)
    if first:
        name = "resumed.npz" if task == "resume" else "stayed.npz"
        _written(folder / name, run, rates)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def _lightning_module(run: runs.TorchRun, rates: list[float]) -> Any:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        """The same network, optimizer and schedule."""

        def __init__(self) -> None:
            super().__init__()
            self.model = run.model
            self.save_hyperparameters({"batch_size": runs.BATCH, "max_epochs": runs.EPOCHS})

        def training_step(self, batch: Any, index: int) -> Any:
            if index == 0:
                rates.append(float(self.optimizers().param_groups[0]["lr"]))  # type: ignore[union-attr]
            images, labels = batch
            return torch.nn.functional.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            schedule = {"scheduler": run.scheduler, "interval": "step"}
            return {"optimizer": run.optimizer, "lr_scheduler": schedule}

    return Module()


def lightning(task: str, folder: Path) -> None:
    """Lightning's Trainer."""
    import_torchvision()  # which torchmetrics imports
    import pytorch_lightning as pl

    run, rates = _adamw(), []
    done = runs.DONE if task == "begin" else 0
    if task == "resume":
        back = torch.load(folder / "back.pth", weights_only=True)
        run.model.load_state_dict(back["model"], strict=True)
        run.optimizer.load_state_dict(back["optimizer"])
        run.scheduler.load_state_dict(back["lr_scheduler"])  # type: ignore[union-attr]
    module = _lightning_module(run, rates)

    def train(epochs: int, start: int, checkpoint: Any = None) -> Any:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        loader = torch.utils.data.DataLoader(runs.Batches(start), batch_size=None)
        trainer.fit(module, loader, ckpt_path=checkpoint)
        return trainer

    if task == "resume":
        train(BACK, back["epoch"] + 1)
        _written(folder / "resumed.npz", run, rates)
        return
    trainer = train(done, 0)
    trainer.save_checkpoint(folder / "saved.ckpt")
    rates.clear()
    train(done + ON, done, folder / "saved.ckpt")
    _written(folder / "stayed.npz", run, rates)


def ignite(task: str, folder: Path) -> None:
    """Ignite's Engine and Checkpoint."""
    from ignite.engine import Engine, Events
    from ignite.handlers import Checkpoint, DiskSaver

    run, rates = _adamw(), []
    parts = {"model": run.model, "optimizer": run.optimizer, "lr_scheduler": run.scheduler}

    def step(engine: Engine, batch: Any) -> None:
        if (engine.state.iteration - 1) % runs.STEPS == 0:
            rates.append(float(run.optimizer.param_groups[0]["lr"]))
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(run.model.train()(images), labels)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        assert run.scheduler is not None
        run.scheduler.step()

    def engine_of(epoch: int) -> Any:
        data, made = runs.Batches(epoch), Engine(step)
        return data, made

    if task == "resume":
        back = torch.load(folder / "back.pth", weights_only=True)
        known = {name: back[name] for name in parts}
        Checkpoint.load_objects(to_load=parts, checkpoint=known)
        data, engine = engine_of(back["epoch"] + 1)
        engine.run(data, max_epochs=BACK, epoch_length=runs.STEPS)
        _written(folder / "resumed.npz", run, rates)
        return
    data, engine = engine_of(0)
    saver = Checkpoint(
        {**parts, "trainer": engine}, DiskSaver(str(folder)), filename_pattern="saved.pt"
    )
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=runs.DONE), saver)
    engine.add_event_handler(Events.EPOCH_COMPLETED(once=runs.DONE), lambda _: rates.clear())
    engine.run(data, max_epochs=runs.DONE + ON, epoch_length=runs.STEPS)
    _written(folder / "stayed.npz", run, rates)


def distributed(task: str, folder: Path) -> None:
    """PyTorch's distributed checkpoint, in two processes that share the parameters."""
    from parity_tests import sharded_programs

    sharded_programs.folders(task, folder, _gone_on, ON, BACK)


def fsdp(task: str, folder: Path) -> None:
    """FSDP's full state dicts, in two processes that share the parameters."""
    from parity_tests import sharded_programs

    sharded_programs.files(task, folder, _gone_on, ON, BACK)


def _with_own_loop(
    program: Callable[[str, Path, int, int], tuple[runs.TorchRun, list[float]]],
) -> Callable[[str, Path], None]:
    """A program that trains, saves and resumes in one function."""

    def train(task: str, folder: Path) -> None:
        run, rates = program(task, folder, ON, BACK)
        if int(os.environ.get("RANK", "0")) == 0:
            _written(folder / ("resumed.npz" if task == "resume" else "stayed.npz"), run, rates)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    return train


PROGRAMS: dict[str, Callable[[str, Path], None]] = {
    "torchvision": _with_own_loop(loop_programs.torchvision),
    "fastai": _with_own_loop(loop_programs.fastai),
    "fastai's Adam": _with_own_loop(partial(loop_programs.fastai, own="Adam")),
    "fastai's Lamb": _with_own_loop(partial(loop_programs.fastai, own="Lamb")),
    "deepspeed": _with_own_loop(loop_programs.deepspeed),
    "zero": _with_own_loop(partial(loop_programs.deepspeed, stage=2)),
    "transformers": _with_own_loop(trainer_programs.hugging_face),
    "timm": _with_own_loop(trainer_programs.timm),
    "mmengine": _with_own_loop(trainer_programs.mmengine),
    "distributed": distributed,
    "fsdp": fsdp,
    "accelerate": accelerate,
    "lightning": lightning,
    "ignite": ignite,
}

if __name__ == "__main__":
    program, task, folder = sys.argv[1:]
    PROGRAMS[program](task, Path(folder))
    print(json.dumps({"done": task}))
