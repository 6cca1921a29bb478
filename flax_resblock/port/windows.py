"""Pools and places whose window or number follows from a size, where PyTorch's own operators take
numbers alone: a trace has operators of this library in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_OPTIONS: dict[str, dict[str, Any]] = {
    "avg": {"ceil_mode": False, "count_include_pad": True, "divisor_override": None},
    "max": {"dilation": 1, "ceil_mode": False, "return_indices": False},
}
"""What else a pool takes, with its defaults."""


def _pooled(x: Any, window: Any, stride: Any, padding: Any) -> Any:
    """A tensor of the shape of what a pool returns."""
    sizes = zip(x.shape[2:], window, stride, padding, strict=True)
    return x.new_empty(*x.shape[:2], *((n + 2 * p - k) // s + 1 for n, k, s, p in sizes))


_LIBRARY = torch.library.Library("flax_resblock", "FRAGMENT")
for _name in ("avg_pool1d", "avg_pool2d", "max_pool1d", "max_pool2d"):
    _LIBRARY.define(
        f"{_name}(Tensor x, SymInt[] window, SymInt[] stride, SymInt[] padding) -> Tensor"
    )
    _LIBRARY.impl(_name, _pooled, "Meta")


_LIBRARY.define("spaced(Tensor places, Scalar start, Scalar end) -> Tensor")
_LIBRARY.impl("spaced", lambda places, *_: places.new_empty(places.shape), "Meta")


class Windows(TorchFunctionMode):
    """Within it, what follows from a size does so in the trace too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, named = getattr(func, "__name__", ""), kwargs or {}
        if name == "linspace" and isinstance(args[-1], torch.SymInt) and len(args) == 3:
            dtype = named.get("dtype") or torch.get_default_dtype()
            return torch.ops.flax_resblock.spaced(torch.arange(args[2], dtype=dtype), *args[:2])
        options = _OPTIONS.get(name[:3])
        if options is None or not hasattr(torch.ops.flax_resblock, name):
            return func(*args, **named)
        names = ("input", "kernel_size", "stride", "padding", *options)
        given = {**dict(zip(names, args, strict=False)), **named}
        rank = int(name[-2])
        window, stride, padding = (
            list(one) if isinstance(one, tuple | list) else [one] * rank
            for one in (
                given["kernel_size"],
                given.get("stride") or given["kernel_size"],
                given.get("padding", 0),
            )
        )
        symbols = any(isinstance(one, torch.SymInt) for one in (*window, *stride))
        if not symbols or any(given.get(key, one) != one for key, one in options.items()):
            return func(*args, **named)
        own = getattr(torch.ops.flax_resblock, name)
        return own(given["input"], window, stride, padding)
