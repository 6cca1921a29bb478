"""Training runs in PyTorch, and the files that the usual programs make of them."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch.optim import lr_scheduler

from flax_resblock import ResNetConfig
from flax_resblock.training import TrainConfig
from flax_resblock.training.data import Dataset, batches, digits
from torch_ref import ResNet
from torch_ref.training import sgd, warmup_cosine

CONFIG = ResNetConfig(
    depths=(1, 1), widths=(4, 6), stem="cifar", stem_width=4, in_channels=1, num_classes=10
)
STEPS, BATCH, EPOCHS, DONE = 5, 24, 6, 2
"""Steps per epoch, images per step, epochs of the run, epochs done when it is saved."""


def few_digits() -> Dataset:
    """As many images as :data:`STEPS` batches take."""
    train = digits().train
    return Dataset(
        name="few",
        images=train.images[: STEPS * BATCH],
        labels=train.labels[: STEPS * BATCH],
        num_classes=10,
        mean=train.mean,
        std=train.std,
    )


def config(**changes: Any) -> TrainConfig:
    """The same run for the JAX loop."""
    return TrainConfig(
        **{"model": CONFIG, "epochs": EPOCHS, "batch_size": BATCH, "dtype": "float64", **changes}
    )


def by_kind(model: torch.nn.Module) -> list[dict[str, Any]]:
    """torchvision's ``set_weight_decay``: norms apart from everything else."""
    norms = {
        p
        for module in model.modules()
        if isinstance(module, torch.nn.BatchNorm2d)
        for p in module.parameters()
    }
    others = [p for p in model.parameters() if p not in norms]
    return [
        {"params": others, "weight_decay": 1e-3},
        {"params": [p for p in model.parameters() if p in norms], "weight_decay": 0.0},
    ]


def no_bias_decay(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Hugging Face Trainer's groups: biases apart."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 0.03},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


@dataclass
class TorchRun:
    """A run in PyTorch; :meth:`epochs` takes it further."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler | None
    per_epoch: bool
    epoch: int = 0
    step: int = 0

    def epochs(self, count: int, after_step: Callable[[], object] = lambda: None) -> TorchRun:
        """The same run ``count`` epochs later, on the batches that the JAX loop sees."""
        data = few_digits()
        for epoch in range(self.epoch, self.epoch + count):
            for images, labels in _batches(data, epoch):
                loss = torch.nn.functional.cross_entropy(self.model.train()(images), labels)
                self.optimizer.zero_grad()
                loss.backward()
                self.optimizer.step()
                self.step += 1
                after_step()
                if self.scheduler is not None and not self.per_epoch:
                    self.scheduler.step()
            if self.scheduler is not None and self.per_epoch:
                self.scheduler.step()
        self.epoch += count
        return self

    def state(self) -> dict[str, np.ndarray]:
        """Weights and statistics."""
        return {
            key: value.detach().numpy().copy() for key, value in self.model.state_dict().items()
        }


def _batches(data: Dataset, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in batches(data, BATCH, seed=0, epoch=epoch):
        yield (
            torch.from_numpy(np.moveaxis(batch.images, -1, 1).astype(np.float64)),
            torch.from_numpy(batch.labels.astype(np.int64)),
        )


class Batches(torch.utils.data.IterableDataset):
    """The batches that the JAX loop sees, epoch after epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        yield from _batches(few_digits(), self.epoch)
        self.epoch += 1


class CountedBatches(Batches):
    """The same for programs that ask how many there are. Lightning does not read to the end then,
    and the epoch would not advance."""

    def __len__(self) -> int:
        return STEPS


def started(
    optimizer: Callable[[Any], Any],
    scheduler: Callable[[Any], Any] | None,
    *,
    per_epoch: bool = False,
    seed: int = 0,
) -> TorchRun:
    """A run before its first step, in float64."""
    torch.manual_seed(seed)
    model = ResNet(**asdict(CONFIG)).double()
    made = optimizer(model)
    return TorchRun(model, made, None if scheduler is None else scheduler(made), per_epoch)


def _ema(model: torch.nn.Module) -> Any:
    return torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )


def _scaler() -> dict[str, Any]:
    return {
        "scale": 65536.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2000,
        "_growth_tracker": 10,
    }


def plain_loop(run: TorchRun, path: Path) -> Path:
    """A loop with GradScaler and an average of the weights."""
    content = {
        "epoch": run.epoch,
        "global_step": run.step,
        "model_state_dict": run.model.state_dict(),
        "optimizer_state_dict": run.optimizer.state_dict(),
        "scheduler_state_dict": run.scheduler and run.scheduler.state_dict(),
        "scaler": _scaler(),
        "ema": _ema(run.model).state_dict(),
        "rng": torch.get_rng_state(),
        "best_acc": 0.93,
    }
    torch.save(content, path / "run.pth")
    return path / "run.pth"


def torchvision_reference(run: TorchRun, path: Path) -> Path:
    """What torchvision's ``references/classification/train.py`` writes."""
    content = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.scheduler and run.scheduler.state_dict(),
        "epoch": run.epoch - 1,
        "args": argparse.Namespace(
            epochs=EPOCHS,
            batch_size=BATCH,
            lr=0.1,
            label_smoothing=0.0,
            model="resnet18",
            device="cuda",
            amp=True,
        ),
        "model_ema": _ema(run.model).state_dict(),
        "scaler": _scaler(),
    }
    torch.save(content, path / "checkpoint.pth")
    return path / "checkpoint.pth"


