"""The code that an ATen operator becomes.

Source: https://docs.pytorch.org/docs/stable/torch.compiler_ir.html
"""

from __future__ import annotations

import operator
from typing import Any

from flax_resblock.port.operators import (
    convolutions,
    elementwise,
    images,
    norms,
    reductions,
    shapes,
)
from flax_resblock.port.operators.rules import RULES, name_of
from flax_resblock.port.tracing import size_of
from flax_resblock.port.values import Value

__all__ = [
    "apply_operator",
    "convolutions",
    "elementwise",
    "images",
    "norms",
    "reductions",
    "shapes",
]


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
    if isinstance(node.meta.get("val"), int | float | bool) or hasattr(
        node.meta.get("val"), "node"
    ):
        return size_of(node.meta["val"])  # arithmetic with sizes
    name = name_of(node)
    if name.endswith("_") and not name.startswith("_"):
        name = name[:-1]
    if name not in RULES:
        raise reader.refusal(
            f"the operator {node.target} is not supported. Write it with operators that the "
            f"documentation lists (docs/port.md), or send us the line"
        )
    return RULES[name](reader, node, *node.args, **node.kwargs)


def _item(b: Any, sequence: Any, index: int) -> Any:
    found = b.number(sequence)
    return found.items[index] if isinstance(found, Value) else found[index]
