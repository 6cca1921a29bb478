"""Pooling and low-pass filters with explicit padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.nn.conv import convolve, cpu_forms
from flax_resblock.nn.scopes import in_slot


class MaxPool(nnx.Module):
    """Max pooling, equal to ``torch.nn.MaxPool2d``: pads with minus infinity on both sides.

    Args:
      window, stride, padding: In pixels, square.
    """

    def __init__(self, window: int, stride: int, padding: int) -> None:
        self.window = window
        self.stride = stride
        self.padding = padding

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, H', W', C)``."""
        forms = cpu_forms()
        fixed = all(isinstance(size, int) for size in x.shape[1:3])  # not symbolic, as in exports
        if forms is not None and fixed:
            return forms.max_pool(x, self.window, self.stride, self.padding)
        pad = (self.padding, self.padding)
        return nnx.max_pool(x, (self.window, self.window), (self.stride, self.stride), (pad, pad))  # pyright: ignore[reportArgumentType]


class AveragePool(nnx.Module):
    """Mean over ``stride`` by ``stride`` pixels; at the end of an odd size over those that are
    there.

    Equal to ``torch.nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)``.

    Args:
      stride: And window, in pixels; 1 copies the input.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C)``."""
        if self.stride == 1:
            return x
        window = (self.stride, self.stride)
        pads = [(0, -size % self.stride) for size in x.shape[1:3]]
        return nnx.avg_pool(x, window, window, pads, count_include_pad=False)  # pyright: ignore[reportArgumentType]


class Blur(nnx.Module):
    """The binomial filter ``[1, 2, 1] / 4`` in both directions, with one pixel of reflection on
    each side (Zhang 2019, arXiv:1904.11486).

    Args:
      stride: In pixels.
    """

    def __init__(self, stride: int) -> None:
        self.stride = stride

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / stride), ceil(W / stride), C)``; height and width at
        least 2.
        """
        row = jnp.asarray([0.25, 0.5, 0.25], x.dtype)
        channels = x.shape[-1]
        kernel = jnp.broadcast_to((row[:, None] * row)[:, :, None, None], (3, 3, 1, channels))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        return convolve(
            padded,
            kernel,
            stride=self.stride,
            padding=0,
            dilation=1,
            groups=channels,
            precision=lax.Precision.HIGHEST,
        )
