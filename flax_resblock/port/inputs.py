"""What a ported network takes, if it is something else than one batch of images.

While both sides are compared, several inputs are one array: ``(N, numbers)``, with the numbers of
each in PyTorch's order. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_resblock.errors import InputError

Shapes = tuple[tuple[int, ...], ...]
"""Shapes of the inputs without the batch, as PyTorch has them; empty for one batch of images."""


def parsed_shapes(text: str) -> Shapes:
    """``"2,3,64,64;2,10"`` as ``((3, 64, 64), (10,))``.

    Raises:
      InputError: It is something else.
    """
    rows = [[part.strip() for part in one.split(",")] for one in text.strip(" ;").split(";")]
    if not all(len(row) > 1 and all(one.isdigit() and int(one) for one in row) for row in rows):
        raise InputError(
            f"`inputs={text!r}` must be the shapes of the inputs in PyTorch, the batch first, with "
            f"commas and semicolons between them: 2,3,64,64;2,10."
        )
    return tuple(tuple(int(one) for one in row[1:]) for row in rows)


def is_one_image(shapes: Shapes) -> bool:
    """Whether these are the shapes of one batch of images."""
    return not shapes or (len(shapes) == 1 and len(shapes[0]) == 3)


def unpacked(packed: Any, shapes: Shapes) -> list[Any]:
    """The inputs in one array, as PyTorch has them; for an array of either framework."""
    if not shapes:
        return [packed]
    ends = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    starts = [0, *ends[:-1]]
    return [
        packed[:, start:end].reshape(packed.shape[0], *shape)
        for start, end, shape in zip(starts, ends, shapes, strict=True)
    ]


def unpacked_last(packed: jax.Array, shapes: Shapes) -> list[jax.Array]:
    """The same with channels last."""
    if not shapes:
        return [packed]
    return [jnp.moveaxis(one, 1, -1) for one in unpacked(packed, shapes)]


def in_one_array(outputs: Sequence[jax.Array]) -> jax.Array:
    """What a network returns as one array ``(N, numbers)``, in PyTorch's order."""
    moved = [jnp.moveaxis(one, -1, 1) if one.ndim > 2 else one for one in outputs]
    return jnp.concatenate([one.reshape(one.shape[0], -1) for one in moved], axis=-1)


def random_inputs(shapes: Shapes, *, batch: int, seed: int = 0) -> np.ndarray:
    """Random inputs in one array; the channels of each have different means."""
    rng = np.random.default_rng(seed)
    parts = []
    for shape in shapes:
        means = np.linspace(-1, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        parts.append((rng.standard_normal((batch, *shape)) + means).reshape(batch, -1))
    return np.concatenate(parts, axis=1)


def grown(shapes: Shapes, more: Sequence[int]) -> Shapes:
    """The shapes of larger images or longer signals; vectors stay as they are."""
    return tuple(
        (
            shape[0],
            *(size + extra for size, extra in zip(shape[1:], more[: len(shape) - 1], strict=True)),
        )
        for shape in shapes
    )
