"""What GPUs can compute at most, and what a network asks of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.bench.cases import BenchCase, Precision
from flax_resblock.bench.worker import config_of
from flax_resblock.cpu.switch import conv_lowering
from flax_resblock.nn.resnet import build

_HOPPER = {"bfloat16": 989e12, "tf32": 494e12, "float32": 67e12}

PEAKS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "H200": _HOPPER,
        "H100": _HOPPER,
        "A100": {"bfloat16": 312e12, "tf32": 156e12, "float32": 19.5e12},
        "L4": {"bfloat16": 121e12, "tf32": 60e12, "float32": 30.3e12},
    }
)
"""FLOP/s of dense products, by a word of the device's name and by precision, from NVIDIA's data
sheets of the SXM boards (of the L4: PCIe)."""


def peak_of(device: str, precision: Precision) -> float | None:
    """The peak of a device by its name, such as ``"NVIDIA H200"``; None if it is not known."""
    words = re.findall(r"\w+", device)
    found = next((peaks for word, peaks in PEAKS.items() if word in words), None)
    return None if found is None else found[precision]


def flops(case: BenchCase) -> int:
    """The FLOPs of one repetition as docs/scaling.md counts them: two per multiplication and
    addition of every convolution and matrix product, padding included. A training step has three
    times those of the forward pass, less the gradient of the images."""
    config = config_of(case)
    graphdef, variables = nnx.split(build(config, rngs=None))

    def forward(variables: Any, images: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, variables)(images, use_running_average=True)

    shape = case.batch, case.image_size, case.image_size, config.in_channels
    with conv_lowering("xla"):
        traced = jax.make_jaxpr(forward)(variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    first, *others = _products(traced.jaxpr)
    return 3 * sum(others) + 2 * first if case.what == "train-step" else first + sum(others)


def _products(program: Any) -> Iterator[int]:
    """The FLOPs of every convolution and product, in order."""
    for equation in program.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            yield 2 * out.size * kernel.size // kernel.shape[-1]
        elif equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            operand = equation.invars[0].aval
            yield 2 * out.size * math.prod(operand.shape[i] for i in contracted)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _products(inner)
