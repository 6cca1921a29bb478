"""oneDNN's own orders of a kernel in memory, and which of them it wants for a convolution."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_resblock.cpu.compiling import give_memory_back
from flax_resblock.cpu.onednn import ConvolutionSizes, not_kept

BLOCKS = (64, 32, 48, 16, 24, 8)
"""Numbers of output channels that lie beside each other in oneDNN's own orders of a kernel."""
TRIED_BYTES = 64 << 20
"""Bytes of inputs, kernels and outputs that :func:`orders_of` tries in one program."""

Case = tuple[ConvolutionSizes, tuple[int, ...]]
"""A convolution with ``block`` 0, and the shape of its input, ``(N, H, W, I)``."""


def reordered(kernel: Any, block: int, behind: float = 0.0) -> Any:
    """A kernel in one of oneDNN's orders, flat, with room behind it.

    The order is that of ``(O / block, kh, kw, I, block)``, where ``O`` is filled up with zeros.
    oneDNN fills up both channel axes to multiples of at most 64 in all its orders for float32; with
    the room behind it, the buffer is as long as the longest of them.

    Args:
      kernel: ``(kh, kw, I, O)`` of numpy or jax.
      block: One of :data:`BLOCKS`; 0 returns the kernel as it is.
      behind: The value of the room.
    """
    if not block:
        return kernel
    lib = np if isinstance(kernel, np.ndarray) else jnp
    height, width, inner, outer = kernel.shape
    kernel = lib.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, -outer % block)))
    flat = kernel.reshape(height, width, inner, -1, block).transpose(3, 0, 1, 2, 4).reshape(-1)
    most = [max(size + -size % each for each in BLOCKS) for size in (inner, outer)]
    room = height * width * most[0] * most[1] - flat.size
    return lib.pad(flat, (0, room), constant_values=behind)


def in_plain_order(flat: np.ndarray, shape: tuple[int, ...], block: int) -> np.ndarray:
    """The kernel of this shape that :func:`reordered` was given, bit for bit; ``block`` is not
    0."""
    height, width, inner, outer = shape
    parts = -(-outer // block)
    blocks = flat[: parts * height * width * inner * block]
    blocks = blocks.reshape(parts, height, width, inner, block).transpose(1, 2, 3, 0, 4)
    return blocks.reshape(height, width, inner, parts * block)[..., :outer]


def orders_of(cases: Iterable[Case]) -> dict[Case, ConvolutionSizes]:
    """The same convolutions with the orders in which oneDNN wants their kernels for these inputs,
    found by trying. oneDNN reorders a kernel in HWIO at each call.

    A kernel in the right order gives the same bits as one in HWIO, because oneDNN then computes the
    same; any other order gives other numbers. The values are whole numbers, so that sums are exact,
    and NaN behind them: an order that needs anything from there is not taken.
    """
    found: dict[Case, ConvolutionSizes] = {}
    together: list[Case] = []
    size = 0
    for case in cases:
        if case[0].groups > 1:
            found[case] = case[0]
            continue
        if together and size + _bytes(case) > TRIED_BYTES:
            found |= _tried_together(together)
            together, size = [], 0
        together.append(case)
        size += _bytes(case)
    return found | _tried_together(together)


def _bytes(case: Case) -> int:
    of, shape = case
    outputs = (shape[0], *of.size(*shape[1:3]), of.kernel[3])
    return 4 * sum(math.prod(size) for size in (shape, of.kernel, outputs))


def _tried_together(cases: Sequence[Case]) -> dict[Case, ConvolutionSizes]:
    """:func:`orders_of` by one program for each block, of those that no earlier block suits."""
    images = [jax.device_put(_whole_numbers(13, shape), may_alias=True) for _, shape in cases]
    weights = [_whole_numbers(251, of.kernel) for of, _ in cases]

    def outputs(block: int, which: Iterable[int]) -> dict[int, np.ndarray]:
        convolutions = {i: replace(cases[i][0], block=block) for i in which}

        def run(inputs: dict[int, tuple[jax.Array, jax.Array]]) -> dict[int, jax.Array]:
            return {i: convolutions[i](*both) for i, both in inputs.items()}

        inputs = {i: (images[i], reordered(weights[i], block, np.nan)) for i in convolutions}
        # nothing but the instructions: any other operation takes longer to compile
        with not_kept():
            found = {i: np.asarray(y) for i, y in jax.jit(run)(inputs).items()}
        del inputs
        give_memory_back()
        return found

    chosen = dict.fromkeys(range(len(cases)), 0)
    expected = outputs(0, chosen)
    for block in BLOCKS:
        left = [i for i in chosen if not chosen[i]]
        given = outputs(block, left) if left else {}
        chosen |= {i: block for i in left if np.array_equal(given[i], expected[i])}
    return {case: replace(case[0], block=chosen[i]) for i, case in enumerate(cases)}


def _whole_numbers(period: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 numbers from ``-(period // 2)`` to ``period // 2``, over and over."""
    few = np.arange(period, dtype=np.float32) - period // 2
    many = np.tile(few, 1000)  # numpy copies long pieces faster than short ones
    return np.resize(many, shape)
