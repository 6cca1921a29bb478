"""What a network returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def logits_of(outputs: Any) -> tuple[Any, list[Any]]:
    """The logits among what a network returns, and those of its auxiliary heads.

    Args:
      outputs: One array; a tuple or list, the logits first; or a mapping, the logits under
        ``"logits"`` or ``"out"``, else first. None stands for a head that is left out.
    """
    if isinstance(outputs, Mapping):
        named = {key: one for key, one in outputs.items() if one is not None}
        main = next((key for key in ("logits", "out") if key in named), next(iter(named), None))
        return named.pop(main, None), list(named.values())
    if isinstance(outputs, tuple | list):
        first, *rest = [one for one in outputs if one is not None] or [None]
        return first, rest
    return outputs, []
