"""Pooling, padding and resizing as functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax_resblock.port import axes
from flax_resblock.port.layer import whole
from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.rules import RULES, Rule, plain_size, rule, several
from flax_resblock.port.placing import Values
from flax_resblock.port.sizes import follows, number_of, shape_of
from flax_resblock.port.values import Constant, Value


def _pool(call: str, names: Sequence[str], defaults: Sequence[Any]) -> Rule:
    def apply(b: Values, node: Any, x: Any, window: Any, *rest: Any, **named: Any) -> Value:
        value = b.value(x)
        value = b.bring(value, axes.channels_last(len(value.shape)))
        given = {**dict(zip(names, rest, strict=False)), **named}
        window = plain_size(window)
        shown = {}
        for name, default in zip(names, defaults, strict=True):
            size = plain_size(given.get(name, default))
            size = None if name == "stride" and size in ((), [], window) else size
            if size != default or follows(size):
                shown[name] = size
        text = f"nn.{call}({{}}, {{}}" + "".join(f", {name}={{}}" for name in shown) + ")"
        holes = [value, Constant(window, "window")]
        holes += [Constant(size, name) for name, size in shown.items()]
        return b.new(text, holes, shape_of(node), value.order, hint="pooled")

    return apply


for _rank in ("1d", "2d", "3d"):
    RULES[f"max_pool{_rank}"] = _pool(
        "max_pool", ("stride", "padding", "dilation", "ceil_mode"), (None, 0, 1, False)
    )
    RULES[f"avg_pool{_rank}"] = _pool(
        "avg_pool",
        ("stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        (None, 0, False, True, None),
    )
    RULES[f"adaptive_avg_pool{_rank}"] = _pool("adaptive_avg_pool", (), ())


@rule("adaptive_max_pool2d", "adaptive_max_pool1d")
def _adaptive_max(b: Values, node: Any, x: Any, size: Any) -> Value:
    value = b.value(x)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    shape = tuple(number_of(one) for one in node.meta["val"][0].shape)
    holes = (value, Constant(plain_size(size), "size"))
    pooled = b.new("nn.adaptive_max_pool({}, {})", holes, shape, value.order, hint="pooled")
    return several(b, [pooled, None])


@rule("pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d", "zero_pad2d")
@rule("reflection_pad1d", "replication_pad1d")
def _pad(b: Values, node: Any, x: Any, widths: Any, *rest: Any, **named: Any) -> Value:
    name = name_of(node)
    value = b.settled(b.value(x))
    rank = len(value.shape)
    mode, amount = "constant", None
    if name == "pad":
        mode = rest[0] if rest else named.get("mode", "constant")
        amount = rest[1] if len(rest) > 1 else named.get("value")
    elif name == "constant_pad_nd":
        amount = rest[0] if rest else named.get("value")
    elif name != "zero_pad2d":
        mode = "reflect" if "reflection" in name else "replicate"
    widths = [b.number(width) for width in widths]
    by_axis = {
        rank - 1 - place: tuple(widths[2 * place : 2 * place + 2])
        for place in range(len(widths) // 2)
    }
    if not any(widths) and not any(map(follows, widths)):
        return value
    ours = tuple(by_axis.get(axis, (0, 0)) for axis in value.order)
    text, holes = "nn.pad({}, {}", [value, Constant(ours, "widths")]
    if mode != "constant":
        text += f", mode={mode!r}"
    elif amount:
        text += ", value={}"
        holes.append(Constant(amount, "value"))
    return b.new(text + ")", holes, shape_of(node), value.order, hint="padded")


@rule("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest1d")
@rule(
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "_upsample_nearest_exact2d",
    "upsample_linear1d",
)
def _upsample(b: Values, node: Any, x: Any, size: Any, *rest: Any) -> Value:
    name = name_of(node)
    value = b.value(x)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    mode = next(
        one for one in ("nearest_exact", "nearest", "bilinear", "bicubic", "linear") if one in name
    )
    align = "nearest" not in mode and bool(rest[0])
    scales = rest[-1] if rest and isinstance(rest[-1], (list, tuple)) else None
    if size is not None or scales is None:
        sizes = shape_of(node)[2:]
        text, holes = "size={}", [Constant(sizes, "size")]
    else:
        text, holes = "scale_factor={}", [Constant(whole(plain_size(scales)), "scale_factor")]
    text = f"nn.interpolate({{}}, {text}, mode={mode.replace('_', '-')!r}"
    text += ", align_corners=True" if align else ""
    text += ", antialias=True)" if name.endswith("_aa") else ")"
    return b.new(text, (value, *holes), shape_of(node), value.order, hint="resized")


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle")
def _shuffle(b: Values, node: Any, x: Any, factor: int) -> Value:
    name = name_of(node).removeprefix("native_")
    value = b.value(x)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    holes = (value, Constant(factor, "factor"))
    return b.new(f"nn.{name}({{}}, {{}})", holes, shape_of(node), value.order, hint="shuffled")


@rule("im2col", "col2im")
def _unfold(b: Values, node: Any, x: Any, *sizes: Any) -> Value:
    call = "unfold" if name_of(node) == "im2col" else "fold"
    value, shape = b.value(x), shape_of(node)
    value = b.bring(value, axes.channels_last(len(value.shape)))
    *given, dilation, padding, stride = (plain_size(size) for size in sizes)
    options = {"dilation": dilation, "padding": padding, "stride": stride}
    shown = {k: v for k, v in options.items() if v != (0 if k == "padding" else 1)}
    text = f"nn.{call}({{}}{', {}' * len(given)}{''.join(f', {name}={{}}' for name in shown)})"
    holes = [
        *(Constant(size, "size") for size in given),
        *(Constant(v, k) for k, v in shown.items()),
    ]
    return b.new(text, (value, *holes), shape, axes.channels_last(len(shape)), hint=f"{call}ed")


@rule("grid_sampler", "grid_sampler_2d")
def _grid_sample(
    b: Values, node: Any, x: Any, grid: Any, mode: int, padding: int, align: bool
) -> Value:
    value, places = b.value(x), b.value(grid)
    if len(value.shape) != 4 or mode > 1 or padding > 1:
        raise b.refusal(
            "grid_sample with mode='bicubic', padding_mode='reflection' or three spatial axes is "
            "not supported; bilinear and nearest with zeros or border are"
        )
    value = b.bring(value, axes.channels_last(4))
    places = b.bring(places, axes.torch_order(4))
    text = "nn.grid_sample({}, {}" + (", mode='nearest'" if mode else "")
    text += ", padding_mode='border'" if padding else ""
    text += ", align_corners=True)" if align else ")"
    return b.new(text, (value, places), shape_of(node), value.order, hint="sampled")


@rule("affine_grid_generator")
def _affine_grid(b: Values, node: Any, theta: Any, size: Any, align: bool) -> Value:
    value = b.bring(b.value(theta), axes.torch_order(3))
    if len(size) != 4:
        raise b.refusal("affine_grid with three spatial axes is not supported")
    sizes = shape_of(node)[1:3]
    holes = (value, Constant(sizes, "size"))
    text = "nn.affine_grid({}, {}" + (", align_corners=True)" if align else ")")
    return b.new(text, holes, shape_of(node), axes.torch_order(4), hint="grid")
