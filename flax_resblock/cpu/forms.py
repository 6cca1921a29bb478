"""What the layers take from this package, and which convolutions a CPU computes differently."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flax_resblock.cpu.materialised import kept, materialised
from flax_resblock.cpu.max_pool import max_pool
from flax_resblock.cpu.primitives import Forms, convolution

__all__ = ["compile_example", "convolve", "forms_of", "kept", "materialised", "max_pool"]


class _Case(NamedTuple):
    """Convolutions that a CPU computes in another form than XLA's own."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    channels: int
    forms: Forms
    why: str


_CASES = (
    _Case(
        (1,), (1, 2), 1, Forms("pointwise", "pointwise", "pointwise"),
        "XLA's kernel gradient transposes both operands first: 2 to 8 times as long",
    ),
    _Case(
        (3,), (1,), 64, Forms("winograd", "winograd", "winograd"),
        "4/9 of the multiplications; below 64 channels its additions cost more than that saves",
    ),
    _Case(
        (3,), (2,), 64, Forms("xla", "taps", "taps"),
        "XLA's input gradient multiplies the zeros between the pixels too, and its kernel "
        "gradient transposes",
    ),
)  # fmt: skip
"""The first row that fits decides: kernel size, stride, least input and output channels."""


def forms_of(
    x: Any, kernel: Any, *, stride: int, padding: int, dilation: int, groups: int
) -> Forms | None:
    """How a CPU computes a convolution, from shapes and dtypes alone; None: as XLA does.

    Arguments as for :func:`flax_resblock.nn.conv.convolve`.
    """
    size = kernel.shape[0]
    if (kernel.shape[1], padding, dilation, groups) != (size, size // 2, 1, 1):
        return None
    if x.dtype not in (jnp.float32, jnp.float64) or 0 in x.shape:
        return None
    if not all(isinstance(extent, int) for extent in x.shape[1:]):
        return None
    channels = min(kernel.shape[2:])
    for case in _CASES:
        if size in case.kernel and stride in case.strides and channels >= case.channels:
            return case.forms
    return None


def _manual_axes(x: jax.Array) -> list[Any]:
    """The axes of a ``shard_map`` along which ``x`` differs; jax has had two names for them."""
    return [getattr(jax.typeof(x), name, None) for name in ("mat", "vma")]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    precision: lax.PrecisionLike,
) -> jax.Array | None:
    """The convolution in the form that is fastest on a CPU; None if that is XLA's own.

    Arguments and result as for :func:`flax_resblock.nn.conv.convolve`.
    """
    forms = forms_of(x, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    if forms is None or _manual_axes(x) != _manual_axes(kernel):
        return None
    return convolution(x, kernel, stride=stride, padding=padding, precision=precision, forms=forms)


def compile_example(options: dict[str, str]) -> None:
    """Compiles a convolution of one pixel and its gradient, with everything that is not public.

    Raises:
      Exception: Of any class, where this JAX or XLA lacks something.
    """
    forms = _CASES[0].forms

    def loss(x: jax.Array) -> Any:
        y = convolution(x, x, stride=1, padding=0, precision=None, forms=forms)
        return jnp.sum(materialised(y))

    x = jax.ShapeDtypeStruct((1, 1, 1, 1), jnp.float32)
    jax.jit(jax.grad(loss), compiler_options=options).lower(x).compile()