def lightning(run: TorchRun, path: Path) -> Path:
    """What a Lightning Trainer writes."""
    content = {
        "epoch": run.epoch - 1,
        "global_step": run.step,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {f"model.{key}": value for key, value in run.model.state_dict().items()},
        "loops": {
            "fit_loop": {
                "state_dict": {},
                "epoch_loop.state_dict": {"_batches_that_stepped": run.step},
            }
        },
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {
                "best_model_path": "",
                "best_model_score": torch.tensor(0.5),
                "best_k_models": {},
            }
        },
        "optimizer_states": [run.optimizer.state_dict()],
        "lr_schedulers": [run.scheduler.state_dict()] if run.scheduler else [],
        "MixedPrecision": _scaler(),
        "hparams_name": "kwargs",
        "hyper_parameters": {"batch_size": BATCH, "max_epochs": EPOCHS, "name": "resnet"},
    }
    torch.save(content, path / "epoch=1-step=10.ckpt")
    return path / "epoch=1-step=10.ckpt"


def timm(run: TorchRun, path: Path) -> Path:
    """What timm's CheckpointSaver writes; it stores no scheduler."""
    content = {
        "epoch": run.epoch - 1,
        "arch": "resnet8",
        "state_dict": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "version": 2,
        "args": argparse.Namespace(
            epochs=EPOCHS, batch_size=BATCH, smoothing=0.0, opt="sgd", model="resnet8"
        ),
        "amp_scaler": _scaler(),
        "state_dict_ema": {
            key: value * 0.9 if value.is_floating_point() else value
            for key, value in run.model.state_dict().items()
        },
        "metric": 91.5,
    }
    torch.save(content, path / "last.pth.tar")
    return path / "last.pth.tar"


def hugging_face(run: TorchRun, path: Path) -> Path:
    """The folder that a Hugging Face Trainer writes at each save."""
    folder = path / f"checkpoint-{run.step}"
    folder.mkdir()
    save_file(
        {key: value.contiguous() for key, value in run.model.state_dict().items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    torch.save(run.optimizer.state_dict(), folder / "optimizer.pt")
    if run.scheduler:
        torch.save(run.scheduler.state_dict(), folder / "scheduler.pt")
    torch.save({"python": None, "cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "training_args.bin").write_bytes(b"\x80\x02never opened")
    state = {
        "epoch": float(run.epoch),
        "global_step": run.step,
        "max_steps": EPOCHS * STEPS,
        "num_train_epochs": EPOCHS,
        "train_batch_size": BATCH,
    }
    (folder / "trainer_state.json").write_text(json.dumps({**state, "log_history": []}))
    return folder


def per_batch(optimizer: Any) -> Any:
    return warmup_cosine(optimizer, warmup_steps=STEPS, total_steps=EPOCHS * STEPS)


def per_epoch(optimizer: Any) -> Any:
    warmup = lr_scheduler.LinearLR(optimizer, 0.2, total_iters=1)
    return lr_scheduler.SequentialLR(
        optimizer, [warmup, lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS - 1)], [1]
    )


def adamw(groups: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: torch.optim.AdamW(groups(model), lr=0.004)


def momentum_sgd(groups: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda model: torch.optim.SGD(groups(model), lr=0.05, momentum=0.9)


SPELLINGS: dict[str, tuple[Callable[[], TorchRun], Callable[[TorchRun, Path], Path]]] = {
    "a plain loop with GradScaler and EMA": (
        lambda: started(lambda m: sgd(m, 0.05), per_batch),
        plain_loop,
    ),
    "torchvision's reference": (
        lambda: started(momentum_sgd(by_kind), per_epoch, per_epoch=True),
        torchvision_reference,
    ),
    "Lightning": (lambda: started(adamw(lambda m: m.parameters()), per_batch), lightning),
    "Lightning, one step of the schedule per epoch": (
        lambda: started(
            momentum_sgd(lambda m: m.parameters()),
            lambda o: lr_scheduler.MultiStepLR(o, [2, 3], 0.3),
            per_epoch=True,
        ),
        lightning,
    ),
    "timm": (lambda: started(momentum_sgd(by_kind), None), timm),
    "Hugging Face Trainer": (
        lambda: started(
            adamw(no_bias_decay),
            lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=EPOCHS * STEPS),
        ),
        hugging_face,
    ),
}


def saved(spelling: str, folder: Path, *, epochs: int = DONE) -> tuple[TorchRun, Path]:
    """A run of ``epochs`` epochs and the file that it was saved to; the run itself can go on."""
    start, write = SPELLINGS[spelling]
    run = start().epochs(epochs)
    return run, write(run, folder)


def rewritten(path: Path, change: Callable[[Any], None]) -> Path:
    """A ``.pth`` with its content changed."""
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
    return path


def twin(run: TorchRun) -> TorchRun:
    """A copy that goes its own way."""
    return copy.deepcopy(run)
