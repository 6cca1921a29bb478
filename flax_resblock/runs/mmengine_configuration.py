"""What the configuration in a checkpoint of MMEngine says of the gradients."""

from __future__ import annotations

import ast
import warnings
from typing import Any

_LONGEST = 1 << 20
"""Characters of a configuration; those of its projects have some ten thousand."""


def gradient_settings(text: Any) -> dict[str, Any]:
    """How gradients are clipped, ``clip_grad`` and ``clip_mode`` as timm's script has them, by a
    configuration in Python, which is parsed and not executed; empty if they are not clipped, or if
    it is no such text."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings with unknown escapes
            lines = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    wrapper = {}
    for line in lines:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "optim_wrapper":
            wrapper = _arguments(line.value)
    clip = _arguments(wrapper.get("clip_grad"))
    kind, norm = (
        _literal(clip.get(name), usual) for name, usual in (("type", "norm"), ("norm_type", 2))
    )
    largest = _literal(clip.get("max_norm"), _literal(clip.get("clip_value")))
    if largest is None:
        return {}
    by_norm = kind == "norm" and norm == 2
    return {"clip_grad": largest, "clip_mode": "norm" if by_norm else f"{kind}, norm_type={norm}"}


def _arguments(call: ast.expr | None) -> dict[str, ast.expr]:
    """The arguments of ``dict(name=value)``, or the entries of ``{"name": value}``."""
    if isinstance(call, ast.Call):
        return {one.arg: one.value for one in call.keywords if one.arg}
    if isinstance(call, ast.Dict):
        pairs = zip(call.keys, call.values, strict=True)
        return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}
    return {}


def _literal(node: ast.expr | None, usual: Any = None) -> Any:
    return node.value if isinstance(node, ast.Constant) else usual
