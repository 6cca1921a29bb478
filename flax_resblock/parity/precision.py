"""What a backend really computes in: settings for true float32, and a guard that measures how many
bits an operation keeps.

Convolutions run in TF32 on CUDA and in bfloat16 on TPU unless told otherwise, without a word.
Before results are compared, the guard says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from jax import lax

from flax_resblock.checkpoint.torch_file import from_numpy, to_numpy
from flax_resblock.errors import InputError
from flax_resblock.nn.conv import convolve
from flax_resblock.parity.devices import JaxDevice, device_name
from flax_resblock.parity.pair import PRECISIONS, Side

Operation = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""A product ``(M, K) by (K, N) -> (M, N)`` as some backend computes it, all three in one dtype."""


DTYPES: dict[str, Any] = {"float64": np.float64, "float32": np.float32, "float16": np.float16}
DTYPES["bfloat16"] = ml_dtypes.bfloat16

_ROWS, _CHANNELS = 256, 64
"""Of a probe: 16 images of 8x8 pixels at stride 2. Wide enough for the kernels that real networks
get, cheap enough to run before every verification."""


def _mantissas(bits: np.ndarray, rng: np.random.Generator, dense: bool) -> np.ndarray:
    """``1.b1 b2 ... bk`` with the last bit set: exactly ``bits`` explicit mantissa bits, int64 in
    units of ``2^-52``; those between random where ``dense``."""
    one = np.int64(1)
    last = one << (52 - bits)
    between = rng.integers(0, one << 52, bits.shape) & ~(2 * last - 1) if dense else 0
    return (one << 52) | last | between


def _probe(
    rng: np.random.Generator, shape: tuple[int, int], limit: int
) -> tuple[np.ndarray, np.ndarray]:
    """Values that need 1, 2, ... ``limit`` bits, in float64, and how many each needs; a third of
    them ``1 + 2^-k``, of either sign."""
    bits = np.resize(np.arange(1, limit + 1), shape)
    sparse = rng.random(shape) < 1 / 3
    values = np.where(sparse, _mantissas(bits, rng, False), _mantissas(bits, rng, True))
    return np.ldexp(values.astype(np.float64), -52) * rng.choice([-1.0, 1.0], shape), bits


