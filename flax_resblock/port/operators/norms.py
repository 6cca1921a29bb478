"""Norms as functions."""

from __future__ import annotations

from typing import Any

from flax_resblock.convert.codecs import (
    AS_IS,
    IOHW_HWIO,
    IOW_WIO,
    OIHW_HWIO,
    OIW_WIO,
    TRANSPOSED,
)
from flax_resblock.port import axes
from flax_resblock.port.layers import Layer
from flax_resblock.port.operator_names import name_of
from flax_resblock.port.operators.rules import plain_size, rule
from flax_resblock.port.values import Constant, Value


@rule("batch_norm")
def _batch_norm(
    b: Any, node: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, train: bool,
    momentum: float, eps: float, _: bool = False,
) -> Value:  # fmt: skip
    value = b.bring(b.value(x), axes.channels_last(len(b.value(x).shape)))
    told = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
    ours = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    names = {kind: b.own(node) for kind, node in told.items() if node is not None}
    if not train and mean is not None and names and None not in names.values():
        places = {names[kind]: (ours[kind], AS_IS) for kind in names}
        counter = names["running_mean"].replace("running_mean", "num_batches_tracked")
        if counter in dict(b.live.named_buffers(recurse=False)):
            places[counter] = ("num_batches_tracked", AS_IS)
        channels = b.value(mean).shape[0]
        options: dict[str, Any] = {} if eps == 1e-5 else {"eps": eps}
        if getattr(b.live, "momentum", momentum) != 0.1:
            options["momentum"] = getattr(b.live, "momentum", momentum)
        if weight is None:
            options["affine"] = False
        elif bias is None:
            options["use_bias"] = False
        layer = Layer("nn.BatchNorm", (channels,), options, places, True, inputs="channels_last")
        target = b.synthesised(layer, "norm", list(places))
        return b.apply(layer, target, value, value.shape)
    if train and mean is None:
        call, holes = "nn.batch_norm_by_batch", [weight, bias]
    elif not train:
        call, holes = "nn.batch_norm", [mean, var, weight, bias]
    else:
        raise b.refusal("a batch norm that updates its statistics in evaluation mode")
    texts = ["None" if one is None else "{}" for one in holes]
    values = [b.value(one) for one in holes if one is not None]
    text = f"{call}({{}}, {', '.join(texts)}, eps={{}})"
    eps_hole = Constant(eps, "eps")
    return b.new(text, (value, *values, eps_hole), value.shape, value.order, hint="norm")


@rule("group_norm", "layer_norm", "instance_norm")
def _other_norm(b: Any, node: Any, x: Any, *arguments: Any) -> Value:
    kind = name_of(node)
    value = b.value(x)
    rank = len(value.shape)
    defaults = (None, None, None, 1e-5)
    given: tuple[Any, ...] = (*arguments, *defaults[len(arguments) :])[:4]
    if kind == "group_norm":
        groups, weight, bias, eps = given
        first: tuple[Any, ...] = (groups, value.shape[1])
        call = "GroupNorm"
    elif kind == "layer_norm":
        shape, weight, bias, eps = given
        first = (plain_size(shape) if len(shape) == 1 else tuple(shape),)
        call = "LayerNorm"
        if len(shape) > 1:
            raise b.refusal("layer norm over several axes is not supported")
    else:
        weight, bias, mean, _var, by_batch, _momentum, eps, _ = arguments
        if not by_batch or mean is not None:
            raise b.refusal("an instance norm with running statistics as a function")
        first, call = (value.shape[1],), "InstanceNorm"
    default = 1e-5
    options = {} if eps == default else {"eps": eps}
    names = [b.own(one) for one in (weight, bias) if one is not None]
    if None in names or (names and weight is None):
        raise b.refusal(f"{kind} with a computed scale or shift, or a shift alone")
    if weight is None and call != "InstanceNorm":
        options["affine"] = False
    elif weight is not None and call == "InstanceNorm":
        options["affine"] = True
    if weight is not None and bias is None:
        options["use_bias"] = False
    places = {name: (ours, AS_IS) for name, ours in zip(names, ("scale", "bias"), strict=False)}
    inputs: Any = "last_axis" if kind == "layer_norm" else "channels_last"
    layer = Layer(f"nn.{call}", first, options, places, bool(places), inputs=inputs)
    if places:
        return b.apply(layer, b.synthesised(layer, "norm", names), value, value.shape)
    if inputs == "channels_last":
        value = b.bring(value, axes.channels_last(rank))
    call = {"GroupNorm": f"nn.group_norm({{}}, {first[0]}", "LayerNorm": "nn.layer_norm({}"}.get(
        call, "nn.instance_norm({}"
    )
    return b.new(
        f"{call}, eps={{}})", (value, Constant(eps, "eps")), value.shape, value.order, hint="norm"
    )


_KERNELS = {
    "conv1d": OIW_WIO,
    "conv2d": OIHW_HWIO,
    "conv_transpose1d": IOW_WIO,
    "conv_transpose2d": IOHW_HWIO,
    "linear": TRANSPOSED,
}


@rule("_weight_norm")
def _weight_norm(b: Any, node: Any, direction: Any, scale: Any, dim: int = 0) -> Value:
    """Computed in the memory layout in which the layer that uses it has its kernel."""
    value, factor = b.value(direction), b.value(scale)
    codecs = [_KERNELS[name_of(user)] for user in node.users if name_of(user) in _KERNELS]
    order = codecs[0].axes if codecs else value.order
    value = b.bring(value, order)
    factor = b.bring(factor, order) if factor.shape else factor
    return b.new("nn.weight_norm({}, {})", (value, factor), value.shape, order, hint="weight")
