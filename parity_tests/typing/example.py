# pyright: strict, reportUnknownMemberType=false
"""A user's program: everything public in one run, as a type checker and as a reader see it.

``make lint`` checks it in pyright's strict mode, but for the types that torch and flax leave out of
their own functions; ``parity_tests/test_public_surface.py`` checks it too, and runs it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from flax import nnx

import flax_resblock
from flax_resblock import NAMINGS, Limits, Naming, ResNet, ResNetConfig, Run, parity
from flax_resblock.convert import StateMap
from flax_resblock.training import TrainConfig, fit
from flax_resblock.training.data import Dataset
from torch_ref import ResNet as TorchResNet

CONFIG = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=3)
OWN = Naming(
    name="own",
    stage="group{stage}.unit{block}",
    modules={
        "stem.conv": "first.conv",
        "stem.norm": "first.bn",
        "conv1": "a.conv",
        "norm1": "a.bn",
        "conv2": "b.conv",
        "norm2": "b.bn",
        "head": "classifier",
    },
    origin="this program",
)


def images(count: int) -> Dataset:
    """Noise in three classes."""
    rng = np.random.default_rng(0)
    return Dataset(
        name="noise",
        images=rng.integers(0, 256, (count, 8, 8, 3), np.uint8),
        labels=rng.integers(0, 3, count).astype(np.int32),
        num_classes=3,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
    )


def train(folder: Path) -> Path:
    """Trains a fresh network for two steps and saves it with its run."""
    model = ResNet(CONFIG, rngs=nnx.Rngs(0))
    history = fit(
        model,
        images(16),
        TrainConfig(model=CONFIG, epochs=2, batch_size=8, warmup_epochs=0),
        progress=False,
    )
    flax_resblock.save(model, folder / "run.pth", run=history.run, naming=NAMINGS["kuangliu"])
    return folder / "run.pth"


def resume(path: Path) -> tuple[flax_resblock.ResNet, Run]:
    """Goes on with the run for another epoch."""
    model, run = flax_resblock.load_run(path, optimizer="sgd", naming="kuangliu", dtype=np.float32)
    assert isinstance(model, ResNet)
    config = TrainConfig(model=model.config, epochs=3, batch_size=8)
    history = fit(model, images(16), config, run=run, progress=False)
    params = cast(Any, nnx.state(model, nnx.Param))
    optimizer = flax_resblock.optimizer_of(run.optimizer)
    optimizer.init(params)
    assert history.run is not None
    return model, history.run


def main(folder: Path) -> bool:
    """The whole way; whether PyTorch computes what the trained network does."""
    network = flax_resblock.create("resnet20", num_classes=3, widths=(16, 16, 32), rngs=nnx.Rngs(0))
    assert network.config.widths == (16, 16, 32)
    model, run = resume(train(folder))
    flax_resblock.save(model, folder / "own.safetensors", naming=OWN, run=replace(run, ema={}))
    again = flax_resblock.load(
        folder / "own.safetensors", naming=OWN, limits=Limits(max_tensors=500)
    )
    state = {key: torch.from_numpy(value) for key, value in flax_resblock.to_torch(again).items()}
    reference = TorchResNet(
        depths=CONFIG.depths, widths=CONFIG.widths, stem="cifar", stem_width=4, num_classes=3
    )
    reference.load_state_dict(state)
    found = parity.compare(
        reference,
        again,
        np.random.default_rng(1).standard_normal((4, 8, 8, 3)),
        state_map=StateMap(CONFIG, "torchvision"),
        precisions=("float64",),
    )
    print(found)
    return found.passed
