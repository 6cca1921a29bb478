"""Convolutions and linear maps as functions."""

from __future__ import annotations

from typing import Any

from flax_resblock.convert.codecs import AS_IS, IOHW_HWIO, IOW_WIO, OIHW_HWIO, OIW_WIO, TRANSPOSED
from flax_resblock.port import axes
from flax_resblock.port.layers import Layer
from flax_resblock.port.operators.elementwise import binary
from flax_resblock.port.operators.rules import plain_size, rule
from flax_resblock.port.sizes import shape_of
from flax_resblock.port.values import PRODUCT, Constant, Value


@rule("conv1d", "conv2d")
def _conv(
    b: Any, node: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    kernel, value = b.value(weight), b.value(x)
    rank = len(kernel.shape)
    codec = OIHW_HWIO if rank == 4 else OIW_WIO
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options = {
        name: plain_size(size)
        for name, size in sizes.items()
        if plain_size(size) != (0 if name == "padding" else 1)
    }
    name, offset = b.own(weight), None if bias is None else b.own(bias)
    if name is not None and (bias is None) == (offset is None):
        out, per_group, *window = kernel.shape
        places = {name: ("kernel", codec), **({offset: ("bias", AS_IS)} if offset else {})}
        options |= {"use_bias": True} if offset else {}
        layer = Layer(
            "nn.Conv" if rank == 4 else "nn.Conv1d",
            (per_group * groups, out, plain_size(window)), options, places, True,
            inputs="channels_last",
        )  # fmt: skip
        target = b.synthesised(layer, "conv", list(places))
        return b.apply(layer, target, value, shape_of(node))
    value = b.bring(value, axes.channels_last(rank))
    holes = [value, b.bring(kernel, codec.axes)]
    text = "nn.convolve({}, {}"
    if bias is not None:
        text += ", {}"
        holes.append(b.value(bias))
    text += "".join(f", {one}={{}}" for one in options) + ")"
    holes += [Constant(size, one) for one, size in options.items()]
    return b.new(text, holes, shape_of(node), axes.channels_last(rank), hint="conv")


@rule("conv_transpose1d", "conv_transpose2d")
def _conv_transpose(
    b: Any, node: Any, x: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Value:  # fmt: skip
    kernel, value = b.value(weight), b.value(x)
    rank = len(kernel.shape)
    codec = IOHW_HWIO if rank == 4 else IOW_WIO
    sizes = {
        "stride": (stride, 1), "padding": (padding, 0), "output_padding": (output_padding, 0),
        "groups": (groups, 1), "dilation": (dilation, 1),
    }  # fmt: skip
    options = {
        name: plain_size(size) for name, (size, most) in sizes.items() if plain_size(size) != most
    }
    value = b.bring(value, axes.channels_last(rank))
    holes = [value, b.bring(kernel, codec.axes), *([] if bias is None else [b.value(bias)])]
    text = f"nn.conv_transpose({', '.join('{}' for _ in holes)}"
    text += "".join(f", {one}={{}}" for one in options) + ")"
    holes += [Constant(size, one) for one, size in options.items()]
    return b.new(text, holes, shape_of(node), axes.channels_last(rank), hint="conv")


@rule("linear")
def _linear(b: Any, node: Any, x: Any, weight: Any, bias: Any = None) -> Value:
    kernel, value = b.value(weight), b.value(x)
    name, offset = b.own(weight), None if bias is None else b.own(bias)
    if name is not None and (bias is None) == (offset is None):
        places = {name: ("kernel", TRANSPOSED), **({offset: ("bias", AS_IS)} if offset else {})}
        options = {} if offset else {"use_bias": False}
        layer = Layer("nn.Linear", kernel.shape[::-1], options, places, True, inputs="last_axis")
        return b.apply(layer, b.synthesised(layer, "linear", list(places)), value, shape_of(node))
    if value.order[-1] != len(value.shape) - 1:
        value = b.bring(value, axes.torch_order(len(value.shape)))
    product = b.new(
        "{2} @ {3}", (value, b.bring(kernel, (1, 0))), shape_of(node), value.order,
        binding=PRODUCT, hint="linear",
    )  # fmt: skip
    return product if bias is None else binary(b, node, "+", product, b.value(bias), "linear")
