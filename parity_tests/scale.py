"""A short run on the devices of this process, or of several processes, written to a file; the tests
compare such files.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m parity_tests.scale OUT.npz
[--batch-norm global|replica] [--coordinator HOST:PORT ...]"""

from __future__ import annotations

import argparse
from dataclasses import replace

import jax
import numpy as np
from flax import nnx

from flax_resblock import to_torch
from flax_resblock.config import ResNetConfig
from flax_resblock.training import TrainConfig, cluster, data_mesh, fit, new_model
from flax_resblock.training.data import Augmentation, DataSource, digits
from flax_resblock.training.devices import Placement
from flax_resblock.training.evaluation import evaluate_source

CONFIG = TrainConfig(
    model=ResNetConfig(
        depths=(1, 1), widths=(8, 12), stem="cifar", stem_width=8, in_channels=1, num_classes=10
    ),
    steps=20,
    batch_size=32,
    learning_rate=0.05,
    warmup_steps=5,
    augmentation=Augmentation(pad=1, flip=True),
    seed=3,
    dtype="float64",
)
"""Twenty steps in float64."""


def start_model(config: TrainConfig = CONFIG):
    """The network with random statistics: no test can pass by leaving them at zero and one."""
    model = new_model(config)
    rng = np.random.default_rng(7)
    stats = nnx.state(model, nnx.BatchStat)

    def drawn(leaf):
        return np.asarray(rng.uniform(0.3, 2.0, leaf.shape), leaf.dtype) if leaf.ndim else leaf

    nnx.update(model, jax.tree.map(drawn, stats))
    return model


def images() -> tuple[DataSource, DataSource]:
    """Digits; 101 of them to judge by, which no number of devices divides."""
    train, test = digits()
    return train, replace(test, images=test.images[:101], labels=test.labels[:101])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out")
    parser.add_argument("--batch-norm", choices=("global", "replica"), default="global")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--mixup", type=float, default=0.0)
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cluster.connect(cluster.Cluster(options.coordinator, options.num_processes, options.process_id))
    augmentation = replace(CONFIG.augmentation, mixup=options.mixup)
    config = replace(
        CONFIG,
        batch_norm=options.batch_norm,
        accumulate=options.accumulate,
        augmentation=augmentation,
        ema=0.9,
        clip_norm=1.0,
    )
    train, test = images()
    model, mesh = start_model(config), data_mesh()
    history = fit(model, train, config, mesh=mesh, progress=False)
    found = evaluate_source(model, test, placement=Placement(mesh), batch_size=24)
    assert history.run is not None
    averaged = {f"ema/{'.'.join(map(str, path))}": value for path, value in history.run.ema.items()}
    losses = np.array([step.loss for step in history.steps])
    if jax.process_index() == 0:
        np.savez(
            options.out,
            **to_torch(model),
            **averaged,
            losses=losses,
            logits=found.logits,
            devices=mesh.size,
        )
    cluster.leave()


if __name__ == "__main__":
    main()
