"""What it costs the host to start a training step: the state as a flat list of arrays, as
:class:`flax_resblock.training.step.Leaves` hands it over, and as nnx's variables.

    python benchmarks/dispatch.py [--architecture resnet18_cifar] [--rounds 30]

Each call is timed until it returns, not until the step is computed; the step before has been waited
for. The images are small, so that little is computed."""

from __future__ import annotations

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_resblock
from flax_resblock.training.pace import Rates
from flax_resblock.training.state import Leaves, split
from flax_resblock.training.step import make_train_step


def main() -> None:
    """Prints both medians, of interleaved calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    known = flax_resblock.architectures()
    parser.add_argument("--architecture", default="resnet18_cifar", choices=known, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    model = flax_resblock.create(options.architecture, num_classes=10, rngs=nnx.Rngs(0))
    optimizer = optax.with_extra_args_support(optax.sgd(0.01, momentum=0.9))
    graphdef, state = split(model, optimizer)
    step, leaves = make_train_step(graphdef, optimizer), Leaves(split(model, optimizer)[1])
    images = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)
    labels = jnp.arange(2)
    rates = Rates(np.zeros(1, np.float32))
    seconds: dict[str, list[float]] = {"flat list of arrays": [], "nnx variables": []}
    for _ in range(options.rounds + 2):
        for name, times in seconds.items():
            start = time.perf_counter()
            if name == "nnx variables":
                state, metrics = step(state, images, labels, rates)
            else:
                metrics = step.advance(leaves, images, labels, rates)
            times.append(time.perf_counter() - start)
            jax.block_until_ready((metrics, leaves.arrays))
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times[2:], n=4)
        print(f"{name:20} {1e3 * middle:6.2f} ms [{1e3 * low:.2f} .. {1e3 * high:.2f}]")


if __name__ == "__main__":
    main()
