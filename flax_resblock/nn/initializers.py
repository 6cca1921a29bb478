"""PyTorch's weight initialisations, for Flax kernels.

Flax's own defaults differ from PyTorch's (``lecun_normal``, truncated), so networks trained from
scratch would start from another distribution.

numpy draws the values on the host. jax would compile a program for the size of every kernel, which
takes 6 CPU seconds for a resnet50; drawing its values takes 0.3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

Initializer = Callable[[Any, Sequence[int], Any], jax.Array]
InitName = Literal["torch_default", "kaiming_fan_out"]

_BLOCK = 1 << 18
"""Values that one stream of random numbers gives; the next block has a stream of its own, so that
several threads draw a large kernel."""
_ALIGNMENT = 64
"""Bytes of the boundary on which an array must begin for jax to take it over without a copy."""


@dataclass(frozen=True)
class Random:
    """Independent random values with mean 0: an initialiser, called with ``(key, shape, dtype)``.

    They depend on the key, the shape and the dtype alone: neither on the devices nor on whether
    code is traced. A program that jax compiles gets them by a callback to the host.

    Attributes:
      kind: ``"uniform"`` between minus and plus the scale, or ``"normal"`` with the scale as its
        standard deviation, not truncated.
      scale: Called with the shape.
    """

    kind: Literal["uniform", "normal"]
    scale: Callable[[Sequence[int]], float]

    def __call__(self, key: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Fresh values for a key of ``jax.random``."""
        return self.seeded(jax.random.key_data(key), shape, dtype)

    def seeded(self, words: Any, shape: Sequence[int], dtype: Any) -> jax.Array:
        """Fresh values for a seed of several uint32 ``words``, an array or a tracer."""
        shape, dtype = tuple(shape), jnp.dtype(dtype)
        draw = partial(self._on_host, shape, dtype)
        if isinstance(words, Tracer):
            result = jax.ShapeDtypeStruct(shape, dtype)
            return jax.pure_callback(draw, result, words, vmap_method="broadcast_all")
        return jax.device_put(draw(words), may_alias=True)

    def _on_host(self, shape: tuple[int, ...], dtype: np.dtype, words: Any) -> np.ndarray:
        words = np.asarray(words)
        if words.ndim > 1:  # of a function under vmap
            return np.stack([self._on_host(shape, dtype, each) for each in words])
        size, scale = math.prod(shape), self.scale(shape)
        wide: Any = np.float64 if dtype == np.float64 else np.float32
        bytes_ = size * np.dtype(wide).itemsize
        raw = np.empty(bytes_ + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        values = raw[start : start + bytes_].view(wide)

        def fill(block: int) -> None:
            part: Any = values[block * _BLOCK : (block + 1) * _BLOCK]
            seed = np.random.SeedSequence([*words.tolist(), block])
            stream = np.random.Generator(np.random.SFC64(seed))
            if self.kind == "normal":
                stream.standard_normal(out=part, dtype=wide)
                part *= wide(scale)
            else:
                stream.random(out=part, dtype=wide)
                part *= wide(2 * scale)
                part -= wide(scale)

        blocks = range(-(-size // _BLOCK))
        if len(blocks) == 1:
            fill(0)
        else:
            with ThreadPoolExecutor(min(len(blocks), os.cpu_count() or 1)) as pool:
                list(pool.map(fill, blocks))
        return values.reshape(shape).astype(dtype, copy=False)


torch_default = Random("uniform", lambda shape: math.prod(shape[:-1]) ** -0.5)
"""``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``, as ``nn.Conv2d`` and ``nn.Linear`` start."""

kaiming_fan_out = Random("normal", lambda shape: (2 / (math.prod(shape[:-2]) * shape[-1])) ** 0.5)
"""``N(0, 2/fan_out)``, not truncated: ``kaiming_normal_(mode='fan_out', nonlinearity='relu')``,
torchvision's choice (He et al. 2015, arXiv:1502.01852)."""

INITIALIZERS = {"torch_default": torch_default, "kaiming_fan_out": kaiming_fan_out}


def uniform_bias(fan_in: int) -> Random:
    """``U(-1/sqrt(fan_in), 1/sqrt(fan_in))`` for a bias, as ``nn.Linear`` draws it; ``fan_in`` is
    the number of inputs of its layer."""
    return Random("uniform", lambda shape: fan_in**-0.5)


def initial_value(
    init: Initializer | float, rngs: nnx.Rngs | None, shape: Sequence[int], dtype: Any
) -> Any:
    """A fresh array, or only its shape and dtype when ``rngs`` is None.

    A module built with ``rngs=None`` is abstract: it costs no arithmetic and no memory, and the
    converter fills it.

    Args:
      init: How to draw it, from the ``params`` stream; a number is the value of every element.
      rngs: The random streams.
    """
    if rngs is None:
        return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
    if isinstance(init, int | float):
        return jax.device_put(np.full(shape, init, dtype))
    if isinstance(init, Random):
        return init.seeded(_next_seed(rngs.params), shape, dtype)
    return init(rngs.params(), shape, dtype)


def parameter(
    init: Initializer | float,
    rngs: nnx.Rngs | None,
    shape: Sequence[int],
    dtype: Any,
    wanted: bool = True,
) -> Any:
    """A parameter with an :func:`initial_value`; None where it is not wanted."""
    return nnx.Param(initial_value(init, rngs, shape, dtype)) if wanted else None


def _next_seed(stream: nnx.RngStream) -> Any:
    """Words that tell all draws from a stream apart: those of its key, and its counter, which goes
    on. ``stream()`` gives a key of the same meaning, but compiles two programs for the first one.
    """
    key, count = jax.random.key_data(stream.key[...]), stream.count[...]
    traced = isinstance(key, Tracer) or isinstance(count, Tracer)
    if traced:
        stream.count.set_value(count + 1)
        return jnp.append(key, count)
    count = np.asarray(count)
    stream.count.set_value(jax.device_put(count + np.uint32(1)))
    return np.append(np.asarray(key), count)
