"""The code that an ATen operator becomes.

Source: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx.node import map_aggregate

from flax_resblock.port.operator_names import RANDOM, name_of
from flax_resblock.port.operators import (
    convolutions,
    elementwise,
    images,
    norms,
    ranges,
    reductions,
    shapes,
    writes,
)
from flax_resblock.port.operators.rules import RULES
from flax_resblock.port.sizes import number_of
from flax_resblock.port.values import Value

__all__ = [
    "apply_operator",
    "convolutions",
    "elementwise",
    "images",
    "norms",
    "ranges",
    "reductions",
    "shapes",
    "writes",
]


_REASONS = {
    "wrap_with_autocast": "it uses torch.autocast, which fixes a precision",
    "wrap_with_set_grad_enabled": "it switches gradients on or off; use tensor.detach()",
    **{name: f"it draws random numbers (aten.{name})" for name in RANDOM},
}
"""Operators that cannot be ported, and why."""


def apply_operator(reader: Any, node: Any) -> Any:
    """What a node computes, as code.

    Args:
      reader: :class:`flax_resblock.port.body.BodyReader`.
      node: With ``op == "call_function"``.
    Raises:
      InputError: There is no rule for the operator.
    """
    if node.target is operator.getitem:
        return _item(reader, *node.args)
    made = node.meta.get("val")
    if isinstance(made, int | float | bool):
        return made
    if hasattr(made, "node"):
        return number_of(made)
    name = name_of(node)
    kind = getattr(made, "dtype", None)
    if kind is not None and kind.is_floating_point and kind != reader.reader.traced.dtype:
        raise reader.refusal(f"it casts to {kind}, which fixes a precision ({node.target})")
    if name in _REASONS:
        raise reader.refusal(_REASONS[name])
    if name not in RULES:
        raise reader.refusal(
            f"the operator {node.target} is not supported. Write it with operators that the "
            f"documentation lists (docs/port.md), or send us the line"
        )
    arguments, named = map_aggregate((node.args, node.kwargs), number_of)
    return RULES[name](reader, node, *arguments, **named)


def _item(b: Any, sequence: Any, index: int) -> Any:
    found = b.number(sequence)
    items = found.items if isinstance(found, Value) else found
    if items is None:
        raise b.refusal("it takes an item of what is no sequence")
    if items[index] is None and b.node.users:
        raise b.refusal("it uses the indices of the largest or smallest values")
    return items[index]
