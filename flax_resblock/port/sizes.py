"""Sizes that follow from those of the inputs: their values, and the code that computes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx.node import map_arg

from flax_resblock.port.values import ANY, ATOM, BATCH, PRODUCT, SUM, Code, Constant

_VALUES: WeakKeyDictionary[Any, dict[Any, int]] = WeakKeyDictionary()
"""For every trace, what each symbol in its sizes stands for where it was traced."""


class Size(int):
    """A whole number that follows from the sizes of the inputs, with :data:`BATCH` for the batch.

    Attributes:
      expression: In the symbols of the trace.
    """

    expression: Any


class Ratio(float):
    """The same for a number that is not whole."""

    expression: Any


def remember_sizes(program: Any, images: Sequence[torch.Tensor]) -> None:
    """Notes what the symbols of a trace with these inputs stand for."""
    inputs = set(program.graph_signature.user_inputs)
    nodes = [one for one in program.graph.nodes if one.op == "placeholder" and one.name in inputs]
    for node, image in zip(nodes, images, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int) and size.node.expr.is_Symbol:
                known = _VALUES.setdefault(size.node.shape_env, {})
                known[size.node.expr] = image.shape[axis] if axis else BATCH


def put_in_place(graph: Any) -> None:
    """Writes the numbers that a graph computes from sizes where they are used: otherwise modules
    take them from one another."""
    kinds = torch.SymInt | torch.SymFloat | torch.SymBool
    found = [
        node
        for node in graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), kinds)
    ]
    numbers = {node: node.meta["val"] for node in found}
    for node in reversed(graph.nodes):
        if node in numbers or "_assert_scalar" in str(node.target):
            graph.erase_node(node)
        elif node.op != "output":
            node.args, node.kwargs = map_arg(
                (node.args, node.kwargs), lambda one: numbers.get(one, one)
            )


def number_of(number: Any) -> Any:
    """A number of a trace: as it is, or what it is at the sizes of the trace."""
    if not hasattr(number, "node"):
        return number
    expression = number.node.expr
    if not expression.free_symbols:
        return number.node.pytype(expression)
    value = expression.subs(_VALUES.get(number.node.shape_env, {}))
    made = Size(int(value)) if number.node.pytype is int else Ratio(value)
    made.expression = expression
    return made


def shape_of(node: Any) -> tuple[int, ...]:
    """The shape of what a node computes, with :data:`BATCH` for the size of the batch."""
    return tuple(number_of(size) for size in node.meta["val"].shape)


def follows(number: Any) -> bool:
    """Whether a number follows from the sizes of the inputs."""
    return isinstance(number, Size | Ratio)


def added(first: Any, second: Any) -> Any:
    """The sum of two numbers, each of which may follow from sizes."""
    total = first + second
    if not follows(first) and not follows(second):
        return total
    made = Size(total)
    made.expression = getattr(first, "expression", first) + getattr(second, "expression", second)
    return made


def same_size(first: int, second: int) -> bool:
    """Whether two sizes are the same for all inputs."""
    return getattr(first, "expression", first) == getattr(second, "expression", second)


def in_common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many sizes both begin with."""
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if not same_size(a, b)),
        min(len(first), len(second)),
    )


Find = Callable[[Any], "Code | None"]
"""Code for an expression that is the size of something at hand; None if none has it."""


def code_of(expression: Any, find: Find) -> Code | None:
    """Code for a number that follows from sizes; None if those at hand do not tell it."""
    if expression.is_number:
        number = int(expression) if expression.is_Integer else float(expression)
        return Code("{}", (Constant(number, "factor"),))
    found = find(expression)
    if found is not None:
        return found
    constant, rest = expression.as_coeff_Add()
    for more in range(-3, 4):  # h - 1, where h is a sum itself
        found = find(rest + more)
        if found is not None:
            return _with_constant([(False, found)], constant - more)
    if expression.is_Add:
        return _sum(expression, find)
    if expression.is_Mul:
        return _product(expression, find)
    text, binding = _FUNCTIONS.get(type(expression).__name__, ("", ATOM))
    parts = [code_of(one, find) for one in expression.args]
    if not text or None in parts or text.count("{") != len(parts):
        return None
    return Code(text, tuple(parts), binding)


_FUNCTIONS = {
    "FloorDiv": (f"{{{PRODUCT}}} // {{{ATOM}}}", PRODUCT),
    "CleanDiv": (f"{{{PRODUCT}}} // {{{ATOM}}}", PRODUCT),
    "IntTrueDiv": (f"{{{PRODUCT}}} / {{{ATOM}}}", PRODUCT),
    "FloatTrueDiv": (f"{{{PRODUCT}}} / {{{ATOM}}}", PRODUCT),
    "Mod": (f"{{{PRODUCT}}} % {{{ATOM}}}", PRODUCT),
    "PythonMod": (f"{{{PRODUCT}}} % {{{ATOM}}}", PRODUCT),
    "Pow": (f"{{{ATOM}}} ** {{{ATOM}}}", PRODUCT),
    "PowByNatural": (f"{{{ATOM}}} ** {{{ATOM}}}", PRODUCT),
    "FloatPow": (f"{{{ATOM}}} ** {{{ATOM}}}", PRODUCT),
    "CeilToInt": (f"-int(-{{{ATOM}}} // 1)", PRODUCT),
    "FloorToInt": (f"int({{{ANY}}} // 1)", ATOM),
    "TruncToInt": (f"int({{{ANY}}})", ATOM),
    "RoundToInt": (f"round({{{ANY}}})", ATOM),
    "ToFloat": (f"{{{ATOM}}}", ATOM),
    "Max": (f"max({{{ANY}}}, {{{ANY}}})", ATOM),
    "Min": (f"min({{{ANY}}}, {{{ANY}}})", ATOM),
}
"""The functions of sizes that a trace has: their code, and how tightly it binds."""


def _sum(expression: Any, find: Find) -> Code | None:
    constant, rest = expression.as_coeff_Add()
    terms = rest.args if rest.is_Add else (rest,)
    signed = [(one.could_extract_minus_sign(), one) for one in terms]
    parts = [(minus, code_of(-one if minus else one, find)) for minus, one in signed]
    if any(code is None for _, code in parts):
        return None
    return _with_constant(sorted(parts, key=lambda one: (one[0], _sort_key(one[1]))), constant)


def _with_constant(parts: Sequence[tuple[bool, Any]], constant: Any) -> Code:
    """A sum of parts, each with whether it is subtracted, and of a constant."""
    if constant:
        number = int(constant) if constant == int(constant) else float(constant)
        parts = [*parts, (number < 0, Code("{}", (Constant(abs(number), "more"),)))]
    text = f"-{{{ATOM}}}" if parts[0][0] else f"{{{SUM}}}"
    for minus, _ in parts[1:]:
        text += f" - {{{PRODUCT}}}" if minus else f" + {{{PRODUCT}}}"
    return Code(text, tuple(code for _, code in parts), SUM)


def _product(expression: Any, find: Find) -> Code | None:
    parts = [code_of(one, find) for one in expression.args]
    if None in parts:
        return None
    parts.sort(key=_sort_key)
    return Code(" * ".join(f"{{{PRODUCT}}}" for _ in parts), tuple(parts), PRODUCT)


def _sort_key(code: Any) -> tuple[int, str]:
    """Numbers first, then heights before widths."""
    return int(not isinstance(code.holes[-1], Constant)), code.text
