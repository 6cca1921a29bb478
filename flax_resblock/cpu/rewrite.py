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
from flax_resblock.cpu.onednn import Convolution
from flax_resblock.cpu.primitives import DIMENSIONS


@dataclass(frozen=True)
class Fused:
    """``relu(conv(x) + bias + residual)``; bias, residual and ReLU are optional.

    Attributes:
      convolution: Its sizes.
      x: ``(N, H, W, I)``.
      kernel: An array, or what the caller passed in its place.
      bias: ``(1, 1, 1, O)``.
      residual: Of the output's shape.
      relu: Whether a ReLU comes last.
    """

    convolution: Convolution
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
    uses = Counter(
        atom
        for atom in (*(atom for eqn in jaxpr.eqns for atom in eqn.invars), *jaxpr.outvars)
        if not isinstance(atom, Literal)
    )
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
        inner = next(
            (
                eqn.params[name]
                for name in ("jaxpr", "call_jaxpr")
                if eqn.primitive.name in _CALLS and name in eqn.params
            ),
            None,
        )
        rule = _RULES.get(eqn.primitive.name)
        if inner is not None:
            results = _evaluate(inner.jaxpr, inner.consts, operands, compute)
        elif rule is not None and (result := rule(operands, eqn, compute)) is not None:
            results = [result]
        else:
            results = eqn.primitive.bind(
                *map(_value, operands), **eqn.primitive.get_bind_params(eqn.params)
            )
            results = results if eqn.primitive.multiple_results else [results]
        write(eqn.outvars, results)
    return [read(atom) for atom in jaxpr.outvars]


def _value(result: Any) -> Any:
    return result.value() if isinstance(result, _Pending) else result


_CALLS = frozenset({"jit", "pjit", "custom_jvp_call", "custom_vjp_call"})
"""Primitives that only wrap other operations. Without derivatives only their content matters."""


def kernels(network: ClosedJaxpr) -> dict[int, tuple[Convolution, tuple[int, ...]]]:
    """Inputs used only as a kernel, by number: the convolution, and the shape of its array."""
    uses = Counter(
        id(atom)
        for atom in (
            *(atom for eqn in network.jaxpr.eqns for atom in eqn.invars),
            *network.jaxpr.outvars,
        )
    )
    numbers = {
        id(variable): number
        for number, variable in enumerate(network.jaxpr.invars)
        if uses[id(variable)] == 1
    }
    found: dict[int, tuple[Convolution, tuple[int, ...]]] = {}
    for eqn in network.jaxpr.eqns:
        convolution = _numbers(eqn) if eqn.primitive.name == "conv_general_dilated" else None
        if convolution is not None and id(eqn.invars[1]) in numbers:
            found[numbers[id(eqn.invars[1])]] = convolution, eqn.invars[0].aval.shape
    return found


def _convolution(operands: list[Any], eqn: Any, compute: Compute) -> _Pending | None:
    found = _numbers(eqn)
    return (
        None if found is None else _Pending(Fused(found, _value(operands[0]), operands[1]), compute)
    )


def _numbers(eqn: Any) -> Convolution | None:
    """Sizes of a float32 convolution in NHWC with equal padding; None for any other."""
    p = eqn.params
    padding, kernel = tuple(p["padding"]), eqn.invars[1].aval
    plain = (
        p["batch_group_count"] == 1
        and set(p["lhs_dilation"]) <= {1}
        and all(low == high >= 0 for low, high in padding)
    )
    single = {atom.aval.dtype for atom in (*eqn.invars, *eqn.outvars)} == {np.dtype(np.float32)}
    if (
        not plain
        or not single
        or p["dimension_numbers"] != _DIMENSIONS
        or len(padding) != 2
        or kernel.size == 0
    ):
        return None
    (rows, _), (columns, _) = padding
    return Convolution(
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
        if (
            getattr(other, "shape", None) == (1, 1, 1, shape[-1])
            and pending.fused.bias is None
            and pending.fused.residual is None
        ):
            return pending.followed(bias=other)
        if pending.fused.residual is None and (
            isinstance(other, _Pending) or getattr(other, "shape", None) == shape
        ):
            return pending.followed(residual=_value(other))
    return None


def _maximum(operands: list[Any], _: Any, __: Compute) -> _Pending | None:
    """A maximum with zero is a ReLU."""
    for pending, other in (operands, operands[::-1]):
        if (
            isinstance(pending, _Pending)
            and not pending.fused.relu
            and not isinstance(other, Tracer)
            and _is_zero(other)
        ):
            return pending.followed(relu=True)
    return None


def _pool(operands: list[Any], eqn: Any, _: Compute) -> jax.Array | None:
    """Max pooling over a square window with equal padding on all sides."""
    p = eqn.params
    if len(p["window_dimensions"]) != 4:
        return None
    (batch, window, width, channels), (_, stride, across, _), pads = (
        p["window_dimensions"],
        p["window_strides"],
        p["padding"],
    )
    even = (
        tuple(pads) == ((0, 0), pads[1], pads[1], (0, 0))
        and pads[1][0] == pads[1][1] <= window // 2
    )
    square = (batch, width, channels, across) == (1, window, 1, stride) and tuple(
        p["window_strides"][::3]
    ) == (1, 1)
    plain = {*p["base_dilation"], *p["window_dilation"]} == {1}
    return (
        max_pool(_value(operands[0]), window, stride, pads[1][0])
        if even and square and plain
        else None
    )


def _is_zero(value: Any) -> bool:
    return getattr(value, "shape", None) == () and float(value) == 0


_RULES: dict[str, Callable[[list[Any], Any, Compute], Any]] = {
    "conv_general_dilated": _convolution,
    "add": _addition,
    "max": _maximum,
    "reduce_window_max": _pool,
}
