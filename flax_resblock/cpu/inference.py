"""Inference in float32 on a CPU: each convolution by oneDNN or Winograd, the faster one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_resblock.cpu import onednn, orders, products, winograd
from flax_resblock.cpu.compiling import inference_options
from flax_resblock.cpu.rewrite import Fused, evaluate_fused, kernels
from flax_resblock.cpu.switch import conv_lowering

WINOGRAD_PAYS = {True: ((32, 512), (256, 256), (1024, 128)), False: ((512, 64), (0, 256))}
"""The least tiles and channels for Winograd, with oneDNN as the other choice (True) or without.
With few tiles, reading the sixteen kernels (16/9 of the plain one) takes most of the time; with few
channels, the transforms do.
"""
WINOGRAD_BYTES = 32 << 20
"""Bytes of an input's matrices beyond which the C library maps their memory at each call."""


class _Plan(NamedTuple):
    """How a convolution is computed for one size of its input."""

    form: Literal["onednn", "winograd", "xla"]
    convolution: onednn.ConvolutionSizes

    def prepared(self, kernel: Any) -> Any:
        """The kernel, an array of jax or numpy, as :meth:`__call__` takes it."""
        if self.form == "winograd":
            return winograd.transform_kernel(kernel)
        return orders.reordered(kernel, self.convolution.block)

    def __call__(self, fused: Fused, kernel: Any) -> jax.Array:
        """The convolution with what follows it."""
        if self.form == "onednn":
            bias = None if fused.bias is None else fused.bias.reshape(-1)
            return self.convolution(fused.x, kernel, bias, fused.residual, fused.relu)
        y = (
            winograd.convolve_transformed(fused.x, kernel, None)
            if self.form == "winograd"
            else _by_xla(self.convolution, fused.x, kernel)
        )
        for value in (fused.bias, fused.residual):
            y = y if value is None else y + value
        return jnp.maximum(y, 0) if fused.relu else y


def _planned(of: onednn.ConvolutionSizes, shape: tuple[int, ...], by_onednn: bool) -> _Plan:
    """The fastest form for an input ``(N, H, W, I)``."""
    tiles, channels = shape[0] * -(-shape[1] // 2) * -(-shape[2] // 2), min(of.kernel[2:])
    plain = of.strides == of.padding == of.dilation == (1, 1) and of.groups == 1
    fits = not by_onednn or 16 * tiles * shape[3] * 4 <= WINOGRAD_BYTES
    pays = any(tiles >= fewest and channels >= width for fewest, width in WINOGRAD_PAYS[by_onednn])
    if of.kernel[:2] == (3, 3) and plain and fits and pays:
        return _Plan("winograd", of)
    return _Plan("onednn" if by_onednn else "xla", of)


def _by_xla(of: onednn.ConvolutionSizes, x: jax.Array, kernel: jax.Array) -> jax.Array:
    square = (of.kernel[:2], of.padding, of.groups) == ((1, 1), (0, 0), 1)
    if square and len(set(of.strides)) == 1:  # a matrix product is faster
        return products.pointwise(x, kernel, of.strides[0], None)
    return of.by_xla(x, kernel)


class CpuNetwork:
    """A network made ready for inference.

    Args:
      forward: ``(arrays, images) -> outputs`` in evaluation mode.
      arrays: The parameters and running statistics, float32. The list loses those kernels that
        are held in another order.
    """

    def __init__(
        self, forward: Callable[[list[jax.Array], jax.Array], jax.Array], arrays: list[Any]
    ) -> None:
        self._forward, self._arrays = forward, arrays
        self._shapes = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in arrays]
        self._by_onednn = onednn.available()
        self._plans: dict[orders.Case, _Plan] = {}
        self._prepared: dict[tuple[int, _Plan], Any] = {}

    def compiled(self, images: jax.ShapeDtypeStruct) -> Callable[[jax.Array], jax.Array]:
        """The network for images of this shape."""
        with conv_lowering("xla"):
            network = jax.make_jaxpr(self._forward)(self._shapes, images)
        convolutions = kernels(network)
        self._plan(convolutions.values())
        plans = {leaf: self._plans[convolution] for leaf, convolution in convolutions.items()}
        inputs = [
            self._kernel(leaf, plans[leaf]) if leaf in plans else array
            for leaf, array in enumerate(self._arrays)
        ]

        def compute(fused: Fused) -> jax.Array:
            if isinstance(fused.kernel, tuple):
                plan, kernel = fused.kernel
                return plan(fused, kernel)
            plan = _planned(fused.convolution, fused.x.shape, self._by_onednn)
            return plan(fused, plan.prepared(fused.kernel))

        def run(inputs: list[Any], images: jax.Array) -> jax.Array:
            known = [
                (plans[leaf], value) if leaf in plans else value
                for leaf, value in enumerate(inputs)
            ]
            return evaluate_fused(network, [*known, images], compute)[0]

        jitted = jax.jit(run, compiler_options=dict(inference_options()))
        with onednn.not_kept():
            compiled = jitted.lower(inputs, images).compile()
        return lambda images: compiled(inputs, images)

    def _plan(self, cases: Iterable[orders.Case]) -> None:
        """Decides how each of these is computed, for those that are not in ``_plans`` yet."""
        new = [case for case in dict.fromkeys(cases) if case not in self._plans]
        self._plans |= {case: _planned(*case, self._by_onednn) for case in new}
        ordered = orders.orders_of(case for case in new if self._plans[case].form == "onednn")
        self._plans |= {case: _Plan("onednn", one) for case, one in ordered.items()}

    def _kernel(self, leaf: int, plan: _Plan) -> Any:
        """The prepared kernel, which batch sizes with the same plan share."""
        if (leaf, plan) not in self._prepared:
            # by numpy: jax would compile a program for every shape
            prepared = plan.prepared(self._plain(leaf))
            self._prepared[leaf, plan] = jax.device_put(prepared, may_alias=True)
            if plan.form == "onednn" and plan.convolution.block:
                self._arrays[leaf] = None  # the same numbers in another order
        return self._prepared[leaf, plan]

    def _plain(self, leaf: int) -> np.ndarray:
        """A kernel in HWIO."""
        if (kept := self._arrays[leaf]) is not None:
            return np.asarray(kept)
        of, flat = next(
            (plan.convolution, flat)
            for (number, plan), flat in self._prepared.items()
            if number == leaf and plan.convolution.block
        )
        return orders.in_plain_order(np.asarray(flat), of.kernel, of.block)
