"""fastai, DeepSpeed and the loop of torchvision's reference script, for
:mod:`parity_tests.programs`."""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

from parity_tests import runs
from parity_tests.support import import_torchvision

Trained = tuple[runs.TorchRun, list[float]]


def fastai(task: str, folder: Path, on: int, back: int, own: str = "") -> Trained:
    """fastai's Learner with torch's AdamW, or with its own Adam or Lamb, by name."""
    import_torchvision()
    from fastai.callback.core import Callback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, Recorder
    from fastai.optimizer import Adam, Lamb, OptimWrapper

    run, rates = runs.started(runs.adamw(runs.no_bias_decay), None), []

    class Noted(Callback):
        """Notes the rates."""

        def before_epoch(self) -> None:
            rates.append(float(self.opt.hypers[0]["lr"]))

    came = torch.load(folder / "back.pth", weights_only=True) if task == "resume" else {}
    data = runs.CountedBatches(runs.DONE + on - back if task == "resume" else 0)
    loaders = (
        torch.utils.data.DataLoader(one, batch_size=None) for one in (data, runs.CountedBatches(0))
    )
    wrapped = partial(OptimWrapper, opt=torch.optim.AdamW)
    learner = Learner(
        DataLoaders(*loaders, device="cpu"),
        run.model,
        loss_func=torch.nn.functional.cross_entropy,
        opt_func={"Adam": Adam, "Lamb": Lamb}.get(own, wrapped),
        lr=0.004,
        wd=0.03,
        wd_bn_bias=False,
        path=folder,
        model_dir=".",
        cbs=[Noted()],
    )
    learner.remove_cb(Recorder)  # which computes in float32
    if task == "resume":
        torch.save({"model": came["model"], "opt": came["optimizer"]}, folder / "file.pth")
        learner.load("file")
        learner.fit(back)
    else:
        learner.fit(runs.DONE)
        learner.save("saved")
        learner.fit(on)
    return run, rates[-(back if task == "resume" else on) :]


def torchvision(task: str, folder: Path, on: int, back: int) -> Trained:
    """The loop of torchvision's ``references/classification/train.py``: a warm-up, a cosine, norms
    without decay, an average of the weights and a scaler."""
    arguments = Namespace(
        model="resnet8",
        device="cpu",
        batch_size=runs.BATCH,
        epochs=runs.EPOCHS,
        lr=0.05,
        momentum=0.9,
        weight_decay=1e-3,
        norm_weight_decay=0.0,
        label_smoothing=0.0,
        lr_scheduler="cosineannealinglr",
        lr_warmup_epochs=1,
        lr_warmup_method="linear",
        lr_warmup_decay=0.01,
        lr_min=0.0,
        opt="sgd",
        model_ema=True,
        model_ema_steps=1,
        model_ema_decay=0.99,
        start_epoch=0,
        world_size=1,
        amp=True,
        resume="",
        output_dir=str(folder),
    )

    def scheduled(optimizer: Any) -> Any:
        rest = arguments.epochs - arguments.lr_warmup_epochs
        cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=rest, eta_min=arguments.lr_min)
        warmup = lr_scheduler.LinearLR(
            optimizer, start_factor=arguments.lr_warmup_decay, total_iters=1
        )
        return lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[1])

    run = runs.started(runs.momentum_sgd(runs.by_kind), scheduled, per_epoch=True)
    share = (1 - arguments.model_ema_decay) * runs.BATCH / arguments.epochs
    average = torch.optim.swa_utils.AveragedModel(
        run.model, avg_fn=lambda a, p, _: (1 - share) * a + share * p, use_buffers=True
    )
    scaler, rates = torch.amp.GradScaler("cpu"), []
    assert run.scheduler is not None
    if task == "resume":
        came = torch.load(folder / "back.pth", weights_only=True)
        run.model.load_state_dict(came["model"])
        run.optimizer.load_state_dict(came["optimizer"])
        run.scheduler.load_state_dict(came["lr_scheduler"])
        average.load_state_dict(came["model_ema"])
        scaler.load_state_dict(came["scaler"])
        run.epoch = came["epoch"] + 1
    for epoch in range(run.epoch, runs.DONE + on):
        rates.append(float(run.optimizer.param_groups[0]["lr"]))
        # the script's step with a scaler, of which scale 1 computes the same
        run.epochs(1, after_step=lambda: average.update_parameters(run.model))
        if epoch < arguments.lr_warmup_epochs:
            average.n_averaged.fill_(0)  # as the script does after each step of the warm-up
        if task == "begin" and epoch == runs.DONE - 1:
            content = {
                "model": run.model.state_dict(),
                "optimizer": run.optimizer.state_dict(),
                "lr_scheduler": run.scheduler.state_dict(),
                "epoch": epoch,
                "args": arguments,
                "model_ema": average.state_dict(),
                "scaler": scaler.state_dict(),
            }
            torch.save(content, folder / "checkpoint.pth")
    torch.save(average.module.state_dict(), folder / "average.pth")
    return run, rates[-(back if task == "resume" else on) :]


def _engine(run: runs.TorchRun, stage: int) -> Any:
    """DeepSpeed's engine for a run."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # which a compiler would make
    deepspeed.init_distributed("gloo")
    known = get_accelerator().supported_dtypes()
    get_accelerator().supported_dtypes = lambda: [*known, torch.float64]
    settings = {
        "train_micro_batch_size_per_gpu": runs.BATCH,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**6,
    }
    parts = {"model": run.model, "optimizer": run.optimizer, "lr_scheduler": run.scheduler}
    engine = deepspeed.initialize(**parts, config=settings)[0]
    if not stage:  # whose gradients are in float64, which it reduces in float32 otherwise
        type(engine).communication_data_type = torch.float64
    return engine


def deepspeed(task: str, folder: Path, on: int, back: int, stage: int = 0) -> Trained:
    """DeepSpeed's engine in float64, or with ZeRO in float32."""
    run = runs.started(
        runs.adamw(runs.no_bias_decay), lambda o: lr_scheduler.ExponentialLR(o, 0.97)
    )
    plain = runs.twin(run)
    if stage:
        run.model.float()
    engine, rates = _engine(run, stage), []

    def train(epochs: int) -> None:
        for epoch in range(run.epoch, run.epoch + epochs):
            rates.append(float(engine.optimizer.param_groups[0]["lr"]))
            for images, labels in runs._batches(runs.few_digits(), epoch):
                images = images.float() if stage else images
                engine.backward(torch.nn.functional.cross_entropy(engine(images), labels))
                engine.step()
        run.epoch += epochs

    if task == "resume":
        _, came = engine.load_checkpoint(str(folder / "back"), tag="it")
        run.epoch = came["epoch"] + 1
        train(back)
        return run, rates
    train(runs.DONE)
    engine.save_checkpoint(str(folder / "saved"), client_state={"epoch": run.epoch - 1})
    if stage:
        _go_on_exactly(plain, folder, on)
    train(on)
    return run, rates[-on:]


def _go_on_exactly(plain: runs.TorchRun, folder: Path, on: int) -> None:
    """Trains a plain loop in float32, which has then what DeepSpeed has, and on in float64, to
    ``exact.npz``."""
    network = plain.model.float()
    network.register_forward_pre_hook(
        lambda module, given: (given[0].to(next(module.parameters()).dtype),)
    )
    plain.epochs(runs.DONE)
    network.double()
    for kept in plain.optimizer.state.values():
        kept |= {key: kept[key].double() for key in ("exp_avg", "exp_avg_sq")}
    plain.epochs(on)
    np.savez(folder / "exact.npz", **plain.state())  # type: ignore[arg-type]
