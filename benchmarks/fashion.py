"""The preset ``fashion-resnet20`` in JAX and the same recipe in plain PyTorch: same initial
weights, same batches, each framework in a process of its own.

    python benchmarks/fashion.py [docs/fashion.png] [--data FOLDER] [--epochs N] [--seed N]

Prints both test accuracies after each epoch, and draws both curves."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from flax_resblock import to_torch
from flax_resblock.training import PRESETS, TrainConfig, fit, new_model
from flax_resblock.training.data import Stream, open_data, steps_per_epoch


def in_jax(config: TrainConfig) -> tuple[list[float], list[float]]:
    """Loss of every step, accuracy after every epoch."""
    train, test = open_data(config.data)
    history = fit(new_model(config), train, config, test=test)
    return [step.loss for step in history.steps], history.test_accuracy


def in_torch(config: TrainConfig) -> tuple[list[float], list[float]]:
    """The same from ``torch_ref``'s loop."""
    import torch

    from torch_ref import ResNet, training

    train, test = open_data(config.data)
    steps = steps_per_epoch(train, config.batch_size)
    model = ResNet(**asdict(new_model(config).config))
    model.load_state_dict(
        {key: torch.from_numpy(value) for key, value in to_torch(new_model(config)).items()}
    )
    optimizer = training.sgd(
        model,
        config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )
    scheduler = training.warmup_cosine(
        optimizer,
        warmup_steps=config.warmup(steps),
        total_steps=config.end(steps),
        warmup_factor=config.warmup_factor,
    )
    stream = Stream(
        train, config.batch_size, seed=config.seed, augmentation=config.augmentation
    ).from_step(0)

    def pair(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        nchw = images.transpose(0, 3, 1, 2).copy()
        return torch.from_numpy(nchw), torch.from_numpy(labels.astype(np.int64))

    images, labels = pair(test.normalised(), test.labels)
    losses, accuracies = [], []
    for epoch in range(config.epochs):
        of_epoch = (next(stream) for _ in range(steps))
        batches = (pair(b.images, b.labels) for b in of_epoch)
        done = training.train(model, batches, optimizer, scheduler, first_step=epoch * steps)
        losses += [step.loss for step in done]
        accuracies.append(training.evaluate(model, images, labels).accuracy)
        print(f"PyTorch, epoch {epoch + 1}: {accuracies[-1]:.2%}", file=sys.stderr, flush=True)
    return losses, accuracies


def draw(found: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Both curves: the loss as a mean over 100 steps, the test accuracy by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for (name, (losses, accuracies)), style in zip(found.items(), ("-", "--"), strict=True):
        width = min(100, len(losses))
        means = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        loss.plot(np.arange(width, len(losses) + 1), means, style, label=name)
        epochs, label = np.arange(1, len(accuracies) + 1), f"{name}: {accuracies[-1]:.2%}"
        accuracy.plot(epochs, 100 * accuracies, f"o{style}", label=label)
    loss.set(xlabel="steps", ylabel="training loss, mean of 100 steps", ylim=(0, 1))
    most = max(len(accuracies) for _, accuracies in found.values())
    accuracy.set(xlabel="epochs", ylabel="test accuracy, %", xticks=range(1, most + 1))
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("picture", nargs="?", default="docs/fashion.png")
    parser.add_argument("--data")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--side",
        choices=("jax", "torch"),
        help="only this side, its numbers into the file PICTURE, an .npz",
    )
    options = parser.parse_args()
    config = replace(PRESETS["fashion-resnet20"], seed=options.seed)
    data, epochs = options.data or config.data, options.epochs or config.epochs
    config = replace(config, data=data, epochs=epochs)
    if options.side:
        losses, accuracies = (in_jax if options.side == "jax" else in_torch)(config)
        np.savez(options.picture, losses=losses, accuracies=accuracies)
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, side in (("JAX", "jax"), ("PyTorch", "torch")):
            file = Path(folder) / f"{side}.npz"
            flags = ["--side", side, "--data", config.data, "--epochs", str(config.epochs)]
            flags += ["--seed", str(config.seed)]
            subprocess.run([sys.executable, __file__, str(file), *flags], check=True)
            with np.load(file) as archive:
                found[name] = archive["losses"], archive["accuracies"]
    draw(found, Path(options.picture))
    for name, (_, accuracies) in found.items():
        print(
            f"{name:<8} test accuracy by epoch: "
            f"{', '.join(f'{accuracy:.2%}' for accuracy in accuracies)}"
        )
    print(
        f"difference {abs(found['JAX'][1][-1] - found['PyTorch'][1][-1]) * 100:.2f} points; "
        f"wrote {options.picture}"
    )


if __name__ == "__main__":
    main()
