"""The names of ATen operators."""

from __future__ import annotations

from typing import Any

_ALIASES = {
    "absolute": "abs",
    "arctan": "atan",
    "clip": "clamp",
    "concatenate": "cat",
    "concat": "cat",
    "divide": "div",
    "fix": "trunc",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "linalg_matmul": "matmul",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_erf": "erf",
    "special_exp2": "exp2",
    "special_expit": "sigmoid",
    "special_expm1": "expm1",
    "special_log1p": "log1p",
    "special_log_softmax": "log_softmax",
    "special_logsumexp": "logsumexp",
    "special_softmax": "softmax",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
}
"""Operators that are others under another name."""

RESHAPES = {"view", "reshape", "flatten", "unflatten", "expand", "view_as", "reshape_as"}
"""Operators among whose numbers are the sizes of what they return."""

RANDOM = {
    *("bernoulli", "exponential", "multinomial", "normal", "poisson", "rand", "rand_like"),
    *("randint", "randn", "randn_like", "randperm", "random", "rrelu_with_noise", "uniform"),
}
"""Operators that draw random numbers, besides dropout."""


def name_of(node: Any) -> str:
    """``"add"`` for ``aten.add_.Tensor``."""
    name = str(node.target).removeprefix("aten.").removeprefix("flax_resblock.").partition(".")[0]
    name = name[:-1] if name.endswith("_") and not name.startswith("_") else name
    return _ALIASES.get(name, name)
