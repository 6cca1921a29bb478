"""Ways to get a network wrong, injected into either side; the mutation study runs them all, and the
table in docs/verification.md lists them.
"""

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
    """ReferencePair of which one side was tampered with; the specification is still the untouched
    network.
    """

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
      gradients: It shows in the gradients only.
    """

    name: str
    side: str
    edit: Callable[[Any], None]
    slot: str | None
    cause: str | None
    config: ResNetConfig | BlockConfig = NETWORK
    gradients: bool = False


def _as(cls: type, *path: Any, **attributes: Any) -> Callable[[Any], None]:
    """Turns the module at an attribute path into another class and sets attributes."""

    def edit(model: Any) -> None:
        for part in path:
            model = model[part] if isinstance(part, int) else getattr(model, part)
        model.__class__ = cls
        for name, value in attributes.items():
            setattr(model, name, value)

    return edit


def _set(attribute: str, value: Any, *path: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        for part in path:
            model = model[part] if isinstance(part, int) else getattr(model, part)
        setattr(model, attribute, value)

    return edit


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
        for part in path:
            model = model[part] if isinstance(part, int) else getattr(model, part)
        variable = getattr(model, name)
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


class _SameConv(torch.nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, None, self.stride, 0)


_CONV = ("stage2", 0, "conv1")
_NORM = ("stage1", 0, "norm1")
_MEAN, _DEVIATION = jnp.array([0.485, 0.456, 0.406]), jnp.array([0.229, 0.224, 0.225])
RELU = nnx.relu

FAULTS = (
    Fault(
        "SAME padding of a strided convolution",
        "flax",
        forward_of(Conv, _same, *_CONV),
        "stage2.0.conv1",
        "same-padding",
    ),
    Fault(
        "padding at the end only",
        "torch",
        _as(_SameConv, "layer2", 0, "conv1"),
        "stage2.0.conv1",
        "same-padding",
    ),
    Fault(
        "no padding of the stem's pooling",
        "flax",
        _as(MaxPool, "stem", "pool", padding=0),
        "stem.pool",
        "padding",
    ),
    Fault(
        "mean pooling in the stem",
        "torch",
        _replaced("maxpool", lambda _: torch.nn.AvgPool2d(3, 2, 1)),
        "stem.pool",
        "other-pooling",
    ),
    Fault(
        "stride on the second convolution",
        "flax",
        lambda m: (_set("stride", 1, "conv1")(m), _set("stride", 2, "conv2")(m)),
        "conv1",
        "stride",
        STRIDED,
    ),
    Fault(
        "stride ignored",
        "torch",
        lambda m: setattr(m.layer2[0].conv1, "stride", (1, 1)),
        "stage2.0.conv1",
        "stride",
    ),
    Fault(
        "dilated convolution",
        "torch",
        lambda m: (setattr(m.conv2, "dilation", (2, 2)), setattr(m.conv2, "padding", (2, 2))),
        "conv2",
        "dilation",
        BLOCK,
    ),
    Fault(
        "reflecting padding",
        "torch",
        lambda m: (
            setattr(m.conv2, "padding_mode", "reflect"),
            setattr(m.conv2, "_reversed_padding_repeated_twice", [1] * 4),
        ),
        "conv2",
        "padding-mode",
        BLOCK,
    ),
    Fault(
        "kernel flipped (true convolution)",
        "flax",
        _tensor(lambda k: k[::-1, ::-1], "kernel", *_CONV),
        "stage2.0.conv1/kernel",
        "flipped-kernel",
    ),
    Fault(
        "kernel with height and width exchanged",
        "flax",
        _tensor(lambda k: k.transpose(1, 0, 2, 3), "kernel", "stem", "conv"),
        "stem.conv/kernel",
        "transposed-kernel",
    ),
    Fault(
        "kernel with channels exchanged",
        "flax",
        _tensor(lambda k: k.transpose(0, 1, 3, 2), "kernel", "conv2"),
        "conv2/kernel",
        "transposed-kernel",
        BLOCK,
    ),
    Fault(
        "kernel reshaped instead of transposed",
        "flax",
        _tensor(lambda k: k.transpose(3, 2, 0, 1).reshape(k.shape), "kernel", *_CONV),
        "stage2.0.conv1/kernel",
        "reshaped-kernel",
    ),
    Fault(
        "head matrix reshaped instead of transposed",
        "flax",
        _tensor(lambda k: k.T.reshape(k.shape), "kernel", "head"),
        "head/kernel",
        "reshaped-kernel",
    ),
    Fault("two kernels swapped", "flax", _exchange, "conv1/kernel", "swapped-tensor", BLOCK),
    Fault(
        "scale never filled",
        "flax",
        _tensor(jnp.ones_like, "scale", *_NORM),
        "stage1.0.norm1/scale",
        "stale-tensor",
    ),
    Fault(
        "statistics never filled",
        "torch",
        lambda m: m.layer1[0].bn1.reset_running_stats(),
        "stage1.0.norm1/mean",
        "stale-tensor",
    ),
    Fault(
        "kernel of another run",
        "torch",
        lambda m: torch.nn.init.normal_(m.layer2[0].conv2.weight, 0, 0.1),
        "stage2.0.conv2/kernel",
        "stale-tensor",
    ),
    Fault(
        "weights rounded to bfloat16",
        "flax",
        _tensor(lambda k: k.astype(jnp.bfloat16).astype(k.dtype), "kernel", *_CONV),
        "stage2.0.conv1/kernel",
        "rounded-weights",
    ),
    Fault(
        "one element damaged",
        "flax",
        _tensor(lambda k: k.at[1, 2, 0, 1].multiply(-2), "kernel", *_CONV),
        "stage2.0.conv1/kernel",
        "damaged-tensor",
    ),
    Fault(
        "convolution in bfloat16",
        "flax",
        forward_of(Conv, rounded_conv(7), *_CONV),
        "stage2.0.conv1",
        "reduced-precision",
    ),
    Fault(
        "convolution in TF32",
        "flax",
        forward_of(Conv, rounded_conv(10), "stem", "conv"),
        "stem.conv",
        "reduced-precision",
    ),
    Fault(
        "norm in float32",
        "flax",
        forward_of(BatchNorm, _half_norm, *_NORM),
        "stage1.0.norm1",
        "reduced-precision",
    ),
    Fault("eps of another framework", "flax", _all_norms(eps=1e-3), "stem.norm", "eps"),
    Fault(
        "eps of one norm",
        "torch",
        lambda m: setattr(m.layer2[0].bn2, "eps", 1e-4),
        "stage2.0.norm2",
        "eps",
    ),
    Fault(
        "momentum counted the other way",
        "flax",
        _all_norms(momentum=0.9),
        "stem.norm/mean",
        "momentum-complement",
    ),
    Fault(
        "momentum 0.01",
        "torch",
        lambda m: setattr(m.bn1, "momentum", 0.01),
        "stem.norm/mean",
        "momentum",
    ),
    Fault(
        "biased running variance",
        "flax",
        _as(type("Biased", (BatchNorm,), {"_track": _biased}), *_NORM),
        "stage1.0.norm1/var",
        "biased-variance",
    ),
    Fault(
        "biased running variance",
        "torch",
        _as(_BiasedUpdate, "layer1", 0, "bn1"),
        "stage1.0.norm1/var",
        "biased-variance",
    ),
    Fault(
        "statistics not updated",
        "torch",
        _as(_Frozen, "layer1", 0, "bn2"),
        "stage1.0.norm2/mean",
        "frozen-statistics",
    ),
    Fault(
        "batch statistics in evaluation",
        "flax",
        forward_of(
            BatchNorm,
            lambda self, x, use_running_average=None: BatchNorm.__call__(
                self, x, use_running_average=False
            ),
            *_NORM,
        ),
        "stage1.0.norm1",
        "train-eval-mode",
    ),
    Fault(
        "running statistics in training",
        "torch",
        _as(
            type(
                "Evaluated",
                (torch.nn.BatchNorm2d,),
                {
                    "forward": lambda self, x: F.batch_norm(
                        x,
                        self.running_mean,
                        self.running_var,
                        self.weight,
                        self.bias,
                        False,
                        0.1,
                        self.eps,
                    )
                },
            ),
            "layer2",
            0,
            "bn1",
        ),
        "stage2.0.norm1",
        "train-eval-mode",
    ),
    Fault(
        "instance instead of batch normalisation",
        "flax",
        forward_of(BatchNorm, _instance_norm, *_NORM),
        "stage1.0.norm1",
        "other-norm",
    ),
    Fault(
        "first ReLU missing",
        "flax",
        forward_of(ResidualBlock, _block(lambda y, s, x: RELU(y + s), lambda y: y), "stage1", 0),
        "stage1.0.conv2",
        "missing-relu",
    ),
    Fault(
        "GELU after the first convolution",
        "flax",
        forward_of(
            ResidualBlock,
            _block(lambda y, s, x: RELU(y + s), lambda y: nnx.gelu(y, approximate=False)),
            "stage2",
            0,
        ),
        "stage2.0.conv2",
        "other-activation",
    ),
    Fault(
        "leaky ReLU in the stem",
        "flax",
        forward_of(StemLayers, _stem(activation=nnx.leaky_relu), "stem"),
        "stem.pool",
        "other-activation",
    ),
    Fault(
        "last ReLU missing",
        "flax",
        forward_of(ResidualBlock, _block(lambda y, s, x: y + s), "stage1", 0),
        "stage1.0",
        "missing-relu",
    ),
    Fault(
        "skip not added",
        "flax",
        forward_of(ResidualBlock, _block(lambda y, s, x: RELU(y)), "stage1", 0),
        "stage1.0",
        "skip-not-added",
    ),
    Fault(
        "skip added before the last norm",
        "torch",
        _as(type("Early", (BasicBlock,), {"forward": _torch_block}), "layer2", 0),
        "stage2.0.norm2",
        "skip-before-norm",
    ),
    Fault(
        "main path overwritten (the question)",
        "flax",
        forward_of(ResidualBlock, _block(lambda y, s, x: RELU(s + x)), "stage1", 0),
        "stage1.0",
        "overwritten-branch",
    ),
    Fault(
        "ReLU before the addition",
        "flax",
        forward_of(ResidualBlock, _block(lambda y, s, x: RELU(y) + s), "stage2", 0),
        "stage2.0",
        "relu-before-add",
    ),
    Fault(
        "branch scaled by 0.8",
        "flax",
        forward_of(ResidualBlock, _block(lambda y, s, x: RELU(0.8 * y + s)), "stage2", 0),
        "stage2.0",
        "scaled",
    ),
    Fault(
        "option A pads behind only",
        "flax",
        forward_of(
            ResidualBlock,
            _block(
                lambda y, s, x: RELU(y + jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (0, 6))))
            ),
        ),
        "block",
        "other-shortcut",
        OPTION_A,
    ),
    Fault(
        "BGR instead of RGB",
        "flax",
        forward_of(StemLayers, _stem(lambda x: x[..., ::-1]), "stem"),
        "stem.conv",
        "reversed-channels",
    ),
    Fault(
        "other normalisation constants",
        "flax",
        forward_of(StemLayers, _stem(lambda x: (x - _MEAN) / _DEVIATION), "stem"),
        "stem.conv",
        "normalisation-constants",
    ),
    Fault(
        "NCHW image read as NHWC",
        "flax",
        forward_of(
            StemLayers,
            _stem(lambda x: x.reshape(x.shape[0], x.shape[3], *x.shape[1:3]).transpose(0, 2, 3, 1)),
            "stem",
        ),
        "stem.conv",
        "memory-layout",
    ),
    Fault(
        "maximum instead of mean before the head",
        "flax",
        forward_of(ResNet, _network(lambda x: x.max((1, 2)))),
        "head",
        "other-pooling",
    ),
    Fault(
        "dropout before the head",
        "torch",
        lambda m: m.fc.register_forward_pre_hook(
            lambda _, args: (F.dropout(args[0], 0.3, True, False),)
        ),
        "head",
        "dropout",
    ),
    Fault(
        "bias in a convolution",
        "torch",
        lambda m: m.layer1[0].conv1.register_parameter(
            "bias", torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=m.fc.weight.dtype))
        ),
        "stage1.0.conv1",
        "bias",
    ),
    Fault(
        "no bias in the head",
        "flax",
        forward_of(Linear, lambda self, x: x @ self.kernel[...], "head"),
        "head",
        "bias",
    ),
    Fault(
        "values that are not finite",
        "flax",
        forward_of(
            ResidualBlock,
            _block(lambda y, s, x: RELU(y + s), lambda y: jnp.log(RELU(y) - 0.01)),
            "stage2",
            0,
        ),
        "stage2.0.conv2",
        "non-finite",
    ),
    Fault(
        "gradient of the skip cut",
        "flax",
        forward_of(
            ResidualBlock, _block(lambda y, s, x: RELU(y + lax.stop_gradient(s))), "stage1", 0
        ),
        "stage1.0",
        "cut-skip",
        gradients=True,
    ),
    Fault(
        "batch statistics as constants",
        "flax",
        forward_of(BatchNorm, _constant_statistics, *_NORM),
        "stage1.0.norm1",
        "cut-statistics",
        gradients=True,
    ),
    Fault(
        "a frozen kernel",
        "flax",
        forward_of(
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
        "stage2.0.conv1/kernel",
        "cut-gradient",
        gradients=True,
    ),
    Fault(
        "gradient of a branch doubled",
        "torch",
        lambda m: m.layer1[0].bn2.register_forward_hook(lambda _, __, y: y * 2 - y.detach()),
        "stage1.0.norm2",
        "scaled-gradient",
        gradients=True,
    ),
)
