"""What folding the batch norms into the convolutions gains: time of inference, interleaved in one
run, and the error against float64.

    python benchmarks/fold.py [--architecture resnet18] [--batch 8] [--image-size 224] [--rounds 15]

Times are medians with quartiles, on jax's default device."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.export.fold import fold_batch_norm, folding_error
from flax_resblock.export.stablehlo import forward_of, weights_of
from flax_resblock.nn.norm import BatchNorm
from flax_resblock.nn.resnet import Model, create


def random_model(name: str) -> Model:
    """The architecture with random weights and statistics, in evaluation mode."""
    model, rng = create(name, rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, BatchNorm):
            for variable, values in (
                (norm.mean, rng.normal(0, 0.3, norm.num_features)),
                (norm.var, rng.uniform(0.5, 2, norm.num_features)),
                (norm.scale, rng.uniform(0.5, 1.5, norm.num_features)),
                (norm.bias, rng.normal(0, 0.2, norm.num_features)),
            ):
                variable.set_value(jnp.asarray(values, jnp.float32))
    model.eval()
    return model


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--architecture", default="resnet18")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    model = random_model(options.architecture)
    folded = fold_batch_norm(model)
    shape = options.batch, options.image_size, options.image_size, 3
    images = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    runs: dict[str, Callable[[], object]] = {}
    for name, one in (("as trained", model), ("folded", folded)):
        forward, weights = jax.jit(forward_of(one)), jax.device_put(weights_of(one))
        with jax.default_matmul_precision("highest"):
            compiled = forward.lower(weights, images).compile()
        runs[name] = lambda compiled=compiled, weights=weights: compiled(
            weights, images
        ).block_until_ready()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(options.rounds + 1):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    base = statistics.median(times["as trained"])
    print(
        f"{options.architecture}, batch {options.batch}, {options.image_size} pixels, "
        f"{jax.devices()[0].device_kind}"
    )
    print(f"median of {options.rounds} interleaved rounds [quartiles]")
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(
            f"  {name:<12}{middle * 1e3:8.1f} ms [{low * 1e3:.1f} .. {high * 1e3:.1f}]  "
            f"{base / middle:5.2f} x as fast"
        )
    errors = folding_error(model, folded, options.image_size)
    print(
        f"  relative error against float64: folded {errors['folded']:.1e}, unfolded "
        f"{errors['unfolded']:.1e}"
    )


if __name__ == "__main__":
    main()
