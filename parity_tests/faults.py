"""Ways to get a network wrong, on either side; docs/verification.md lists them in a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from jax import lax
from torch.nn import functional as F

from flax_resblock import BlockConfig, ResNetConfig
from flax_resblock.nn.blocks import ResidualBlock
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.norm import BatchNorm, batch_moments
from flax_resblock.nn.pooling import MaxPool
from flax_resblock.nn.resnet import ResNet, StemLayers
from flax_resblock.parity.reference import ReferencePair
from torch_ref import BasicBlock

NETWORK = ResNetConfig(depths=(1, 1), widths=(6, 10), stem_width=6, num_classes=5)
BLOCK = BlockConfig(in_channels=6, out_channels=6)
STRIDED = BlockConfig(in_channels=6, out_channels=6, stride=2)
OPTION_A = BlockConfig(in_channels=4, out_channels=10, stride=2, shortcut="zero_pad")


@dataclass(frozen=True)
class Faulty(ReferencePair):
    """A pair with one side tampered with; the specification is still the untouched network."""

    edit: Callable[[Any], None] = lambda _: None
    side: str = "flax"

    def torch(self, precision):
        module = super().torch(precision)
        if self.side == "torch":
            with torch.no_grad():
                self.edit(module)
        return module

    def flax(self, precision):
        model = super().flax(precision)
        if self.side == "flax":
            self.edit(model)
        return model

    def specification(self):
        return ReferencePair(self.config, self.state, self.norm_options)


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
      name: For people.
      side: Which framework's side has it.
      edit: Makes it, in a model built from ``config``.
      slot: Where the diagnosis must find it; None: it is everywhere.
      cause: What the diagnosis must call it; None: it need only be found.
      config: The network or block.
      gradients: It shows in the gradients only."""

    name: str
    side: str
    edit: Callable[[Any], None]
    slot: str | None
    cause: str | None
    config: ResNetConfig | BlockConfig = NETWORK
    gradients: bool = False


