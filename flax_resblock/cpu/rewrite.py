"""Interprets a traced network and hands its convolutions, with what follows, to a callback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from flax_resblock.cpu.max_pool import max_pool
from flax_resblock.cpu.onednn import ConvolutionSizes
from flax_resblock.cpu.pieces import results_of
from flax_resblock.cpu.primitives import DIMENSIONS


@dataclass(frozen=True)
class Fused:
    """``relu(conv(x) + bias + residual)``; bias, residual and ReLU are optional.

    Attributes:
      x: ``(N, H, W, I)``.
      kernel: An array, or what the caller passed in its place.
      bias: ``(1, 1, 1, O)``.
    """

    convolution: ConvolutionSizes
    x: jax.Array
    kernel: Any
    bias: jax.Array | None = None
    residual: jax.Array | None = None
    relu: bool = False


Compute = Callable[[Fused], jax.Array]


class _Pending:
    """A convolution whose value has not been needed yet: what follows it may be taken along."""

    def __init__(self, fused: Fused, compute: Compute) -> None:
        self.fused = fused
        self._compute = compute

    def followed(self, **changes: Any) -> _Pending:
        return _Pending(replace(self.fused, **changes), self._compute)

    def value(self) -> jax.Array:
        return self._compute(self.fused)


def evaluate_fused(network: ClosedJaxpr, inputs: Sequence[Any], compute: Compute) -> list[Any]:
    """The network's outputs.

    Args:
      network: From ``jax.make_jaxpr``; convolutions are plain ``conv_general_dilated``.
      inputs: Its inputs. An input that :func:`kernels` names may be anything that ``compute``
        understands.
      compute: Returns the value of a convolution together with what follows it.
    """
    return [_value(result) for result in _evaluate(network.jaxpr, network.consts, inputs, compute)]


def _evaluate(
    jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Any], compute: Compute
) -> list[Any]:
    atoms = (*(atom for eqn in jaxpr.eqns for atom in eqn.invars), *jaxpr.outvars)
    uses = Counter(atom for atom in atoms if not isinstance(atom, Literal))
    values: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    def write(variables: Sequence[Any], results: Sequence[Any]) -> None:
        for variable, result in zip(variables, results, strict=True):
            # what has another user cannot be taken along
            values[variable] = result if uses[variable] == 1 else _value(result)

    write(jaxpr.constvars, consts)
    write(jaxpr.invars, inputs)
    for eqn in jaxpr.eqns:
        operands = [read(atom) for atom in eqn.invars]
        inner = None
        if eqn.primitive.name in _CALLS:
            inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        rule = _RULES.get(eqn.primitive.name)
        if inner is not None:
            results = _evaluate(inner.jaxpr, inner.consts, operands, compute)
        elif rule is not None and (result := rule(operands, eqn, compute)) is not None:
            results = [result]
        else:
            results = results_of(eqn, list(map(_value, operands)))
        write(eqn.outvars, results)
    return [read(atom) for atom in jaxpr.outvars]


def _value(result: Any) -> Any:
    return result.value() if isinstance(result, _Pending) else result


_CALLS = frozenset({"jit", "pjit", "custom_jvp_call", "custom_vjp_call"})
"""Primitives that only wrap other operations. Without derivatives only their content matters."""


def kernels(network: ClosedJaxpr) -> dict[int, tuple[ConvolutionSizes, tuple[int, ...]]]:
    """Inputs used only as a kernel, by number: the convolution, and the shape of its array."""
    read = (atom for eqn in network.jaxpr.eqns for atom in eqn.invars)
    uses = Counter(id(atom) for atom in (*read, *network.jaxpr.outvars))
    numbers = {
        id(variable): number
        for number, variable in enumerate(network.jaxpr.invars)
        if uses[id(variable)] == 1
    }
    found: dict[int, tuple[ConvolutionSizes, tuple[int, ...]]] = {}
    for eqn in network.jaxpr.eqns:
        convolution = _numbers(eqn) if eqn.primitive.name == "conv_general_dilated" else None
        if convolution is not None and id(eqn.invars[1]) in numbers:
            found[numbers[id(eqn.invars[1])]] = convolution, eqn.invars[0].aval.shape
    return found


def _convolution(operands: list[Any], eqn: Any, compute: Compute) -> _Pending | None:
    found = _numbers(eqn)
    if found is None:
        return None
    return _Pending(Fused(found, _value(operands[0]), operands[1]), compute)


def _numbers(eqn: Any) -> ConvolutionSizes | None:
    """Sizes of a float32 convolution in NHWC with equal padding; None for any other."""
    p = eqn.params
    padding, kernel = tuple(p["padding"]), eqn.invars[1].aval
    plain = (
        p["batch_group_count"] == 1
        and set(p["lhs_dilation"]) <= {1}
        and all(low == high >= 0 for low, high in padding)
    )
    single = {atom.aval.dtype for atom in (*eqn.invars, *eqn.outvars)} == {np.dtype(np.float32)}
    flat = p["dimension_numbers"] == _DIMENSIONS and len(padding) == 2
    if not (plain and single and flat) or kernel.size == 0:
        return None
    (rows, _), (columns, _) = padding
    return ConvolutionSizes(
        kernel.shape,
        tuple(p["window_strides"]),
        (rows, columns),
        tuple(p["rhs_dilation"]),
        p["feature_group_count"],
    )


_DIMENSIONS = jax.lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), DIMENSIONS)


def _addition(operands: list[Any], eqn: Any, _: Compute) -> _Pending | None:
    """Adds a bias or a residual; of two convolutions, the first is the other's residual."""
    shape = eqn.outvars[0].aval.shape
    for pending, other in (operands, operands[::-1]):
        if not isinstance(pending, _Pending) or pending.fused.relu:
            continue
        fused, size = pending.fused, getattr(other, "shape", None)
        if size == (1, 1, 1, shape[-1]) and fused.bias is None and fused.residual is None:
            return pending.followed(bias=other)
        if fused.residual is None and (isinstance(other, _Pending) or size == shape):
            return pending.followed(residual=_value(other))
    return None


def _maximum(operands: list[Any], _: Any, __: Compute) -> _Pending | None:
    """A maximum with zero is a ReLU."""
    for pending, other in (operands, operands[::-1]):
        if isinstance(pending, _Pending) and not pending.fused.relu and _is_zero(other):
            return pending.followed(relu=True)
    return None


def _pool(operands: list[Any], eqn: Any, _: Compute) -> jax.Array | None:
    """Max pooling over a square window with equal padding on all sides."""
    p = eqn.params
    if len(p["window_dimensions"]) != 4:
        return None
    (batch, window, width, channels), pads = p["window_dimensions"], tuple(p["padding"])
    stride = p["window_strides"][1]
    even = pads == ((0, 0), pads[1], pads[1], (0, 0)) and pads[1][0] == pads[1][1] <= window // 2
    square = (batch, width, channels) == (1, window, 1)
    square = square and tuple(p["window_strides"]) == (1, stride, stride, 1)
    if not even or not square or {*p["base_dilation"], *p["window_dilation"]} != {1}:
        return None
    return max_pool(_value(operands[0]), window, stride, pads[1][0])


def _is_zero(value: Any) -> bool:
    known = not isinstance(value, Tracer) and getattr(value, "shape", None) == ()
    return known and float(value) == 0


_RULES: dict[str, Callable[[list[Any], Any, Compute], Any]] = {
    "conv_general_dilated": _convolution,
    "add": _addition,
    "max": _maximum,
    "reduce_window_max": _pool,
}
