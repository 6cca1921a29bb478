"""``flax-resblock demo``: the whole story on real data."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_resblock.cli.common import ReadingFlags, output
from flax_resblock.cli.convert import convert
from flax_resblock.cli.inspect import inspect
from flax_resblock.cli.verify import DeviceFlags, InputFlags, ReportFlags, WhatFlags, verify
from flax_resblock.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from train.data.dataset import Splits

DONE = "demo.txt"
"""Marks a folder as the output of an earlier demo, which the next one may replace."""


def demo(out: Path = Path("demo_out"), epochs: int = 3, seed: int = 0) -> int:
    """The whole story on real data, in under two minutes: trains a network on handwritten digits in PyTorch, saves a .pth; inspects, converts and verifies
    it; goes on training in JAX; converts back to a .pth; and shows that both frameworks then give the same predictions.

    Needs the extras: pip install 'flax-resblock[torch,train]'.

    Args:
      out: Folder for the files; one left by an earlier demo is replaced.
      epochs: Epochs in each framework.
      seed: Of the weights and of the order of the images.
    """
    if epochs < 1:
        raise InputError(f"--epochs {epochs} must be at least 1.")
    if out.exists() and not (out.is_dir() and ((out / DONE).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not the output of an earlier demo. Choose another folder with --out.")
    try:
        import torch

        import torch_ref.training
        from train import PRESETS
        from train.data import digits
    except ImportError as error:
        raise MissingDependencyError(f"the demo needs {error.name}, which is not installed: pip install 'flax-resblock[torch,train]'.") from error

    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / DONE).write_text("Files of `flax-resblock demo`. The next demo replaces this folder.\n", encoding="utf-8")
    config = replace(PRESETS["digits-resnet8"], epochs=2 * epochs, seed=seed)
    splits = digits()

    _chapter(1, f"PyTorch: train a small ResNet for {epochs} epochs on {len(splits.train)} handwritten digits")
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # layers this small gain nothing from a second thread, and lose much when the other core is busy
    module = torch_ref.ResNet(**asdict(config.model))
    optimizer, scheduler, steps = _train_torch(module, config, splits, epochs)
    checkpoint = out / "digits.pth"
    torch_ref.training.save_checkpoint(checkpoint, module, optimizer, scheduler, epoch=epochs, step=steps)
    torch_before = _evaluate_torch(module, splits)
    output.print(f"test accuracy {torch_before.accuracy:.2%}; saved {checkpoint}")

    _chapter(2, "inspect the checkpoint")
    _command(inspect(checkpoint, ReadingFlags()), f"inspect {checkpoint}")
    _chapter(3, "convert it to Flax")
    converted = out / "digits_flax"
    _command(convert(checkpoint, converted, ReadingFlags()), f"convert {checkpoint} {converted}")
    _chapter(4, "verify: both frameworks side by side, every slot, gradients too")
    report = out / "verification.html"
    flags = (InputFlags(height=9, width=8), WhatFlags(gradients=True), DeviceFlags(), ReportFlags(html=report))
    status = verify(ReadingFlags(), *flags, checkpoint)
    _command(status, f"verify {checkpoint} --height 9 --width 8 --gradients --html {report}")

    _chapter(5, f"JAX: go on training for {epochs} epochs, from the converted weights")
    jax_after = _train_jax(converted, config, splits, epochs, out / "digits_trained")
    output.print(f"test accuracy {torch_before.accuracy:.2%} -> {jax_after.accuracy:.2%}")

    _chapter(6, "convert back, and load it in PyTorch")
    back = out / "digits_trained.pth"
    _command(convert(out / "digits_trained", back, ReadingFlags()), f"convert {out / 'digits_trained'} {back}")
    module = torch_ref.ResNet(**asdict(config.model))
    module.load_state_dict(torch.load(back, weights_only=True), strict=True)
    same = _compare_predictions(_evaluate_torch(module, splits), jax_after)
    output.print(f"\n[bold]Done[/] in {time.perf_counter() - started:.0f} s. The files are in {out.resolve()}", soft_wrap=True)
    return 0 if same and status == 0 else 1


def _chapter(number: int, title: str) -> None:
    output.print()
    output.rule(f"[bold]{number}. {title}[/]", align="left")


def _command(status: int, line: str) -> None:
    """Tells how to do the same by hand."""
    output.print(f"  by hand: flax-resblock {line}", style="dim", markup=False, soft_wrap=True)
    if status == 2:
        raise InputError(f"flax-resblock {line} failed.")


def _train_torch(module: Any, config: Any, splits: Splits, epochs: int) -> tuple[Any, Any, int]:
    """Trains with torch_ref's loop on the batches that the JAX loop would see; returns optimizer, scheduler and the number of steps."""
    import torch

    from torch_ref import training
    from train.data import batches, steps_per_epoch
    from train.progress import TrainingProgress

    steps = steps_per_epoch(splits.train, config.batch_size)
    optimizer = training.sgd(module, config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov)
    scheduler = training.warmup_cosine(
        optimizer, warmup_steps=round(config.warmup_epochs * steps), total_steps=config.epochs * steps, warmup_factor=config.warmup_factor
    )

    def in_torch(epoch: int) -> Iterator[tuple[Any, Any]]:
        for batch in batches(splits.train, config.batch_size, seed=config.seed, epoch=epoch):
            yield torch.from_numpy(np.moveaxis(batch.images, -1, 1).copy()), torch.from_numpy(batch.labels.astype(np.int64))

    with TrainingProgress(epochs * steps * config.batch_size, config.epochs, shown=True) as bar:
        for epoch in range(epochs):
            training.train(
                module,
                in_torch(epoch),
                optimizer,
                scheduler,
                first_step=epoch * steps,
                on_step=lambda step, epoch=epoch: bar.advance(config.batch_size, epoch=epoch, loss=step.loss, accuracy=step.accuracy),
            )
    return optimizer, scheduler, epochs * steps


def _evaluate_torch(module: Any, splits: Splits) -> Any:
    import torch

    from torch_ref import training

    images = torch.from_numpy(np.moveaxis(splits.test.normalised(), -1, 1).copy())
    return training.evaluate(module, images, torch.from_numpy(splits.test.labels.astype(np.int64)))


def _train_jax(converted: Path, config: Any, splits: Splits, done: int, out: Path) -> Any:
    """Goes on from the converted checkpoint, learning rate and order of the images included; saves the result and evaluates it."""
    import flax_resblock
    from train import evaluate, fit

    model = flax_resblock.load(converted)
    fit(model, splits.train, config, start_epoch=done)
    flax_resblock.save(model, out)
    output.print(f"learning rate and order of the images went on, momentum started at zero; saved {out}", soft_wrap=True)
    return evaluate(model, splits.test.normalised(), splits.test.labels)


def _compare_predictions(torch_side: Any, jax_side: Any) -> bool:
    """Prints both test accuracies and how far the logits are apart; whether every prediction agrees."""
    torch_logits, jax_logits = torch_side.logits.numpy().astype(np.float64), np.asarray(jax_side.logits, np.float64)
    agree = int(np.sum(torch_side.predictions.numpy() == np.asarray(jax_side.predictions)))
    distance = float(np.linalg.norm(torch_logits - jax_logits) / np.linalg.norm(jax_logits))
    output.print(f"  test accuracy in JAX      {jax_side.accuracy:.2%}")
    output.print(f"  test accuracy in PyTorch  {torch_side.accuracy:.2%}")
    output.print(f"  same prediction on {agree} of {len(jax_logits)} test images; logits differ by {distance:.1e} relative (float32)")
    return agree == len(jax_logits)