def _part(model: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        model = model[part] if isinstance(part, int) else getattr(model, part)
    return model


def _as(cls: type, *path: Any, **attributes: Any) -> Callable[[Any], None]:
    """Turns the module at an attribute path into another class and sets attributes."""

    def edit(model: Any) -> None:
        model = _part(model, path)
        model.__class__ = cls
        for name, value in attributes.items():
            setattr(model, name, value)

    return edit


def _set(attribute: str, value: Any, *path: Any) -> Callable[[Any], None]:
    return lambda model: setattr(_part(model, path), attribute, value)


def _all_norms(**attributes: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for _, module in nnx.iter_modules(model):
            if isinstance(module, BatchNorm):
                for name, value in attributes.items():
                    setattr(module, name, value)

    return edit


def _tensor(
    change: Callable[[jax.Array], jax.Array], name: str, *path: Any
) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        variable = getattr(_part(model, path), name)
        variable.set_value(change(variable[...]))

    return edit


def _replaced(name: str, module: Callable[[Any], torch.nn.Module]) -> Callable[[Any], None]:
    """Replaces a submodule of a torch module by one made from it."""

    def edit(model: Any) -> None:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module(model.get_submodule(name)))

    return edit


def forward_of(cls: type, forward: Callable[..., Any], *path: Any) -> Callable[[Any], None]:
    """Gives a module another ``__call__`` (nnx) or ``forward`` (torch)."""
    return _as(
        type(
            f"Faulty{cls.__name__}",
            (cls,),
            {"__call__" if issubclass(cls, nnx.Module) else "forward": forward},
        ),
        *path,
    )


def _exchange(block: Any) -> None:
    first, second = block.conv1.kernel[...], block.conv2.kernel[...]
    block.conv1.kernel.set_value(second)
    block.conv2.kernel.set_value(first)


def _same(self, x):
    return lax.conv_general_dilated(
        x, self.kernel[...], (self.stride,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def rounded_conv(bits: int):
    def call(self, x):
        def cut(v):
            mantissa, exponent = jnp.frexp(v)
            return jnp.ldexp(jnp.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)

        kernel = self.kernel[...]
        pads = ((self.padding,) * 2,) * 2
        return lax.conv_general_dilated(
            cut(x),
            cut(kernel),
            (self.stride,) * 2,
            pads,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return call


def _half_norm(self, x, *, use_running_average=None):
    return BatchNorm.__call__(
        self, x.astype(jnp.float32), use_running_average=use_running_average
    ).astype(x.dtype)


def _biased(self, batch):
    BatchNorm._track(self, batch._replace(unbiased_var=batch.biased_var))


def _constant_statistics(self, x, *, use_running_average=None):
    if use_running_average is None:
        use_running_average = self.use_running_average
    if use_running_average:
        return BatchNorm.__call__(self, x, use_running_average=True)
    moments = batch_moments(lax.stop_gradient(x))
    self._track(moments)
    return (x - moments.mean) * lax.rsqrt(moments.biased_var + self.eps) * self.scale[
        ...
    ] + self.bias[...]


def _instance_norm(self, x, *, use_running_average=None):
    mean, var = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
    return (x - mean) * lax.rsqrt(var + self.eps) * self.scale[...] + self.bias[...]


def _block(
    ending: Callable[..., Any], between: Callable[[Any], Any] = nnx.relu
) -> Callable[..., Any]:
    def call(self, x, *, use_running_average=None):
        y = between(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return ending(y, self.shortcut(x), x)

    return call


def _torch_block(self, x):
    """The skip is added before the last norm."""
    y = self.conv2(torch.relu(self.bn1(self.conv1(x))))
    return torch.relu(self.bn2(y + (self.downsample(x) if self.downsample is not None else x)))


def _stem(
    before: Callable[[Any], Any] = lambda x: x, activation: Callable[[Any], Any] = nnx.relu
) -> Callable[..., Any]:
    def call(self, images, *, use_running_average=None):
        x = activation(self.norm(self.conv(before(images))))
        return x if self.pool is None else self.pool(x)

    return call


def _network(pool: Callable[[Any], Any]) -> Callable[..., Any]:
    def call(self, images, *, use_running_average=None):
        x = self.stem(images)
        for name in self.config.stage_names:
            for block in getattr(self, name):
                x = block(x)
        return self.head(pool(x))

    return call


class _BiasedUpdate(torch.nn.BatchNorm2d):
    def forward(self, x):
        old, y = self.running_var.clone(), super().forward(x)
        if self.training:
            n = x.numel() / x.shape[1]
            self.running_var.copy_(
                old + (self.running_var - old) - self.momentum * x.detach().var((0, 2, 3)) / n
            )
        return y


class _Frozen(torch.nn.BatchNorm2d):
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class _Evaluated(torch.nn.BatchNorm2d):
    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, False, 0.1, self.eps)


class _SameConv(torch.nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, None, self.stride, 0)


_CONV = ("stage2", 0, "conv1")
_NORM = ("stage1", 0, "norm1")
_MEAN, _DEVIATION = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
RELU = nnx.relu

_CONFIGS = {
    "stride on the second convolution": STRIDED,
    "dilated convolution": BLOCK,
    "reflecting padding": BLOCK,
    "kernel with channels exchanged": BLOCK,
    "two kernels swapped": BLOCK,
    "option A pads behind only": OPTION_A,
}
"""Networks and blocks of the faults that need another one than :data:`NETWORK`."""
_IN_GRADIENTS = (
    "gradient of the skip cut",
    "batch statistics as constants",
    "a frozen kernel",
    "gradient of a branch doubled",
)
_EDITS: dict[str, Callable[[Any], Any]] = {
    "SAME padding of a strided convolution | flax | stage2.0.conv1 | same-padding": forward_of(
        Conv, _same, *_CONV
    ),
    "padding at the end only | torch | stage2.0.conv1 | same-padding": _as(
        _SameConv, "layer2", 0, "conv1"
    ),
    "no padding of the stem's pooling | flax | stem.pool | padding": _as(
        MaxPool, "stem", "pool", padding=0
    ),
    "mean pooling in the stem | torch | stem.pool | other-pooling": _replaced(
        "maxpool", lambda _: torch.nn.AvgPool2d(3, 2, 1)
    ),
    "stride on the second convolution | flax | conv1 | stride": lambda m: (
        _set("stride", 1, "conv1")(m),
        _set("stride", 2, "conv2")(m),
    ),
    "stride ignored | torch | stage2.0.conv1 | stride": lambda m: setattr(
        m.layer2[0].conv1, "stride", (1, 1)
    ),
    "dilated convolution | torch | conv2 | dilation": lambda m: (
        setattr(m.conv2, "dilation", (2, 2)),
        setattr(m.conv2, "padding", (2, 2)),
    ),
    "reflecting padding | torch | conv2 | padding-mode": lambda m: (
        setattr(m.conv2, "padding_mode", "reflect"),
        setattr(m.conv2, "_reversed_padding_repeated_twice", [1] * 4),
    ),
    "kernel flipped (true convolution) | flax | stage2.0.conv1/kernel | flipped-kernel": _tensor(
        lambda k: k[::-1, ::-1], "kernel", *_CONV
    ),
    "kernel with height and width exchanged | flax | stem.conv/kernel | transposed-kernel": _tensor(
        lambda k: k.transpose(1, 0, 2, 3), "kernel", "stem", "conv"
    ),
    "kernel with channels exchanged | flax | conv2/kernel | transposed-kernel": _tensor(
        lambda k: k.transpose(0, 1, 3, 2), "kernel", "conv2"
    ),
    "kernel reshaped instead of transposed | flax | stage2.0.conv1/kernel | reshaped-kernel": (
        _tensor(lambda k: k.transpose(3, 2, 0, 1).reshape(k.shape), "kernel", *_CONV)
    ),
    "head matrix reshaped instead of transposed | flax | head/kernel | reshaped-kernel": _tensor(
        lambda k: k.T.reshape(k.shape), "kernel", "head"
    ),
    "two kernels swapped | flax | conv1/kernel | swapped-tensor": _exchange,
    "scale never filled | flax | stage1.0.norm1/scale | stale-tensor": _tensor(
        jnp.ones_like, "scale", *_NORM
    ),
    "statistics never filled | torch | stage1.0.norm1/mean | stale-tensor": lambda m: m.layer1[
        0
    ].bn1.reset_running_stats(),
    "kernel of another run | torch | stage2.0.conv2/kernel | stale-tensor": lambda m: (
        torch.nn.init.normal_(m.layer2[0].conv2.weight, 0, 0.1)
    ),
    "weights rounded to bfloat16 | flax | stage2.0.conv1/kernel | rounded-weights": _tensor(
        lambda k: k.astype(jnp.bfloat16).astype(k.dtype), "kernel", *_CONV
    ),
    "one element damaged | flax | stage2.0.conv1/kernel | damaged-tensor": _tensor(
        lambda k: k.at[1, 2, 0, 1].multiply(-2), "kernel", *_CONV
    ),
    "convolution in bfloat16 | flax | stage2.0.conv1 | reduced-precision": forward_of(
        Conv, rounded_conv(7), *_CONV
    ),
    "convolution in TF32 | flax | stem.conv | reduced-precision": forward_of(
        Conv, rounded_conv(10), "stem", "conv"
    ),
    "norm in float32 | flax | stage1.0.norm1 | reduced-precision": forward_of(
        BatchNorm, _half_norm, *_NORM
    ),
    "eps of another framework | flax | stem.norm | eps": _all_norms(eps=1e-3),
    "eps of one norm | torch | stage2.0.norm2 | eps": lambda m: setattr(
        m.layer2[0].bn2, "eps", 1e-4
    ),
    "momentum counted the other way | flax | stem.norm/mean | momentum-complement": _all_norms(
        momentum=0.9
    ),
    "momentum 0.01 | torch | stem.norm/mean | momentum": lambda m: setattr(m.bn1, "momentum", 0.01),
    "biased running variance | flax | stage1.0.norm1/var | biased-variance": _as(
        type("Biased", (BatchNorm,), {"_track": _biased}), *_NORM
    ),
    "biased running variance | torch | stage1.0.norm1/var | biased-variance": _as(
        _BiasedUpdate, "layer1", 0, "bn1"
    ),
    "statistics not updated | torch | stage1.0.norm2/mean | frozen-statistics": _as(
        _Frozen, "layer1", 0, "bn2"
    ),
    "batch statistics in evaluation | flax | stage1.0.norm1 | train-eval-mode": forward_of(
        BatchNorm,
        lambda self, x, use_running_average=None: BatchNorm.__call__(
            self, x, use_running_average=False
        ),
        *_NORM,
    ),
    "running statistics in training | torch | stage2.0.norm1 | train-eval-mode": _as(
        _Evaluated, "layer2", 0, "bn1"
    ),
    "instance instead of batch normalisation | flax | stage1.0.norm1 | other-norm": forward_of(
        BatchNorm, _instance_norm, *_NORM
    ),
    "first ReLU missing | flax | stage1.0.conv2 | missing-relu": forward_of(
        ResidualBlock, _block(lambda y, s, x: RELU(y + s), lambda y: y), "stage1", 0
    ),
    "GELU after the first convolution | flax | stage2.0.conv2 | other-activation": forward_of(
        ResidualBlock,
        _block(lambda y, s, x: RELU(y + s), lambda y: nnx.gelu(y, approximate=False)),
        "stage2",
        0,
    ),
    "leaky ReLU in the stem | flax | stem.pool | other-activation": forward_of(
        StemLayers, _stem(activation=nnx.leaky_relu), "stem"
    ),
    "last ReLU missing | flax | stage1.0 | missing-relu": forward_of(
        ResidualBlock, _block(lambda y, s, x: y + s), "stage1", 0
    ),
    "skip not added | flax | stage1.0 | skip-not-added": forward_of(
        ResidualBlock, _block(lambda y, s, x: RELU(y)), "stage1", 0
    ),
    "skip added before the last norm | torch | stage2.0.norm2 | skip-before-norm": _as(
        type("Early", (BasicBlock,), {"forward": _torch_block}), "layer2", 0
    ),
    "main path overwritten (the question) | flax | stage1.0 | overwritten-branch": forward_of(
        ResidualBlock, _block(lambda y, s, x: RELU(s + x)), "stage1", 0
    ),
    "ReLU before the addition | flax | stage2.0 | relu-before-add": forward_of(
        ResidualBlock, _block(lambda y, s, x: RELU(y) + s), "stage2", 0
    ),
    "branch scaled by 0.8 | flax | stage2.0 | scaled": forward_of(
        ResidualBlock, _block(lambda y, s, x: RELU(0.8 * y + s)), "stage2", 0
    ),
    "option A pads behind only | flax | block | other-shortcut": forward_of(
        ResidualBlock,
        _block(lambda y, s, x: RELU(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 6))))),
    ),
    "BGR instead of RGB | flax | stem.conv | reversed-channels": forward_of(
        StemLayers, _stem(lambda x: x[..., ::-1]), "stem"
    ),
    "other normalisation constants | flax | stem.conv | normalisation-constants": forward_of(
        StemLayers, _stem(lambda x: (x - _MEAN) / _DEVIATION), "stem"
    ),
    "NCHW image read as NHWC | flax | stem.conv | memory-layout": forward_of(
        StemLayers,
        _stem(lambda x: x.reshape(x.shape[0], x.shape[3], *x.shape[1:3]).transpose(0, 2, 3, 1)),
        "stem",
    ),
    "maximum instead of mean before the head | flax | head | other-pooling": forward_of(
        ResNet, _network(lambda x: x.max((1, 2)))
    ),
    "dropout before the head | torch | head | dropout": lambda m: m.fc.register_forward_pre_hook(
        lambda _, args: (F.dropout(args[0], 0.3, True, False),)
    ),
    "bias in a convolution | torch | stage1.0.conv1 | bias": lambda m: m.layer1[
        0
    ].conv1.register_parameter(
        "bias", torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=m.fc.weight.dtype))
    ),
    "no bias in the head | flax | head | bias": forward_of(
        Linear, lambda self, x: x @ self.kernel[...], "head"
    ),
    "values that are not finite | flax | stage2.0.conv2 | non-finite": forward_of(
        ResidualBlock,
        _block(lambda y, s, x: RELU(y + s), lambda y: jnp.log(RELU(y) - 0.01)),
        "stage2",
        0,
    ),
    "gradient of the skip cut | flax | stage1.0 | cut-skip": forward_of(
        ResidualBlock, _block(lambda y, s, x: RELU(y + lax.stop_gradient(s))), "stage1", 0
    ),
    "batch statistics as constants | flax | stage1.0.norm1 | cut-statistics": forward_of(
        BatchNorm, _constant_statistics, *_NORM
    ),
    "a frozen kernel | flax | stage2.0.conv1/kernel | cut-gradient": forward_of(
        Conv,
        lambda self, x: lax.conv_general_dilated(
            x,
            lax.stop_gradient(self.kernel[...]),
            (self.stride,) * 2,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ),
        *_CONV,
    ),
    "gradient of a branch doubled | torch | stage1.0.norm2 | scaled-gradient": lambda m: m.layer1[
        0
    ].bn2.register_forward_hook(lambda _, __, y: y * 2 - y.detach()),
}
"""Rows of the documentation's table: name, side, slot and cause of a fault."""
FAULTS = tuple(
    Fault(name, side, edit, slot, cause, _CONFIGS.get(name, NETWORK), name in _IN_GRADIENTS)
    for (name, side, slot, cause), edit in (
        (row.split(" | "), edit) for row, edit in _EDITS.items()
    )
)
