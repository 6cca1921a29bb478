"""The table of leaf modules: class by class, the layer or function that takes its place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flax_resblock.convert.codecs import (
    AS_IS,
    CHW_HWC,
    IOHW_HWIO,
    IOW_WIO,
    OIHW_HWIO,
    OIW_WIO,
    TRANSPOSED,
    Codec,
)
from flax_resblock.port import window_rows as rows
from flax_resblock.port.layer import Inputs, Layer, celu_options, layer, present

_BIAS = ("bias", AS_IS)


_CONV = ("stride", "padding", "dilation", "groups", "padding_mode")
_TRANSPOSED = ("stride", "padding", "output_padding", "dilation", "groups")


def _conv(call: str, kernel: Codec, m: Any, options: Sequence[str] = _CONV) -> Layer:
    return layer(
        call,
        m.in_channels,
        m.out_channels,
        m.kernel_size,
        **{name: getattr(m, name) for name in options},
        use_bias=m.bias is not None,
        tensors=present(m, weight=("kernel", kernel), bias=_BIAS),
        stateful=True,
        inputs="channels_last",
    )


def _linear(m: Any) -> Layer:
    return layer(
        "Linear",
        m.in_features,
        m.out_features,
        use_bias=m.bias is not None,
        tensors=present(m, weight=("kernel", TRANSPOSED), bias=_BIAS),
        stateful=True,
        inputs="last_axis",
    )


_STATISTICS = {"running_mean": ("mean", AS_IS), "running_var": ("var", AS_IS)}
_COUNTER = {"num_batches_tracked": ("num_batches_tracked", AS_IS)}


def _running_norm(call: str, m: Any) -> Layer:
    """Batch and instance norm."""
    return layer(
        call,
        m.num_features,
        eps=m.eps,
        momentum=m.momentum,
        affine=m.affine,
        use_bias=m.bias is not None or not m.affine,
        track_running_stats=m.track_running_stats,
        tensors=present(m, weight=("scale", AS_IS), bias=_BIAS, **_STATISTICS, **_COUNTER),
        stateful=True,
        inputs="channels_last",
    )


def _frozen_batch_norm(m: Any) -> Layer:
    return layer(
        "FrozenBatchNorm",
        m.weight.shape[0],
        eps=m.eps,
        tensors=present(m, weight=("scale", AS_IS), bias=_BIAS, **_STATISTICS),
        stateful=True,
        inputs="channels_last",
    )


def _group_norm(m: Any) -> Layer:
    return layer(
        "GroupNorm",
        m.num_groups,
        m.num_channels,
        eps=m.eps,
        affine=m.affine,
        use_bias=m.bias is not None or not m.affine,
        tensors=present(m, weight=("scale", AS_IS), bias=_BIAS),
        stateful=True,
        inputs="channels_last",
    )


def _layer_norm(m: Any) -> Layer | None:
    """Over the last axis, or over an image's channels and pixels."""
    shape = tuple(m.normalized_shape)
    if len(shape) not in (1, 3):
        return None  # which axes these are is seen in the trace alone
    codec = AS_IS if len(shape) == 1 else CHW_HWC
    found = layer(
        "LayerNorm",
        eps=m.eps,
        affine=m.elementwise_affine,
        use_bias=m.bias is not None or not m.elementwise_affine,
        tensors=present(m, weight=("scale", codec), bias=("bias", codec)),
        stateful=True,
        inputs="last_axis" if len(shape) == 1 else "channels_last",
    )
    ours = shape[0] if len(shape) == 1 else (*shape[1:], shape[0])
    return replace(found, positional=(ours,))


def _local_response_norm(m: Any) -> Layer:
    options = {"alpha": m.alpha, "beta": m.beta, "k": m.k}
    return layer("local_response_norm", m.size, **options, inputs="channels_last")


def _dropout(axes: tuple[int, ...], m: Any) -> Layer:
    """``axes``: those that are dropped together, after the batch."""
    inputs: Inputs = "channels_last" if axes else "elementwise"
    found = layer("Dropout", m.p, stateful=True, random=True, inputs=inputs)
    return replace(found, options={"broadcast_dims": axes} if axes else {})


def _alpha_dropout(m: Any) -> Layer:
    return layer("AlphaDropout", m.p, stateful=True, random=True)


def _stochastic_depth(m: Any) -> Layer:
    return layer("StochasticDepth", m.p, mode=m.mode, stateful=True, random=True)


def _drop_path(m: Any) -> Layer:
    scale = m.scale_by_keep
    return layer(
        "StochasticDepth", m.drop_prob or 0.0, scale_by_keep=scale, stateful=True, random=True
    )


def _rrelu(m: Any) -> Layer:
    return layer("RReLU", lower=m.lower, upper=m.upper, stateful=True, random=True)


def _prelu(m: Any) -> Layer:
    return layer(
        "PReLU",
        m.num_parameters,
        tensors={"weight": ("weight", AS_IS)},
        stateful=True,
        inputs="elementwise" if m.num_parameters == 1 else "channels_last",
    )


def _softmax(call: str, m: Any) -> Layer | None:
    return layer(call, inputs="channels_last") if m.dim == 1 else None


def _plainly(call: str, **options: str) -> Callable[[Any], Layer]:
    """An elementwise function; ``options``: its keyword -> the module's attribute."""
    return lambda m: layer(call, **{name: getattr(m, told) for name, told in options.items()})


