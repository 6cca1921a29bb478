"""Convolutions by oneDNN, together with the bias, addition and ReLU that follow them.

jaxlib's CPU backend holds oneDNN and an instruction that calls it, but never chooses it by itself.
The instruction is written down here. It is no public interface of XLA: what it means is known for
the versions of jaxlib in :data:`VERSIONS` alone, for which ``parity_tests/test_onednn.py`` holds;
with any other nothing of this module is used. A program with it cannot be written to a file (XLA
takes the instruction for another one there), so that :func:`not_kept` must surround its
compilation, and it has no derivative: it is for :func:`flax_resblock.compile_inference`."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import metadata
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_resblock.cpu.primitives import DIMENSIONS

VERSIONS = frozenset({"0.10.2"})
"""Of jaxlib, whose instruction means what is written here."""
TARGET = "__onednn$convolution"
BLOCKS = (64, 32, 48, 16, 24, 8)
"""Output channels that lie beside each other in oneDNN's own orders of a kernel; see
:func:`reordered`.
"""


@dataclass(frozen=True)
class Convolution:
    """The numbers of a convolution.

    Attributes:
      kernel: Shape ``(kh, kw, I / groups, O)``.
      strides, padding, dilation: In pixels, of rows and columns; padding is on each side.
      groups: Of channels.
      block: The kernel's order in memory: 0 is HWIO, else see :func:`reordered`.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    block: int = 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Of the output."""
        spans = zip(
            (height, width), self.kernel, self.strides, self.padding, self.dilation, strict=False
        )
        rows, columns = (
            (size + 2 * pad - gap * (taps - 1) - 1) // stride + 1
            for size, taps, stride, pad, gap in spans
        )
        return rows, columns

    def __call__(
        self,
        x: jax.Array,
        kernel: jax.Array,
        bias: jax.Array | None = None,
        residual: jax.Array | None = None,
        relu: bool = False,
    ) -> jax.Array:
        """``relu(conv(x) + bias + residual)`` by oneDNN, each of the last three optional; ``(N, H',
        W', O)`` float32.

        Args:
          x: ``(N, H, W, I)`` float32.
          kernel: In the order that ``block`` says.
          bias: ``(O,)``.
          residual: Of the output's shape; the sum is written over it, where nobody needs it any
            longer (otherwise XLA makes a copy).
          relu: Whether it ends with one.
        """
        shape = jax.ShapeDtypeStruct(
            (x.shape[0], *self.size(*x.shape[1:3]), self.kernel[3]), x.dtype
        )
        added = [
            (name, value)
            for name, value in (("BIAS", bias), ("SUM", residual))
            if value is not None
        ]
        steps = [name for name, _ in added] + ["RELU"] * relu
        over = (
            None if residual is None else {1 + len(added): 0}
        )  # the operand that the output takes the place of
        call = jax.ffi.ffi_call(
            TARGET,
            shape,
            custom_call_api_version=2,
            legacy_backend_config=self._config(steps),
            input_output_aliases=over,
        )
        return call(x, kernel, *(value for _, value in added))  # pyright: ignore[reportReturnType]

    def by_xla(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution alone, as XLA computes it; the kernel in HWIO."""
        sides = [(side, side) for side in self.padding]
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            sides,
            rhs_dilation=self.dilation,
            dimension_numbers=DIMENSIONS,
            feature_group_count=self.groups,
        )

    def _config(self, steps: list[str]) -> str:
        """The instruction's settings: XLA's message ``OneDnnConvolutionConfig``
        (xla/service/cpu/onednn_config.proto) as JSON, whose numbers are text.
        """
        image = {
            "dims": "4",
            "data": {"batch_dim": "0", "feature_dim": "3", "spatial_dims": ["1", "2"]},
        }
        order: dict[str, Any] = {
            "input_feature_dim": "2",
            "output_feature_dim": "3",
            "spatial_dims": ["0", "1"],
        }
        config: dict[str, Any] = {
            "dims": "4",
            "input": image,
            "kernel": {"dims": "4", "filter": order},
            "output": image,
            "window": {
                "size": _texts(self.kernel[:2]),
                "pad_left": _texts(self.padding),
                "pad_right": _texts(self.padding),
                "strides": _texts(self.strides),
                "window_dilations": _texts(self.dilation),
            },
            "fusions": {"ops": steps},
            "feature_groups": str(self.groups),
        }
        if self.block:
            order["shape"] = _texts(self.kernel)
            config["optimization_config"] = {"weights_prepacked": True}
        return json.dumps({"onednn_conv_config": config})


def _texts(numbers: tuple[int, ...]) -> list[str]:
    return [str(number) for number in numbers]


def reordered(kernel: Any, block: int) -> Any:
    """A kernel ``(kh, kw, I, O)`` as ``(O / block, kh, kw, I, block)``, filled up with zeros;
    ``block`` 0 leaves it. For arrays of numpy and of jax.
    """
    if not block:
        return kernel
    lib = np if isinstance(kernel, np.ndarray) else jnp
    kernel = lib.pad(kernel, ((0, 0), (0, 0), (0, 0), (0, -kernel.shape[3] % block)))
    return kernel.reshape(*kernel.shape[:3], -1, block).transpose(3, 0, 1, 2, 4)


def order_of(convolution: Convolution, shape: tuple[int, ...]) -> Convolution:
    """The same convolution with the order in which oneDNN wants the kernel for this input, found by
    trying; a kernel in HWIO it puts in order at each call.

    A kernel in the right order gives the same bits as one in HWIO, because oneDNN then does the
    same; any other order gives other numbers. Whole numbers serve as values, so that sums are
    exact.

    Args:
      convolution: With ``block`` 0.
      shape: Of the input, ``(N, H, W, I)``.
    """
    if convolution.groups > 1:
        return convolution
    kernel = (
        (np.arange(np.prod(convolution.kernel)) % 251 - 125)
        .astype(np.float32)
        .reshape(convolution.kernel)
    )
    x = (np.arange(np.prod(shape)) % 13 - 6).astype(np.float32).reshape(shape)
    # behind the kernel there is room for what an order that is not the right one would have oneDNN
    # read
    height, width, inner, outer = convolution.kernel
    roomy = np.zeros(height * width * (inner + 64) * (outer + 64), np.float32)
    with not_kept():
        expected = jax.jit(convolution)(x, kernel)
        for block in BLOCKS:
            ordered = reordered(kernel, block).reshape(-1)
            roomy[: ordered.size] = ordered
            found = replace(convolution, block=block)
            if jnp.array_equal(jax.jit(found)(x, roomy), expected):
                return found
    return convolution


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether this process may use the instruction: a known jaxlib on a 64-bit x86 machine with
    Linux, whose oneDNN computes a small example rightly.
    """
    if (
        jax.default_backend() != "cpu"
        or metadata.version("jaxlib") not in VERSIONS
        or sys.platform != "linux"
        or platform.machine() != "x86_64"
    ):
        return False
    rng = np.random.default_rng(0)
    x, kernel, bias, residual = (
        rng.integers(-9, 9, shape).astype(np.float32)
        for shape in ((2, 6, 5, 3), (3, 2, 3, 7), (7,), (2, 3, 3, 7))
    )
    convolution = Convolution(kernel.shape, (2, 1), (1, 0), (1, 2), 1)
    with not_kept():
        found = jax.jit(convolution, static_argnames="relu")(x, kernel, bias, residual, relu=True)
        expected = convolution.by_xla(jnp.asarray(x), jnp.asarray(kernel))
    return bool(jnp.array_equal(found, jnp.maximum(expected + bias + residual, 0)))


_KEPT = "jax_persistent_cache_min_compile_time_secs"
_lock = Lock()


@contextmanager
def not_kept() -> Iterator[None]:
    """Within it jax's cache of compiled programs takes up nothing new."""
    with _lock:
        before = getattr(jax.config, _KEPT)
        jax.config.update(_KEPT, float("inf"))
        try:
            yield
        finally:
            jax.config.update(_KEPT, before)
