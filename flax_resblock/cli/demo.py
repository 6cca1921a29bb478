"""``flax-resblock demo``: the whole story on real data."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_resblock.cli.common import ReadingFlags, RunFlags, output, print_found, say
from flax_resblock.cli.convert import convert
from flax_resblock.cli.inspect import inspect
from flax_resblock.cli.verify import verify
from flax_resblock.cli.verify_flags import DeviceFlags, InputFlags, ReportFlags, WhatFlags
from flax_resblock.errors import InputError, MissingDependencyError
from flax_resblock.training.config import RESNET8_DIGITS

if TYPE_CHECKING:
    from flax_resblock.training.data.dataset import Splits

DONE = "demo.txt"
"""Marks a folder as the output of a demo, which the next one may replace."""


def demo(out: Path = Path("demo_out"), epochs: int = 3, seed: int = 0) -> int:
    """Shows everything on real data in under two minutes: trains a network on handwritten digits in
    PyTorch and saves a .pth; inspects, converts and verifies it; continues training in both
    frameworks from the same checkpoint, momentum and schedule included; converts back to a .pth;
    and shows how close both ended.

    For example:

      flax-resblock demo

    Needs the extras: pip install 'flax-resblock[torch,train]'.

    Args:
      out: Folder for the files; that of an earlier demo is replaced.
      epochs: Epochs in each framework.
      seed: Seed of the weights and of the order of the images.
    """
    if epochs < 1:
        raise InputError(f"--epochs {epochs} must be at least 1.")
    if out.exists() and not (out.is_dir() and ((out / DONE).is_file() or not any(out.iterdir()))):
        raise InputError(
            f"{out} exists and is not the output of an earlier demo. Choose another folder "
            f"with --out."
        )
    try:
        import torch

        import torch_ref.training
        from flax_resblock.training import PRESETS
        from flax_resblock.training.data import digits
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs {error.name}, which is not installed: pip install "
            f"'flax-resblock[torch,train]'."
        ) from error

    started = time.perf_counter()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / DONE).write_text(
        "Files of `flax-resblock demo`. The next demo replaces this folder.\n", encoding="utf-8"
    )
    config = replace(PRESETS["digits-resnet8"], epochs=2 * epochs, learning_rate=0.05, seed=seed)
    splits = digits()

    subject = f"{len(splits.train)} handwritten digits"
    _chapter(1, f"PyTorch: train a small ResNet for {epochs} epochs on {subject}")
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # small layers lose time on a second thread if its core is busy
    module = torch_ref.ResNet(**asdict(RESNET8_DIGITS))
    optimizer, scheduler, steps = _train_torch(module, config, splits, epochs)
    checkpoint = out / "digits.pth"
    torch_ref.training.save_checkpoint(
        checkpoint, module, optimizer, scheduler, epoch=epochs - 1, step=steps
    )
    torch_before = _evaluate_torch(module, splits)
    output.print(f"test accuracy {torch_before.accuracy:.2%}; saved {checkpoint}")

    _chapter(2, "inspect the checkpoint")
    _command(inspect(checkpoint, ReadingFlags()), f"inspect {checkpoint}")
    _chapter(3, "convert it to Flax")
    converted = out / "digits_flax"
    _command(
        convert(checkpoint, converted, ReadingFlags(), RunFlags(with_optimizer=True)),
        f"convert {checkpoint} {converted} --with-optimizer",
    )
    _chapter(4, "verify: both frameworks side by side, every slot, gradients too")
    report = out / "verification.html"
    what, page = WhatFlags(gradients=True), ReportFlags(html=report)
    images = InputFlags(height=9, width=8)
    status = verify(ReadingFlags(), images, what, DeviceFlags(), page, checkpoint)
    _command(status, f"verify {checkpoint} --height 9 --width 8 --gradients --html {report}")

    _chapter(5, f"go on for {epochs} epochs in both, momentum and schedule included")
    torch_losses = _go_on_in_torch(module, config, splits, epochs, optimizer, scheduler)
    jax_losses, jax_after = _go_on_in_jax(converted, config, splits, out / "digits_trained")
    torch_after = _evaluate_torch(module, splits)
    losses = np.reshape([jax_losses, torch_losses], (2, epochs, -1))
    for epoch, (ours, theirs) in enumerate(losses.mean(-1).T, start=epochs + 1):
        output.print(f"  epoch {epoch}  mean loss in PyTorch {theirs:.6f}, in JAX {ours:.6f}")
    _plot_losses(torch_losses, jax_losses, out / "losses.png")
    output.print(
        f"test accuracy {torch_before.accuracy:.2%} -> {torch_after.accuracy:.2%} in PyTorch, "
        f"{jax_after.accuracy:.2%} in JAX"
    )
    apart = _distance(module, out / "digits_trained")
    say(
        f"after {len(jax_losses)} steps in float32 the weights and statistics differ by "
        f"{apart:.0e} relative, by rounding alone"
    )

    _chapter(6, "convert back, and load it in PyTorch")
    back = out / "digits_trained.pth"
    _command(
        convert(out / "digits_trained", back, ReadingFlags(), RunFlags(with_optimizer=True)),
        f"convert {out / 'digits_trained'} {back} --with-optimizer",
    )
    module = torch_ref.ResNet(**asdict(RESNET8_DIGITS))
    saved = torch.load(back, weights_only=True)
    module.load_state_dict(saved["model"], strict=True)
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["lr_scheduler"])
    say(
        "model, optimizer and scheduler of PyTorch load it; the scheduler is at step "
        f"{scheduler.last_epoch}"
    )
    same = _compare_predictions(_evaluate_torch(module, splits), jax_after)
    output.print()
    output.print(
        f"[bold]Done[/] in {time.perf_counter() - started:.0f} s. The files are in {out.resolve()}",
        soft_wrap=True,
    )
    return 0 if same and status == 0 else 1


def _chapter(number: int, title: str) -> None:
    output.print()
    output.rule(f"[bold]{number}. {title}[/]", align="left")


def _command(status: int, line: str) -> None:
    """Shows the command line that does the same."""
    say(f"  by hand: flax-resblock {line}", "dim")
    if status == 2:
        raise InputError(f"flax-resblock {line} failed.")


def _train_torch(module: Any, config: Any, splits: Splits, epochs: int) -> tuple[Any, Any, int]:
    """Trains on the batches of the JAX loop; returns optimizer, scheduler and number of steps."""
    from flax_resblock.training.data import steps_per_epoch
    from flax_resblock.training.progress import TrainingProgress
    from torch_ref import training

    steps = steps_per_epoch(splits.train, config.batch_size)
    optimizer = training.sgd(
        module,
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    scheduler = training.warmup_cosine(
        optimizer,
        warmup_steps=round(config.warmup_epochs * steps),
        total_steps=config.epochs * steps,
        warmup_factor=config.warmup_factor,
    )
    with TrainingProgress(epochs * steps * config.batch_size, config.epochs, shown=True) as bar:
        for epoch in range(epochs):
            training.train(
                module,
                _for_torch(config, splits, epoch),
                optimizer,
                scheduler,
                first_step=epoch * steps,
                on_step=lambda step, epoch=epoch: bar.advance(
                    config.batch_size, epoch=epoch, loss=step.loss, accuracy=step.accuracy
                ),
            )
    return optimizer, scheduler, epochs * steps


def _for_torch(config: Any, splits: Splits, epoch: int) -> Iterator[tuple[Any, Any]]:
    """The batches of the JAX loop, as tensors."""
    import torch

    from flax_resblock.training.data import batches

    for batch in batches(splits.train, config.batch_size, seed=config.seed, epoch=epoch):
        images = torch.from_numpy(np.moveaxis(batch.images, -1, 1).copy())
        yield images, torch.from_numpy(batch.labels.astype(np.int64))


def _evaluate_torch(module: Any, splits: Splits) -> Any:
    import torch

    from torch_ref import training

    images = torch.from_numpy(np.moveaxis(splits.test.normalised(), -1, 1).copy())
    return training.evaluate(module, images, torch.from_numpy(splits.test.labels.astype(np.int64)))


def _go_on_in_torch(
    module: Any, config: Any, splits: Splits, done: int, optimizer: Any, scheduler: Any
) -> list[float]:
    """Continues the run in PyTorch; returns the loss of every step."""
    from torch_ref.training import train

    epochs = (_for_torch(config, splits, epoch) for epoch in range(done, config.epochs))
    steps = (step for batches in epochs for step in train(module, batches, optimizer, scheduler))
    return [step.loss for step in steps]


def _go_on_in_jax(
    checkpoint: Path, config: Any, splits: Splits, out: Path
) -> tuple[list[float], Any]:
    """Continues the run in JAX, saves it and evaluates it; returns the loss of every step too."""
    import flax_resblock
    from flax_resblock.training import evaluate, fit

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the demo wrote this file itself
        model, run = flax_resblock.load_run(checkpoint)
    print_found(run)
    history = fit(model, splits.train, config, run=run)
    flax_resblock.save(model, out, run=history.run)
    evaluation = evaluate(model, splits.test.normalised(), splits.test.labels)
    return [step.loss for step in history.steps], evaluation


def _distance(module: Any, trained: Path) -> float:
    """The largest relative difference of a tensor between the networks of PyTorch and JAX."""
    import flax_resblock

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        ours = flax_resblock.to_torch(flax_resblock.load(trained))
    theirs = {key: value.numpy().astype(np.float64) for key, value in module.state_dict().items()}
    norm = np.linalg.norm
    return max(float(norm(ours[key] - value) / norm(value)) for key, value in theirs.items())


def _plot_losses(torch_losses: list[float], jax_losses: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(torch_losses, label="PyTorch", linewidth=3, alpha=0.4)
    axes.plot(jax_losses, label="JAX", linewidth=1)
    title = "One run, continued in both frameworks"
    axes.set(xlabel="step after the hand-over", ylabel="loss", title=title)
    axes.legend()
    figure.savefig(path, dpi=120)
    say(f"both loss curves: {path}")


def _compare_predictions(torch_side: Any, jax_side: Any) -> bool:
    """Prints accuracies and the distance of the logits; returns whether predictions agree."""
    torch_logits = torch_side.logits.numpy().astype(np.float64)
    jax_logits = np.asarray(jax_side.logits, np.float64)
    agree = int(np.sum(torch_side.predictions.numpy() == np.asarray(jax_side.predictions)))
    distance = float(np.linalg.norm(torch_logits - jax_logits) / np.linalg.norm(jax_logits))
    output.print(f"  test accuracy in JAX      {jax_side.accuracy:.2%}")
    output.print(f"  test accuracy in PyTorch  {torch_side.accuracy:.2%}")
    output.print(
        f"  same prediction on {agree} of {len(jax_logits)} test images; logits differ by "
        f"{distance:.1e} relative (float32)"
    )
    return agree == len(jax_logits)