ROWS: dict[str, Callable[[Any], Layer | None]] = {
    "torch.nn.Conv1d": partial(_conv, "Conv1d", OIW_WIO),
    "torch.nn.Conv2d": partial(_conv, "Conv", OIHW_HWIO),
    "torch.nn.ConvTranspose1d": partial(_conv, "ConvTranspose1d", IOW_WIO, options=_TRANSPOSED),
    "torch.nn.ConvTranspose2d": partial(_conv, "ConvTranspose", IOHW_HWIO, options=_TRANSPOSED),
    "torch.nn.Linear": _linear,
    "torch.nn.BatchNorm1d": partial(_running_norm, "BatchNorm"),
    "torch.nn.BatchNorm2d": partial(_running_norm, "BatchNorm"),
    "torch.nn.SyncBatchNorm": partial(_running_norm, "BatchNorm"),
    "torchvision.ops.misc.FrozenBatchNorm2d": _frozen_batch_norm,
    "torch.nn.InstanceNorm1d": partial(_running_norm, "InstanceNorm"),
    "torch.nn.InstanceNorm2d": partial(_running_norm, "InstanceNorm"),
    "torch.nn.GroupNorm": _group_norm,
    "torch.nn.LayerNorm": _layer_norm,
    "torch.nn.LocalResponseNorm": _local_response_norm,
    "torch.nn.MaxPool1d": rows.max_pool,
    "torch.nn.MaxPool2d": rows.max_pool,
    "torch.nn.AvgPool1d": rows.avg_pool,
    "torch.nn.AvgPool2d": rows.avg_pool,
    "torch.nn.LPPool1d": rows.lp_pool,
    "torch.nn.LPPool2d": rows.lp_pool,
    "torch.nn.AdaptiveAvgPool1d": partial(rows.adaptive_pool, "adaptive_avg_pool"),
    "torch.nn.AdaptiveAvgPool2d": partial(rows.adaptive_pool, "adaptive_avg_pool"),
    "torch.nn.AdaptiveMaxPool1d": partial(rows.adaptive_pool, "adaptive_max_pool"),
    "torch.nn.AdaptiveMaxPool2d": partial(rows.adaptive_pool, "adaptive_max_pool"),
    **{
        f"torch.nn.{kind}{axes}d": partial(rows.pad, mode)
        for axes in (1, 2)
        for kind, mode in {
            "ZeroPad": "constant",
            "ConstantPad": "constant",
            "ReflectionPad": "reflect",
            "ReplicationPad": "replicate",
            "CircularPad": "circular",
        }.items()
    },
    "torch.nn.Upsample": rows.upsample,
    "torch.nn.UpsamplingNearest2d": rows.upsample,
    "torch.nn.UpsamplingBilinear2d": rows.upsample,
    "torch.nn.PixelShuffle": lambda m: layer(
        "pixel_shuffle", m.upscale_factor, inputs="channels_last"
    ),
    "torch.nn.PixelUnshuffle": lambda m: layer(
        "pixel_unshuffle", m.downscale_factor, inputs="channels_last"
    ),
    "torch.nn.ChannelShuffle": lambda m: layer("channel_shuffle", m.groups, inputs="channels_last"),
    "torch.nn.Dropout": partial(_dropout, ()),
    "torch.nn.Dropout1d": partial(_dropout, (1,)),
    "torch.nn.Dropout2d": partial(_dropout, (1, 2)),
    "torch.nn.AlphaDropout": _alpha_dropout,
    "torchvision.ops.stochastic_depth.StochasticDepth": _stochastic_depth,
    "timm.layers.drop.DropPath": _drop_path,
    "timm.layers.linear.Linear": _linear,
    "timm.layers.activations.GELU": _plainly("gelu"),
    "timm.layers.activations.Sigmoid": _plainly("sigmoid"),
    "torch.nn.RReLU": _rrelu,
    "torch.nn.PReLU": _prelu,
    "torch.nn.Identity": _plainly("identity"),
    "torch.nn.ReLU": _plainly("relu"),
    "torch.nn.ReLU6": _plainly("relu6"),
    "torch.nn.LeakyReLU": _plainly("leaky_relu", slope="negative_slope"),
    "torch.nn.ELU": _plainly("elu", alpha="alpha"),
    "torch.nn.SELU": _plainly("selu"),
    "torch.nn.CELU": lambda m: layer("celu", **celu_options(m.alpha, m.inplace)),
    "torch.nn.GELU": lambda m: layer("gelu", approximate=m.approximate == "tanh"),
    "torch.nn.SiLU": _plainly("silu"),
    "torch.nn.Mish": _plainly("mish"),
    "torch.nn.Sigmoid": _plainly("sigmoid"),
    "torch.nn.LogSigmoid": _plainly("log_sigmoid"),
    "torch.nn.Tanh": _plainly("tanh"),
    "torch.nn.Tanhshrink": _plainly("tanhshrink"),
    "torch.nn.Hardtanh": _plainly("hardtanh", min_value="min_val", max_value="max_val"),
    "torch.nn.Hardswish": _plainly("hardswish"),
    "torch.nn.Hardsigmoid": _plainly("hardsigmoid"),
    "torch.nn.Hardshrink": _plainly("hardshrink", lambd="lambd"),
    "torch.nn.Softshrink": _plainly("softshrink", lambd="lambd"),
    "torch.nn.Softplus": _plainly("softplus", beta="beta", threshold="threshold"),
    "torch.nn.Softsign": _plainly("softsign"),
    "torch.nn.Threshold": lambda m: layer("threshold", m.threshold, m.value),
    "torch.nn.Softmax": partial(_softmax, "softmax"),
    "torch.nn.Softmax2d": lambda m: layer("softmax", inputs="channels_last"),
    "torch.nn.LogSoftmax": partial(_softmax, "log_softmax"),
    "torch.nn.GLU": partial(_softmax, "glu"),
}
"""Class -> its layer. Names instead of classes: nothing is imported for a class not met."""