def _one_hot(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """One 1 per column, in every row as often as in any other."""
    places = rng.permutation(np.resize(np.arange(rows), columns))
    return (np.arange(rows)[:, None] == places[None, :]).astype(np.float64)


def mantissa_bits(operate: Operation, dtype: str) -> int:
    """How many explicit mantissa bits a product really keeps, exactly.

    Three probes whose true result is representable in ``dtype``, so that anything else is a loss:
    values that need ``k`` bits as first operand against one-hot weights, the same as second
    operand, and sums over all channels of single bits whose total needs ``k`` bits while every
    partial sum needs no more, in any order. Operands that are rounded (TF32 to 10 bits, bfloat16 to
    7) fail the first two, an accumulator that is too narrow the third. The bits between the first
    and the last are random in two thirds of the values: ``1 + 2^-k`` alone splits into two bfloat16
    numbers for every ``k``.

    Args:
      operate: The product to examine.
      dtype: ``"float64"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.
    Returns:
      The largest ``k`` such that all values of up to ``k`` bits survive all three probes: 52, 23, 7
      and 10 where the operation is what it says.
    """
    kind = DTYPES[dtype]
    limit = int(ml_dtypes.finfo(kind).nmant)
    rng = np.random.default_rng(limit)
    first, first_bits = _probe(rng, (_ROWS, _CHANNELS), limit)
    second, second_bits = _probe(rng, (_CHANNELS, _CHANNELS), limit)
    selecting = _one_hot(rng, _CHANNELS, _CHANNELS)
    rows = _one_hot(rng, _CHANNELS, _ROWS).T
    total_bits = np.resize(np.arange(1, limit + 1), (_ROWS, 1))
    totals = _mantissas(total_bits, rng, True)
    parts = np.zeros((_ROWS, _CHANNELS), np.int64)
    for bit in range(53):
        single = totals[:, 0] & (np.int64(1) << bit)
        parts[np.arange(_ROWS), rng.integers(0, _CHANNELS, _ROWS)] |= single
    sums = np.broadcast_to(np.ldexp(totals.astype(np.float64), -52), (_ROWS, _CHANNELS))
    probes = [
        (first, selecting, first @ selecting, (first_bits @ selecting).astype(int)),
        (rows, second, rows @ second, (rows @ second_bits).astype(int)),
        (
            np.ldexp(parts.astype(np.float64), -52),
            np.ones((_CHANNELS, _CHANNELS)),
            sums,
            np.broadcast_to(total_bits, sums.shape),
        ),
    ]
    kept = limit
    for values, weights, truth, bits in probes:
        result = np.asarray(operate(values.astype(kind), weights.astype(kind)), np.float64)
        if result.shape != truth.shape:
            raise ValueError(
                f"the operation maps {values.shape} by {weights.shape} to {result.shape}, not "
                f"to {truth.shape}."
            )
        kept = min(kept, int(bits[result != truth].min(initial=limit + 1)) - 1)
    return kept


@dataclass(frozen=True)
class MeasuredPrecision:
    """What an operation turned out to be.

    Attributes:
      device: ``"gpu:0 (NVIDIA H100)"``, ``"cuda:1"``.
      operation: ``"convolution"`` or ``"matrix product"``.
      mantissa_bits: Explicit mantissa bits that survive, see :func:`mantissa_bits`.
      expected_bits: How many ``dtype`` has.
    """

    side: str
    device: str
    dtype: str
    operation: str
    mantissa_bits: int
    expected_bits: int


def _images(values: np.ndarray) -> np.ndarray:
    """``(M, C)`` as ``(M / 16, 8, 8, C)``: one row per pixel that the middle of a 3x3 kernel meets
    at stride 2 and padding 1.

    Stride 2 rules out Winograd and FFT, which transform their operands and lose bits even in true
    float32."""
    images = np.zeros((len(values) // 16, 8, 8, values.shape[1]), values.dtype)
    images[:, ::2, ::2] = values.reshape(-1, 4, 4, values.shape[1])
    return images


def _kernel(weights: np.ndarray) -> np.ndarray:
    """``(I, O)`` as ``(3, 3, I, O)``, in its middle."""
    kernel = np.zeros((3, 3, *weights.shape), weights.dtype)
    kernel[1, 1] = weights
    return kernel


def _flax_operations(device: JaxDevice) -> dict[str, Operation]:
    """Precision is left to jax's setting, as the models leave it. Run as compiled functions, as in
    a model."""
    conv = jax.jit(
        lambda x, w: convolve(x, w, stride=2, padding=1, dilation=1, groups=1, precision=None)
    )
    product = jax.jit(lambda x, w: lax.dot_general(x, w, (((1,), (0,)), ((), ()))))

    def convolution(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        result = conv(*jax.device_put((_images(values), _kernel(weights)), device))
        return np.asarray(result).reshape(len(values), -1)

    def matrix_product(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return np.asarray(product(*jax.device_put((values, weights), device)))

    return {"convolution": convolution, "matrix product": matrix_product}


def _torch_operations(device: torch.device) -> dict[str, Operation]:
    def convolution(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        images = from_numpy(np.ascontiguousarray(np.moveaxis(_images(values), -1, 1))).to(device)
        kernel = from_numpy(np.ascontiguousarray(_kernel(weights).transpose(3, 2, 0, 1))).to(device)
        result = torch.nn.functional.conv2d(images, kernel, stride=2, padding=1)
        return np.moveaxis(to_numpy(result), 1, -1).reshape(len(values), -1)

    def matrix_product(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return to_numpy(from_numpy(values).to(device) @ from_numpy(weights).to(device))

    return {"convolution": convolution, "matrix product": matrix_product}


def measure_precision(
    side: Side, device: JaxDevice | torch.device, dtype: str
) -> list[MeasuredPrecision]:
    """Examines one 3x3 convolution and one matrix product under the settings in force, see
    :func:`strict`; or, of ``"tf32"``, under its own.

    Args:
      device: One of its devices. float64 is the truth and measured where the truth is computed, on
        the CPU.
      dtype: Of operands and results. ``"tf32"``: float32 operands that the device may round to
        TF32; one without TF32 keeps more bits.
    Raises:
      TypeError: A device of the other framework.
    """
    if dtype == "tf32":
        bits = int(-np.log2(PRECISIONS[dtype].epsilon))
        with PRECISIONS[dtype].on_torch(), jax.default_matmul_precision("default"):
            found = measure_precision(side, device, "float32")
        return [replace(one, dtype=dtype, expected_bits=bits) for one in found]
    if isinstance(device, torch.device) != (side == "torch"):
        raise TypeError(f"{device!r} is no device of {'jax' if side == 'flax' else 'torch'}.")
    if isinstance(device, torch.device):
        device = torch.device("cpu") if dtype == "float64" else device
        name, operations = str(device), _torch_operations(device)
    else:
        device = jax.devices("cpu")[0] if dtype == "float64" else device
        name, operations = device_name(device), _flax_operations(device)
    expected = int(ml_dtypes.finfo(DTYPES[dtype]).nmant)
    with jax.enable_x64(True) if side == "flax" and dtype == "float64" else nullcontext():
        return [
            MeasuredPrecision(side, name, dtype, operation, mantissa_bits(operate, dtype), expected)
            for operation, operate in operations.items()
        ]


def _nickname(bits: int) -> str:
    passes = "three bfloat16 passes"
    names = {23: "float32", 16: passes, 15: passes, 10: "TF32, or float16", 7: "bfloat16"}
    names |= {3: "float8", 2: "float8"}
    return f", which is what {names[bits]} keeps" if bits in names else ""


_REMEDIES = {
    "flax": (
        "Compute under jax.default_matmul_precision('highest'), and look for a precision= in the "
        "code, which overrides it"
    ),
    "torch": "Set torch.backends.fp32_precision = 'ieee', and look for a running torch.autocast",
}


def require(found: Iterable[MeasuredPrecision]) -> None:
    """Lets results pass that have all the bits of their dtype.

    Raises:
      InputError: Some have fewer: which, how many, what that is likely called, and what to do.
    """
    short = [one for one in found if one.mantissa_bits < one.expected_bits]
    if not short:
        return
    losses = "; ".join(
        f"{one.side} on {one.device}: the {one.dtype} {one.operation} keeps {one.mantissa_bits} of "
        f"{one.expected_bits} mantissa bits{_nickname(one.mantissa_bits)}"
        for one in short
    )
    remedies = ". ".join(_REMEDIES[side] for side in dict.fromkeys(one.side for one in short))
    raise InputError(
        "A backend computes with less precision than it was asked for, and a comparison would "
        f"blame the model for that. {losses}. {remedies}; flax_resblock.parity.devices.strict() "
        "sets both frameworks. Or compare in a precision that this device has, such as bfloat16."
    )
