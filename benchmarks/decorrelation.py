"""How long float32 runs stay together, in either framework: `python benchmarks/decorrelation.py
[PICTURE]`.

A resnet20 on the digits, trained in float64 by PyTorch (the truth), and in float32 by PyTorch, by
PyTorch with the first batch moved by one unit in the last place, and by JAX; all from the same
float32 weights, with the same batches. Printed and plotted is the relative distance of all
parameters."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flax import nnx
from matplotlib.figure import Figure

import flax_resblock
from flax_resblock import ResNetConfig
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.runs.optimizer_state import fresh_optimizer
from flax_resblock.runs.optimizers import optimizer_of
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState
from flax_resblock.runs.schedules import warmup_cosine
from flax_resblock.training.data import batches, digits
from flax_resblock.training.pace import Pace
from flax_resblock.training.state import split
from flax_resblock.training.step import make_train_step
from torch_ref import ResNet, training

CONFIG = ResNetConfig(
    depths=(3, 3, 3),
    widths=(16, 32, 64),
    stem="cifar",
    stem_width=16,
    in_channels=1,
    num_classes=10,
)
STEPS, BATCH, WARMUP = 300, 32, 30
SHOWN = (1, 3, 10, 30, 100, 300)


SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "adamw": {"lr": 1e-3, "weight_decay": 0.05},
}
TITLES = {
    "sgd": "SGD with Nesterov momentum, learning rate 0.05",
    "adamw": "AdamW, learning rate 0.001",
}


def data() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    every = (batches(digits().train, BATCH, seed=0, epoch=epoch) for epoch in itertools.count())
    for batch in itertools.islice(itertools.chain.from_iterable(every), STEPS):
        yield batch.images, batch.labels


def module(kind: str, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """Network, optimizer and scheduler of PyTorch; kernels decay, biases and norms do not."""
    torch.manual_seed(0)
    model = ResNet(**asdict(CONFIG)).to(dtype)
    kernels, rest = (
        [p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False)
    )
    made = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[kind]
    optimizer = made([{"params": kernels}, {"params": rest, "weight_decay": 0.0}], **SETTINGS[kind])
    schedule = training.warmup_cosine(optimizer, warmup_steps=WARMUP, total_steps=STEPS)
    return model, optimizer, schedule


def in_torch(kind: str, dtype: torch.dtype, *, nudged: bool = False) -> Iterator[np.ndarray]:
    """All parameters in one vector, after every step."""
    model, optimizer, scheduler = module(kind, dtype)
    for number, (images, labels) in enumerate(data()):
        if nudged and number == 0:
            up = np.random.default_rng(0).integers(0, 2, images.shape)
            images = np.nextafter(images, np.where(up, np.inf, -np.inf).astype(images.dtype))
        x = torch.from_numpy(np.moveaxis(images, -1, 1).copy()).to(dtype)
        batch = x, torch.from_numpy(labels.astype(np.int64))
        training.train(model, [batch], optimizer, scheduler)
        values = [parameter.detach().numpy().ravel() for parameter in model.parameters()]
        yield np.concatenate([value.astype(np.float64) for value in values])


def in_jax(kind: str) -> Iterator[np.ndarray]:
    """The same in JAX, in float32."""
    reference, _, _ = module(kind, torch.float32)
    model = flax_resblock.from_torch(reference)
    assert isinstance(model, flax_resblock.ResNet)
    record = fresh_optimizer(kind, StateMap(CONFIG, NAMINGS["torchvision"]), **SETTINGS[kind])
    pace = Pace.of(Run(record, ScheduleState(warmup_cosine(WARMUP, STEPS), 0), 0), STEPS)
    optimizer = optimizer_of(record)
    graphdef, state = split(model, optimizer)
    step = make_train_step(graphdef, optimizer)
    for number, (images, labels) in enumerate(data()):
        state, _ = step(state, images, labels, pace.rates(number))
        nnx.update(model, state.params, state.stats)
        values = flax_resblock.to_torch(model)
        yield np.concatenate(
            [values[name].ravel().astype(np.float64) for name, _ in reference.named_parameters()]
        )


def distances(kind: str) -> dict[str, np.ndarray]:
    """Relative distance by step."""
    runs = zip(
        in_torch(kind, torch.float64),
        in_torch(kind, torch.float32),
        in_torch(kind, torch.float32, nudged=True),
        in_jax(kind),
        strict=True,
    )
    rows = []
    for truth, theirs, nudged, ours in runs:
        pairs = ((theirs, truth), (ours, truth), (nudged, theirs), (ours, theirs))
        rows.append([float(np.linalg.norm(a - b) / np.linalg.norm(truth)) for a, b in pairs])
    names = (
        "PyTorch float32 from float64",
        "JAX float32 from float64",
        "PyTorch from itself, one input off by 1 ulp",
        "JAX from PyTorch",
    )
    return dict(zip(names, np.array(rows).T, strict=True))


def main() -> None:
    torch.set_num_threads(1)
    picture = Path(sys.argv[1] if len(sys.argv) > 1 else "decorrelation.png")
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), SETTINGS, strict=True):
        found = distances(kind)
        print(f"{TITLES[kind]}\n  {'step':<46}" + "".join(f"{step:>9}" for step in SHOWN))
        for (name, values), style in zip(found.items(), ("-", "--", ":", "-."), strict=True):
            axes.semilogy(range(1, STEPS + 1), values, style, label=name, linewidth=1.6)
            print(f"  {name:<46}" + "".join(f"{values[step - 1]:9.0e}" for step in SHOWN))
        axes.set(title=TITLES[kind], xlabel="step")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("relative distance of all parameters")
    figure.axes[0].legend(loc="lower right")
    figure.savefig(picture, dpi=110)
    print(f"wrote {picture}")


if __name__ == "__main__":
    main()
