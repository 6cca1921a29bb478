"""Convolutions by oneDNN, together with the bias, addition and ReLU that follow them.

jaxlib's CPU backend contains oneDNN and an instruction that calls it, but never chooses it by
itself. This module writes that instruction. It is not a public interface of XLA: its meaning is
known only for the versions of jaxlib in :data:`VERSIONS`, for which ``parity_tests/test_onednn.py``
passes; with any other version nothing here is used. A program with the instruction cannot be
written to a file (XLA takes it for another one when it reads it), so :func:`not_kept` must surround
its compilation. The instruction has no derivative: only :func:`flax_resblock.compile_inference`
uses it.

oneDNN reads a kernel that is said to be in its own order without knowing how long the buffer is.
Every such buffer is therefore as long as the longest order of that kernel, see
:func:`flax_resblock.cpu.orders.reordered`.
"""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_resblock.cpu.primitives import DIMENSIONS

VERSIONS = frozenset({"0.10.2", "0.12.0.1"})
"""Versions of jaxlib whose instruction means what is written here."""
TARGET = "__onednn$convolution"


@dataclass(frozen=True)
class ConvolutionSizes:
    """The sizes of a convolution.

    Attributes:
      kernel: Shape ``(kh, kw, I / groups, O)``.
      strides, padding, dilation: In pixels, of rows and columns; padding is on each side.
      groups: Channel groups.
      block: The kernel's order in memory: 0 is HWIO, else see
        :func:`flax_resblock.cpu.orders.reordered`.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    block: int = 0

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output."""
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
        """``relu(conv(x) + bias + residual)`` by oneDNN; bias, residual and ReLU are optional.

        Args:
          x: ``(N, H, W, I)`` float32.
          kernel: As :func:`flax_resblock.cpu.orders.reordered` returns it for this ``block``.
          bias: ``(O,)``.
          residual: Of the output's shape. The sum is written over it if nothing else uses it;
            otherwise XLA copies it first.
        Returns:
          ``(N, H', W', O)`` float32.
        """
        shape = jax.ShapeDtypeStruct(
            (x.shape[0], *self.size(*x.shape[1:3]), self.kernel[3]), x.dtype
        )
        pairs = (("BIAS", bias), ("SUM", residual))
        added = [(name, value) for name, value in pairs if value is not None]
        steps = [name for name, _ in added] + ["RELU"] * relu
        # the operand whose memory the output takes
        over = None if residual is None else {1 + len(added): 0}
        call = jax.ffi.ffi_call(
            TARGET,
            shape,
            custom_call_api_version=2,
            legacy_backend_config=self._config(steps),
            input_output_aliases=over,
        )
        return call(x, kernel, *(value for _, value in added))  # pyright: ignore[reportReturnType]

    def by_xla(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution alone, computed by XLA, with the kernel in HWIO."""
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
        axes = {"batch_dim": "0", "feature_dim": "3", "spatial_dims": ["1", "2"]}
        image = {"dims": "4", "data": axes}
        order: dict[str, Any] = {"input_feature_dim": "2", "output_feature_dim": "3"}
        order["spatial_dims"] = ["0", "1"]
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


@cache
def available() -> bool:
    """Whether this process may use the instruction: on 64-bit x86 under Linux, with a known jaxlib
    whose oneDNN computes a small example correctly. Warns if only the jaxlib is in the way.
    """
    machine = (jax.default_backend(), sys.platform, platform.machine())
    if machine != ("cpu", "linux", "x86_64"):
        return False
    try:
        refused = _refusal()
    except Exception as error:  # the classes that XLA raises are private
        refused = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    if refused:
        warnings.warn(
            f"compile_inference does without oneDNN ({refused}): results are as correct, small "
            f"batches take about twice as long. To use it, install jaxlib "
            f"{' or '.join(sorted(VERSIONS))}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return not refused


def _refusal() -> str:
    """Why the installed jaxlib cannot be used; empty if it can."""
    version = metadata.version("jaxlib")
    if version not in VERSIONS:
        return f"its use with jaxlib {version} has not been tested"
    rng = np.random.default_rng(0)
    x, kernel, bias, residual = (
        rng.integers(-9, 9, shape).astype(np.float32)
        for shape in ((2, 6, 5, 3), (3, 2, 3, 7), (7,), (2, 3, 3, 7))
    )
    convolution = ConvolutionSizes(kernel.shape, (2, 1), (1, 0), (1, 2), 1)

    @jax.jit
    def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array, residual: jax.Array) -> jax.Array:
        return jnp.maximum(convolution.by_xla(x, kernel) + bias + residual, 0)

    with not_kept():
        found = jax.jit(convolution, static_argnames="relu")(x, kernel, bias, residual, relu=True)
        expected = plain(x, kernel, bias, residual)
    same = np.array_equal(np.asarray(found), np.asarray(expected))
    return "" if same else f"jaxlib {version} computes an example incorrectly"


_KEPT = "jax_persistent_cache_min_compile_time_secs"
_lock = Lock()


@contextmanager
def not_kept() -> Iterator[None]:
    """jax's persistent cache takes up no program that is compiled in this context."""
    with _lock:
        before = getattr(jax.config, _KEPT)
        jax.config.update(_KEPT, float("inf"))
        try:
            yield
        finally:
            jax.config.update(_KEPT, before)
