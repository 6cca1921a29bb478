"""The table of operators, and what its rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import same_size
from flax_resblock.port.values import Value

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}
"""By the name of the operator without its overload: ``"max_pool2d"``."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule, called with the reader, the node and the operator's arguments."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def word(text: str) -> str:
    """``"relu"`` for ``"nn.relu({})"``: a name for what a function returns."""
    return text.partition("(")[0].rpartition(".")[2] or "x"


def along(b: Values, value: Value, dim: Any) -> int:
    """Our axis for PyTorch's, counted from the end where it is the last."""
    place = value.order.index(int(b.number(dim)) % len(value.shape))
    return -1 if place == len(value.shape) - 1 else place


def several(b: Values, items: list[Any]) -> Value:
    """What an operator with several results returns; None stands for indices."""
    whole = b.new("{}", (items[0],), (), ())
    whole.items = items
    return whole


def plain_size(size: Any) -> Any:
    """``[3, 3]`` as 3."""
    if isinstance(size, (tuple, list)):
        return size[0] if size and all(same_size(one, size[0]) for one in size) else tuple(size)
    return size
