"""Rows of the table of leaf modules: pooling, padding and resizing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flax_resblock.errors import InputError
from flax_resblock.port.layer import Layer, layer, plain, whole


def max_pool(m: Any) -> Layer:
    if m.return_indices:
        raise InputError(f"{m} returns indices too, which is not supported.")
    return layer(
        "max_pool",
        m.kernel_size,
        stride=None if m.stride == m.kernel_size else m.stride,
        padding=m.padding,
        dilation=m.dilation,
        ceil_mode=m.ceil_mode,
        inputs="channels_last",
    )


def avg_pool(m: Any) -> Layer:
    return layer(
        "avg_pool",
        m.kernel_size,
        stride=None if plain(m.stride) == plain(m.kernel_size) else m.stride,
        padding=m.padding,
        ceil_mode=m.ceil_mode,
        count_include_pad=m.count_include_pad,
        divisor_override=getattr(m, "divisor_override", None),
        inputs="channels_last",
    )


def lp_pool(m: Any) -> Layer:
    return layer(
        "lp_pool",
        m.norm_type,
        m.kernel_size,
        stride=m.stride,
        ceil_mode=m.ceil_mode,
        inputs="channels_last",
    )


def adaptive_pool(call: str, m: Any) -> Layer:
    if getattr(m, "return_indices", False):
        raise InputError(f"{m} returns indices too, which is not supported.")
    return layer(call, m.output_size, inputs="channels_last")


def pad(mode: str, m: Any) -> Layer:
    """PyTorch's widths begin with the last axis."""
    ends = [m.padding[at : at + 2] for at in range(0, len(m.padding), 2)]
    widths = ((0, 0), *(tuple(pair) for pair in reversed(ends)), (0, 0))
    value = getattr(m, "value", 0.0) if mode == "constant" else 0.0
    found = layer("pad", mode=mode, value=value, inputs="channels_last")
    return replace(found, positional=(widths,))


def upsample(m: Any) -> Layer:
    return layer(
        "interpolate",
        size=m.size,
        scale_factor=whole(m.scale_factor),
        mode=m.mode,
        align_corners=m.align_corners,
        recompute_scale_factor=m.recompute_scale_factor or None,
        inputs="channels_last",
    )
