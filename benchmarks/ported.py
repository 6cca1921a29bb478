"""A ported resnet50 against the library's own: time per training step and per prediction.

    python benchmarks/ported.py [--size 224] [--batch 8] [--rounds 9]

Both hold the same weights and are compiled with the same options; times are medians of interleaved
rounds. The number of floating-point operations that XLA counts in both programs is printed, too."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import flax_resblock
from flax_resblock.config import architecture
from flax_resblock.cpu.switch import compiler_options
from torch_ref import ResNet


def compiled(model: nnx.Module, x: jax.Array, train: bool) -> tuple[Any, tuple[Any, ...]]:
    """A program of one training step of SGD, or of a prediction, and its arguments."""
    (model.train if train else model.eval)()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        network: Any = nnx.merge(graphdef, params, rest, copy=True)
        value = -jnp.mean(jax.nn.log_softmax(network(x))[:, 7])
        return value, nnx.state(network, nnx.Not(nnx.Param))

    def step(params: Any, rest: Any, x: jax.Array) -> Any:
        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params, rest, x)
        return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients), rest

    def predict(params: Any, rest: Any, x: jax.Array) -> Any:
        network: Any = nnx.merge(graphdef, params, rest, copy=True)
        return network(x)

    program = jax.jit(step if train else predict, compiler_options=dict(compiler_options()))
    return program.lower(params, rest, x).compile(), (params, rest, x)


def main() -> None:
    parser = argparse.ArgumentParser(description="A ported resnet50 against the library's.")
    parser.add_argument("--size", type=int, default=224, help="Height and width of the images.")
    parser.add_argument("--batch", type=int, default=8, help="Images in a batch.")
    parser.add_argument("--rounds", type=int, default=9, help="Interleaved rounds.")
    given = parser.parse_args()
    module = ResNet(**asdict(architecture("resnet50"))).eval()
    models = {
        "ported": flax_resblock.port(module, expand=True).create(),
        "library": flax_resblock.from_torch(module),
    }
    shape = (given.batch, given.size, given.size, 3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    for train in (True, False):
        programs = {name: compiled(model, x, train) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(given.rounds + 1):
            for name, (program, arguments) in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(*arguments))
                times[name].append(time.perf_counter() - start)
        ported, library = (statistics.median(times[name][1:]) for name in programs)
        flops = [program.cost_analysis()["flops"] for program, _ in programs.values()]
        print(
            f"{'training step' if train else 'prediction'}: ported {ported:.3f} s, library "
            f"{library:.3f} s, ratio {ported / library:.3f}; {flops[0] / flops[1]:.3f} times the "
            f"floating-point operations"
        )


if __name__ == "__main__":
    main()
