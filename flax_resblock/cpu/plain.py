"""Convolutions as operations for which XLA has fast kernels in float64."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal


def plainly(operation: Any) -> list[list[Any]]:
    """An operation as groups of operations that follow each other.

    A convolution that XLA has a fast kernel for is left alone. Others become a padding, transposes
    and a plain one. They need programs of their own: XLA takes the padding and the transposes of
    one program back into its convolution. The gradients of grouped convolutions' kernels and of the
    images of strided ones become products, each of which is one program.

    Args:
      operation: Of a traced function.
    """
    if operation.primitive.name != "conv_general_dilated":
        return [[operation]]
    params = operation.params
    if params["batch_group_count"] > 1:
        return [_traced(_sum_by_sum, operation)]
    spread = max(params["lhs_dilation"]) > 1 and max(params["window_strides"]) == 1
    if spread and params["feature_group_count"] == 1:
        return [_traced(_spread, operation)]
    return [[one] for one in _traced(_in_steps, operation)]


def _traced(function: Callable[..., jax.Array], convolution: Any) -> list[Any]:
    """The operations of a function of a convolution and what it takes, in its place."""
    shapes = [jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype) for one in convolution.invars]
    inside = jax.make_jaxpr(lambda *operands: function(convolution, *operands))(*shapes).jaxpr
    outside = dict(zip(inside.invars, convolution.invars, strict=True))
    outside |= dict(zip(inside.outvars, convolution.outvars, strict=True))

    def renamed(atoms: Any) -> list[Any]:
        return [one if isinstance(one, Literal) else outside.get(one, one) for one in atoms]

    return [
        one.replace(invars=renamed(one.invars), outvars=renamed(one.outvars)) for one in inside.eqns
    ]


def _in_steps(convolution: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Padded first, and with the axes of grouped ones in the order of images and kernels."""
    params = dict(convolution.params)
    numbers, pads, dilation = (
        params[name] for name in ("dimension_numbers", "padding", "lhs_dilation")
    )
    out = range(x.ndim)
    if params["feature_group_count"] > 1:
        rank = x.ndim
        last = (0, rank - 1, *range(1, rank - 1))  # batch, channels and pixels, as JAX lists them
        (b, f, *pixels), (o, i, *taps) = numbers.lhs_spec, numbers.rhs_spec
        x, kernel = jnp.transpose(x, (b, *pixels, f)), jnp.transpose(kernel, (*taps, i, o))
        out = np.argsort([numbers.out_spec[axis] for axis in (0, *range(2, rank), 1)]).tolist()
        numbers = type(numbers)(last, (rank - 1, rank - 2, *range(rank - 2)), last)
    axes = numbers.lhs_spec[2:]
    sizes = [kernel.shape[axis] for axis in numbers.rhs_spec[2:]]
    small = any(x.shape[axis] <= size for axis, size in zip(axes, sizes, strict=True))
    even = all(low == high for low, high in pads)
    if set(dilation) != {1} or not even or (small and any(map(any, pads))):
        ends = [(0, 0, 0)] * x.ndim
        for axis, (low, high), step in zip(axes, pads, dilation, strict=True):
            ends[axis] = low, high, step - 1
        x = lax.pad(x, np.zeros((), x.dtype), ends)
        params |= {"lhs_dilation": (1,) * len(axes), "padding": ((0, 0),) * len(axes)}
    params["dimension_numbers"] = numbers
    return lax.transpose(lax.conv_general_dilated_p.bind(x, kernel, **params), tuple(out))


def _spread(convolution: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Of pixels with zeros between them, without a product with a zero: every pixel times every tap
    of the kernel, added up where each belongs."""
    params = convolution.params
    numbers = params["dimension_numbers"]
    (b, f, *pixels), (o, i, *taps) = numbers.lhs_spec, numbers.rhs_spec
    made = [convolution.outvars[0].aval.shape[axis] for axis in numbers.out_spec]
    window = [kernel.shape[axis] for axis in taps]
    kernel = jnp.transpose(kernel, (i, *taps, o)).reshape(x.shape[f], -1)
    products = jnp.transpose(x, (b, *pixels, f)) @ kernel  # channels of all taps
    total = jnp.zeros((), x.dtype)
    for place, tap in enumerate(np.ndindex(*window)):
        ends = [(0, 0, 0)]
        for axis, at in enumerate(tap):
            step, first = params["lhs_dilation"][axis], params["padding"][axis][0]
            first -= at * params["rhs_dilation"][axis]
            last = first + step * (products.shape[1 + axis] - 1) + 1
            ends.append((first, made[2 + axis] - last, step - 1))
        of_tap = products[..., place * made[1] : (place + 1) * made[1]]
        total += lax.pad(of_tap, np.zeros((), x.dtype), [*ends, (0, 0, 0)])
    order = np.argsort([numbers.out_spec[axis] for axis in (0, *range(2, x.ndim), 1)]).tolist()
    return jnp.transpose(total, order)


def _sum_by_sum(convolution: Any, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Of groups of the batch: the pixels of the result, which are the taps of a kernel, one by one,
    each a sum over all images and pixels."""
    params = convolution.params
    numbers, groups = params["dimension_numbers"], params["batch_group_count"]
    (b, f, *pixels), (o, i, *taps) = numbers.lhs_spec, numbers.rhs_spec
    steps = params["window_strides"]
    ends = [(0, 0, 0)] * x.ndim
    for axis, pads, step in zip(pixels, params["padding"], params["lhs_dilation"], strict=True):
        ends[axis] = *pads, step - 1
    x = lax.pad(x, np.zeros((), x.dtype), ends)
    size, within = list(x.shape), [1] * x.ndim
    for axis, tap, step in zip(pixels, taps, params["rhs_dilation"], strict=True):
        size[axis], within[axis] = (kernel.shape[tap] - 1) * step + 1, step
    made = convolution.outvars[0].aval.shape
    shape = tuple(made[axis] for axis in numbers.out_spec[2:])
    names = dict(zip((b, f, *pixels), ("gb", "i", *"uvw"), strict=False))
    of_kernel = dict(zip((o, i, *taps), ("go", "i", *"uvw"), strict=False))
    spelled, other = ("".join(one[axis] for axis in range(x.ndim)) for one in (names, of_kernel))
    product = f"{spelled},{other}->bgo"

    def split(array: jax.Array, axis: int) -> jax.Array:
        """With an axis for the groups."""
        return array.reshape(*array.shape[:axis], groups, -1, *array.shape[axis + 1 :])

    parts = split(kernel, o)

    def pixel(place: jax.Array) -> jax.Array:
        starts: list[Any] = [np.int32(0)] * x.ndim
        for axis, step, extent in reversed(list(zip(pixels, steps, shape, strict=True))):
            starts[axis], place = place % extent * step, place // extent
        window = lax.dynamic_slice(x, starts, size)
        window = window[tuple(slice(None, None, step) for step in within)]
        return jnp.einsum(product, split(window, b), parts)

    result = lax.map(pixel, jnp.arange(prod(shape), dtype=np.int32))
    result = result.reshape(*shape, made[numbers.out_spec[0]], -1)
    order = np.argsort([numbers.out_spec[axis] for axis in (*range(2, x.ndim), 0, 1)]).tolist()
    return jnp.transpose(result, order)
