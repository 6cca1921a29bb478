"""A convolution and its two gradients as primitives of jax, with a lowering of their own for CPUs.

The three maps are bilinear, and the transposes of each are among the three, so derivatives of any
order, forwards and backwards, need nothing more. For a GPU or TPU, also on a machine that has none,
they are lowered to what ``lax.conv_general_dilated`` and its gradients are lowered to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from flax_resblock.cpu import products, winograd
from flax_resblock.cpu.products import Geometry

DIMENSIONS = ("NHWC", "HWIO", "NHWC")

Form = Literal["xla", "winograd", "pointwise", "taps"]


class Forms(NamedTuple):
    """How a CPU computes a convolution and its two gradients; see :mod:`flax_resblock.cpu.winograd`
    and :mod:`flax_resblock.cpu.products`.
    """

    convolution: Form = "xla"
    input_gradient: Form = "xla"
    kernel_gradient: Form = "xla"


Map = Callable[[jax.Array, jax.Array, Geometry], jax.Array]


def _xla(x: jax.Array, kernel: jax.Array, of: Geometry) -> jax.Array:
    pad = (of.padding, of.padding)
    return lax.conv_general_dilated(
        x,
        kernel,
        (of.stride, of.stride),
        (pad, pad),
        dimension_numbers=DIMENSIONS,
        precision=of.precision,
    )


def _xla_input_gradient(dy: jax.Array, kernel: jax.Array, of: Geometry) -> jax.Array:
    x = jax.ShapeDtypeStruct((dy.shape[0], *of.image, kernel.shape[2]), dy.dtype)
    return jax.linear_transpose(lambda x: _xla(x, kernel, of), x)(dy)[0]


def _xla_kernel_gradient(x: jax.Array, dy: jax.Array, of: Geometry) -> jax.Array:
    kernel = jax.ShapeDtypeStruct((of.taps, of.taps, x.shape[3], dy.shape[3]), x.dtype)
    return jax.linear_transpose(lambda kernel: _xla(x, kernel, of), kernel)(dy)[0]


CONVOLUTIONS: dict[Form, Map] = {
    "xla": _xla,
    "winograd": lambda x, kernel, of: winograd.convolve(x, kernel, of.precision),
    "pointwise": lambda x, kernel, of: products.pointwise(x, kernel, of.stride, of.precision),
}
INPUT_GRADIENTS: dict[Form, Map] = {
    "xla": _xla_input_gradient,
    "winograd": lambda dy, kernel, of: winograd.input_gradient(dy, kernel, of.precision),
    "pointwise": products.pointwise_input_gradient,
    "taps": products.input_gradient,
}
KERNEL_GRADIENTS: dict[Form, Map] = {
    "xla": _xla_kernel_gradient,
    "winograd": lambda x, dy, of: winograd.kernel_gradient(x, dy, of.precision),
    "pointwise": lambda x, dy, of: products.pointwise_kernel_gradient(
        x, dy, of.stride, of.precision
    ),
    "taps": products.kernel_gradient,
}


def _primitive(name: str, which: str, maps: dict[Form, Map]) -> Primitive:
    primitive = Primitive(name)

    def plain(first: jax.Array, second: jax.Array, *, of: Geometry, forms: Forms) -> jax.Array:
        return maps["xla"](first, second, of)

    def on_cpu(first: jax.Array, second: jax.Array, *, of: Geometry, forms: Forms) -> jax.Array:
        return maps[getattr(forms, which)](first, second, of)

    def typed(first: Any, second: Any, **options: Any) -> Any:
        result = jax.eval_shape(
            partial(plain, **options),
            *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in (first, second)),
        )
        return first.update(shape=result.shape, dtype=result.dtype, weak_type=False)

    def batched(arrays: Any, axes: Any, **options: Any) -> Any:
        return jax.vmap(partial(plain, **options), in_axes=axes)(*arrays), 0

    primitive.def_abstract_eval(typed)
    primitive.def_impl(jax.jit(primitive.bind, static_argnames=("of", "forms")))
    batching.primitive_batchers[primitive] = batched
    mlir.register_lowering(primitive, mlir.lower_fun(plain, multiple_results=False))
    mlir.register_lowering(
        primitive, mlir.lower_fun(on_cpu, multiple_results=False), platform="cpu"
    )
    return primitive


_convolution = _primitive("resblock_conv", "convolution", CONVOLUTIONS)
_input_gradient = _primitive("resblock_conv_input_gradient", "input_gradient", INPUT_GRADIENTS)
_kernel_gradient = _primitive("resblock_conv_kernel_gradient", "kernel_gradient", KERNEL_GRADIENTS)

ad.defbilinear(
    _convolution,
    lambda ct, x, kernel, **options: _input_gradient.bind(ct, kernel, **options),
    lambda ct, x, kernel, **options: _kernel_gradient.bind(x, ct, **options),
)
ad.defbilinear(
    _input_gradient,
    lambda ct, dy, kernel, **options: _convolution.bind(ct, kernel, **options),
    lambda ct, dy, kernel, **options: _kernel_gradient.bind(ct, dy, **options),
)
ad.defbilinear(
    _kernel_gradient,
    lambda ct, x, dy, **options: _input_gradient.bind(dy, ct, **options),
    lambda ct, x, dy, **options: _convolution.bind(x, ct, **options),
)


def convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int,
    padding: int,
    precision: lax.PrecisionLike,
    forms: Forms,
) -> jax.Array:
    """The convolution ``(N, H, W, C)`` by ``(k, k, C, O)`` to ``(N, H', W', O)``; on a CPU it and
    its gradients are computed in the given forms.

    Args:
      x, kernel: Of one dtype.
      stride, padding: In pixels.
      precision: ``lax.Precision`` of the products; None takes jax's default at the time of tracing.
      forms: Each must support the shapes.
    """
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    of = Geometry((x.shape[1], x.shape[2]), kernel.shape[0], stride, padding, precision)
    return _convolution.bind(x, kernel, of=of, forms=forms)
