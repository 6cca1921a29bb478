"""Every layer and function of :mod:`flax_resblock.nn` against PyTorch's, in float64: values, all
gradients and running statistics. Each family has a negative control: one option is changed, and the
comparison must fail by far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional as F

from flax_resblock import nn
from flax_resblock.cpu.switch import conv_lowering
from flax_resblock.errors import InputError
from flax_resblock.nn.norm import normalised_by_batch
from flax_resblock.nn.variables import variable_at
from flax_resblock.port.layer_rows import ROWS
from flax_resblock.port.layers import Layer, layer_of
from parity_tests.support import fast_only, import_torchvision

TOLERANCE = 1e-12
FAR = 1e-6
KINKS = np.array([-6, -3, -2, -1, -0.5, -0.0, 0, 0.5, 1, 2, 3, 6, 7.25, 19, 21, 40])


def channels_last(array: np.ndarray) -> np.ndarray:
    """``(N, C, *spatial)`` to ``(N, *spatial, C)``."""
    return np.moveaxis(array, 1, -1) if array.ndim > 1 else array


def expression(layer: Layer) -> str:
    """The call as emitted source writes it."""
    arguments = [
        *(("x",) if not layer.stateful else ()),
        *map(repr, layer.positional),
        *(f"{name}={value!r}" for name, value in layer.options.items()),
        *(("rngs=rngs",) if layer.stateful else ()),
    ]
    return f"{layer.call}({', '.join(arguments)})"


def error(ours: Any, theirs: Any) -> float:
    """Greatest difference against the greatest value; infinite for other shapes or NaN."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return np.inf
    scale = max(np.abs(theirs).max(initial=0), 1e-3)
    found = np.abs(ours - theirs).max(initial=0) / scale
    return float(found) if np.isfinite(found) else np.inf


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """In float64, with random parameters and running statistics."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                low = 0.5 if name.endswith("var") else -1.0
                tensor.copy_(torch.empty_like(tensor).uniform_(low, 1.5, generator=generator))
            else:
                tensor.fill_(3)
    return module


def inputs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Asymmetric, with the kinks of all activations and equal neighbours among the values."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) + 0.3
    flat = x.reshape(-1)
    places = rng.choice(flat.size, min(len(KINKS), flat.size // 3), replace=False)
    flat[places] = KINKS[: len(places)]
    flat[1 : flat.size // 4 : 5] = flat[0 : flat.size // 4 - 1 : 5]
    return x


def differences(
    module: torch.nn.Module, layer: Layer, x: np.ndarray, *, train: bool
) -> dict[str, float]:
    """What the layer and the module differ in: output, gradients, running statistics."""
    module.train(train)
    module.zero_grad()
    x_torch = torch.tensor(x, requires_grad=True)
    start = {name: tensor.detach().clone().numpy() for name, tensor in module.state_dict().items()}
    y_torch = module(x_torch)
    cotangent = np.random.default_rng(1).standard_normal(y_torch.shape)
    y_torch.backward(torch.from_numpy(cotangent))
    assert x_torch.grad is not None
    pairs: dict[str, tuple[Any, Any]] = {}
    move = channels_last if layer.inputs == "channels_last" else np.asarray
    scope = {"nn": nn, "x": None, "rngs": None}
    state: Any = ()
    if layer.stateful:
        model = eval(expression(layer), scope)
        (model.train if train else model.eval)()
        for name, (path, codec) in layer.tensors.items():
            variable_at(model, (path,)).set_value(jnp.asarray(codec.to_flax(start[name])))
        graph, parameters, state = nnx.split(model, nnx.Param, ...)

        def call(x: jax.Array, parameters: Any, state: Any) -> Any:
            one = nnx.merge(graph, parameters, state, copy=True)
            y = one(x)
            return y, nnx.state(one, nnx.BatchStat)
    else:
        parameters = {}

        def call(x: jax.Array, parameters: Any, state: Any) -> Any:
            return eval(expression(layer), {**scope, "x": x}), {}

    @jax.jit
    def both(x: jax.Array, parameters: Any, state: Any, cotangent: jax.Array) -> Any:
        y, back, statistics = jax.vjp(partial(call, state=state), x, parameters, has_aux=True)
        return y, *back(cotangent), statistics

    arguments = jnp.asarray(move(x)), parameters, state
    if jax.eval_shape(call, *arguments)[0].shape != move(cotangent).shape:
        return {"shape": np.inf}
    y, dx, gradients, statistics = both(*arguments, jnp.asarray(move(cotangent)))
    pairs["output"] = y, move(y_torch.detach().numpy())
    pairs["input gradient"] = dx, move(x_torch.grad.numpy())
    if layer.stateful:
        named = dict(module.named_parameters())
        for name, (path, codec) in layer.tensors.items():
            if name in named:
                pairs[f"gradient of {name}"] = (
                    gradients[path][...],
                    codec.to_flax(named[name].grad.numpy()),
                )
            else:
                theirs = module.state_dict()[name].numpy()
                pairs[name] = statistics[path][...], codec.to_flax(theirs)
    return {name: error(*pair) for name, pair in pairs.items()}


@dataclass(frozen=True)
class Case:
    """A module, the shape of its input, and options of the layer that are wrong for it; whether
    it is compared in training mode too."""

    module: torch.nn.Module
    shape: tuple[int, ...] = (2, 6, 7, 9)
    wrong: Mapping[str, Any] = field(default_factory=dict)
    train: bool = True


T = torch.nn
CASES = [
    Case(T.Conv2d(6, 4, 3, 2, 1), wrong={"padding": 0}),
    Case(T.Conv2d(6, 4, (3, 2), (1, 2), (2, 0), (2, 1), bias=False), wrong={"dilation": 1}),
    Case(T.Conv2d(6, 4, (1, 4), padding="same", dilation=3, groups=2), wrong={"padding": (0, 4)}),
    Case(T.Conv2d(6, 8, 3, padding="valid"), wrong={"padding": "same"}),
    Case(T.Conv2d(6, 6, 3, 2, 2, groups=6, padding_mode="reflect"), wrong={"padding": 1}),
    Case(T.Conv2d(6, 4, (3, 5), 1, (2, 1), padding_mode="replicate"), wrong={"stride": 2}),
    Case(T.Conv2d(6, 4, 4, padding="same", padding_mode="circular"), wrong={"padding": "valid"}),
    Case(T.Conv2d(6, 4, 1, 2), wrong={"stride": (2, 1)}),
    Case(T.Conv1d(6, 4, 3, 2, 1, 2, 2), (2, 6, 11), wrong={"dilation": 1}),
    Case(T.Conv1d(6, 4, 4, padding="same", padding_mode="reflect"), (2, 6, 11)),
    Case(T.Linear(9, 5), wrong={"use_bias": False}),
    Case(T.Linear(6, 5, bias=False), (3, 6)),
    Case(T.BatchNorm2d(6, eps=1e-3, momentum=0.3), wrong={"eps": 1e-5}),
    Case(T.BatchNorm2d(6, momentum=None), wrong={"momentum": 0.1}),
    Case(T.BatchNorm2d(6, bias=False), wrong={"eps": 1e-3}),
    Case(T.BatchNorm2d(6, affine=False), wrong={"eps": 1e-3}),
    Case(T.BatchNorm2d(6, track_running_stats=False), wrong={"eps": 1e-3}),
    Case(T.BatchNorm1d(6, track_running_stats=False, affine=False), (4, 6, 5)),
    Case(T.BatchNorm1d(6), (5, 6), wrong={"eps": 1e-3}),
    Case(T.SyncBatchNorm(6, 1e-3), wrong={"eps": 1e-5}, train=False),  # trains on GPUs alone
    Case(T.MaxPool2d(3, 2, 1), wrong={"padding": 0}),
    Case(T.MaxPool2d(2), wrong={"stride": 1}),
    Case(T.MaxPool2d(3, 2, ceil_mode=True), (2, 6, 8, 9), wrong={"ceil_mode": False}),
    Case(T.MaxPool2d((3, 2), (1, 3), (1, 0)), wrong={"stride": None}),
    Case(T.MaxPool2d((2, 3), (3, 2), (1, 1), ceil_mode=True), (2, 6, 8, 10)),
    Case(T.MaxPool2d(3, 2, 1, dilation=(2, 1), ceil_mode=True), wrong={"dilation": 1}),
    Case(T.MaxPool1d(3, 2, 1, 2), (2, 6, 10), wrong={"dilation": 1}),
    Case(T.AvgPool2d(3, 2, 1), wrong={"count_include_pad": False}),
    Case(T.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 8, 10), wrong={"ceil_mode": False}),
    Case(T.AvgPool2d((2, 3), (3, 2), (1, 0), True, False), (2, 6, 8, 10)),
    Case(T.AvgPool2d(3, 2, 1, divisor_override=5), wrong={"divisor_override": None}),
    Case(T.AvgPool1d(4, 3, 2, ceil_mode=True), (2, 6, 10), wrong={"stride": 2}),
    Case(T.LPPool2d(2, (3, 2), 2, ceil_mode=True), wrong={"ceil_mode": False}),
    Case(T.LPPool1d(4, 3), (2, 6, 10), wrong={"stride": 2}),
    Case(T.ConvTranspose2d(6, 4, 3, 2, 1, 1), wrong={"output_padding": 0}),
    Case(T.ConvTranspose2d(6, 4, (2, 3), (1, 2), (1, 0), (0, 1), 2, False, (2, 1))),
    Case(T.ConvTranspose1d(6, 4, 4, 3, 2, 1), (2, 6, 7), wrong={"padding": 1}),
    Case(T.GroupNorm(3, 6, 1e-3), wrong={"eps": 1e-5}),
    Case(T.GroupNorm(2, 6, affine=False), (2, 6, 5)),
    Case(T.LayerNorm(9), wrong={"eps": 1e-3}),
    Case(T.LayerNorm(9, bias=False)),
    Case(T.LayerNorm((6, 7, 9), elementwise_affine=False)),
    Case(T.LayerNorm((6, 7, 9), 1e-3), wrong={"eps": 1e-5}),
    Case(T.LayerNorm((6, 6, 6)), (2, 6, 6, 6)),
    Case(T.InstanceNorm2d(6), wrong={"eps": 1e-3}),
    Case(T.InstanceNorm2d(6, 1e-3, 0.3, True, True), wrong={"momentum": 0.1}),
    Case(T.InstanceNorm2d(6, momentum=None, track_running_stats=True)),
    Case(T.InstanceNorm1d(6, affine=True), (2, 6, 5)),
    Case(T.LocalResponseNorm(4, 0.2, 0.6, 2.0), wrong={"beta": 0.75}),
    Case(T.LocalResponseNorm(3), (2, 6, 5), wrong={"k": 1.1}),
    Case(T.AdaptiveAvgPool2d(1)),
    Case(T.AdaptiveAvgPool2d((3, 4))),
    Case(T.AdaptiveAvgPool2d((None, 3))),
    Case(T.AdaptiveAvgPool2d((9, 5))),
    Case(T.AdaptiveAvgPool2d((None, None))),
    Case(T.AdaptiveAvgPool1d(4), (2, 6, 10)),
    Case(T.AdaptiveMaxPool2d((3, 4))),
    Case(T.AdaptiveMaxPool2d((None, 3))),
    Case(T.AdaptiveMaxPool1d(4), (2, 6, 10)),
    Case(T.ZeroPad2d((1, 2, 0, 3)), wrong={"value": 1.0}),
    Case(T.ZeroPad2d((-1, 2, 0, -3))),
    Case(T.ConstantPad2d((1, 2, 0, 3), 0.5), wrong={"value": 0.0}),
    Case(T.ConstantPad1d((1, 2), 0.5), (2, 6, 5)),
    Case(T.ZeroPad1d((1, 2)), (2, 6, 5)),
    Case(T.ReflectionPad1d((1, 2)), (2, 6, 5)),
    Case(T.ReplicationPad1d((1, 2)), (2, 6, 5)),
    Case(T.CircularPad1d((1, 2)), (2, 6, 5)),
    Case(T.ReflectionPad2d((1, 2, 0, 3)), wrong={"mode": "replicate"}),
    Case(T.ReplicationPad2d((1, 2, 0, 3)), wrong={"mode": "circular"}),
    Case(T.CircularPad2d((1, 2, 0, 3)), wrong={"mode": "constant"}),
    Case(T.Upsample(scale_factor=2)),
    Case(T.Upsample((10, 7)), wrong={"mode": "nearest-exact"}),
    Case(T.Upsample(scale_factor=(1.7, 0.6), mode="nearest-exact"), wrong={"mode": "nearest"}),
    Case(T.Upsample(11, mode="linear"), (2, 6, 5), wrong={"align_corners": True}),
    Case(T.Upsample(scale_factor=2, mode="bilinear"), wrong={"mode": "bicubic"}),
    Case(
        T.Upsample(scale_factor=1.3, mode="bilinear", recompute_scale_factor=True),
        wrong={"recompute_scale_factor": None},
    ),
    Case(T.Upsample(scale_factor=1.3, mode="bilinear", align_corners=False)),
    Case(T.Upsample((3, 14), mode="bicubic"), wrong={"align_corners": True}),
    Case(T.Upsample((1, 14), mode="bicubic", align_corners=True), wrong={"align_corners": None}),
    Case(T.UpsamplingBilinear2d((9, 13)), wrong={"align_corners": None}),
    Case(T.UpsamplingNearest2d(scale_factor=3)),
    Case(T.PixelShuffle(2), (2, 8, 5, 3)),
    Case(T.PixelUnshuffle(2), (2, 3, 6, 4)),
    Case(T.ChannelShuffle(3)),
    *(Case(kind(0.0)) for kind in (T.Dropout, T.Dropout2d, T.AlphaDropout)),
    Case(T.Dropout1d(0.0), (2, 6, 5)),
    Case(T.RReLU(0.1, 0.4), wrong={"upper": 0.3}, train=False),
    Case(T.PReLU()),
    Case(T.PReLU(6)),
    Case(T.Identity()),
    Case(T.ReLU()),
    Case(T.ReLU6()),
    Case(T.LeakyReLU(0.2), wrong={"slope": 0.01}),
    Case(T.ELU(0.7), wrong={"alpha": 1.0}),
    Case(T.SELU()),
    Case(T.CELU(0.7), wrong={"alpha": 1.0}),
    Case(T.GELU(), wrong={"approximate": True}),
    Case(T.GELU("tanh"), wrong={"approximate": False}),
    *(Case(kind()) for kind in (T.SiLU, T.Mish, T.Sigmoid, T.LogSigmoid, T.Tanh, T.Tanhshrink)),
    Case(T.Hardtanh(-2, 3), wrong={"max_value": 2.0}),
    Case(T.Hardswish()),
    Case(T.Hardsigmoid()),
    Case(T.Hardshrink(1.0), wrong={"lambd": 0.5}),
    Case(T.Softshrink(1.0), wrong={"lambd": 0.5}),
    Case(T.Softplus(2.0, 3.0), wrong={"threshold": 20.0}),
    Case(T.Softplus()),
    Case(T.Softsign()),
    Case(T.Threshold(0.5, 20.0)),
    Case(T.Softmax(1)),
    Case(T.Softmax2d()),
    Case(T.LogSoftmax(1)),
    Case(T.GLU(1)),
]


def named(case: Case) -> str:
    return " ".join(str(case.module).split())


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


FIRST = [
    case
    for number, case in enumerate(CASES)
    if not any(type(one.module) is type(case.module) for one in CASES[:number])
]
"""One of each kind of module; the others where there is time."""


@pytest.mark.parametrize("case", fast_only(FIRST, CASES), ids=named)
def test_every_layer_is_pytorchs(case):
    module = randomised(case.module, 0)
    layer = layer_of(module)
    assert layer is not None
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    assert set(layer.tensors) == names
    x = inputs(case.shape)
    differs = layer.random or list(module.buffers())  # between training and evaluation
    for train in (True, False) if differs and case.train else (case.train,):
        found = differences(module, layer, x, train=train)
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize(
    "case", fast_only(FIRST[::2], [case for case in CASES if case.wrong]), ids=named
)
def test_a_wrong_option_is_found(case):
    module = randomised(case.module, 0)
    layer = layer_of(module)
    assert layer is not None
    wrong = replace(layer, options={**layer.options, **case.wrong}, tensors=dict(layer.tensors))
    x = inputs(case.shape)
    if case.wrong.get("use_bias") is False:
        del wrong.tensors["bias"]
    found = differences(module, wrong, x, train=case.train)
    assert max(found.values()) >= FAR


def test_every_row_has_a_case():
    compared = {type(case.module).__name__ for case in CASES}
    rows = {name.removeprefix("torch.nn.") for name in ROWS if name.startswith("torch.nn.")}
    assert rows == compared


@dataclass(frozen=True)
class Function:
    """The same function of both, of arrays in PyTorch's layout and in ours; and a wrong one."""

    theirs: Callable[..., torch.Tensor]
    ours: Callable[..., jax.Array]
    wrong: Callable[..., jax.Array]
    shapes: tuple[tuple[int, ...], ...] = ((2, 6, 5, 7),)
    axes: tuple[tuple[int, ...] | None, ...] = (None,)


IMAGE = (0, 2, 3, 1)
FUNCTIONS = {
    "convolve with a bias": Function(
        lambda x, k, b: F.conv2d(x, k, b, (2, 1), 1, groups=2),
        lambda x, k, b: nn.convolve(x, k, b, stride=(2, 1), padding=1, groups=2),
        lambda x, k, b: nn.convolve(x, k, b, stride=(2, 1), padding=(1, 0), groups=2),
        ((2, 6, 5, 7), (4, 3, 3, 2), (4,)),
        (IMAGE, (2, 3, 1, 0), (0,)),
    ),
    "convolve with a pair for each axis": Function(
        lambda x, k: F.conv2d(F.pad(x, (1, 2, 0, 3)), k),
        lambda x, k: nn.convolve(x, k, padding=((0, 3), (1, 2))),
        lambda x, k: nn.convolve(x, k, padding=((1, 2), (0, 3))),
        ((2, 6, 5, 7), (4, 6, 3, 2)),
        (IMAGE, (2, 3, 1, 0)),
    ),
    "weight standardisation": Function(
        lambda w, g: F.batch_norm(
            w.reshape(1, 5, -1), None, None, g, None, True, 0.0, 1e-6
        ).reshape(w.shape),
        lambda w, g: nn.batch_norm_by_batch(w, g, eps=1e-6),
        lambda w, g: nn.batch_norm_by_batch(w, g, eps=1e-3),
        ((5, 3, 3, 2), (5,)),
        ((2, 3, 1, 0), (0,)),
    ),
    "batch norm of given statistics": Function(
        lambda x, m, g: F.batch_norm(x, m.detach(), g.detach() ** 2 + 1, g, None, False, 0.0, 1e-3),
        lambda x, m, g: nn.batch_norm(
            x, jax.lax.stop_gradient(m), jax.lax.stop_gradient(g) ** 2 + 1, g, eps=1e-3
        ),
        lambda x, m, g: nn.batch_norm(
            x, jax.lax.stop_gradient(m), jax.lax.stop_gradient(g) ** 2 + 1, g
        ),
        ((2, 6, 5, 7), (6,), (6,)),
        (IMAGE, (0,), (0,)),
    ),
    "glu of another axis": Function(
        lambda x: F.glu(x, 2),
        lambda x: nn.glu(x, 2),
        lambda x: nn.glu(x[:, :, ::-1], 2),
        ((2, 5, 6),),
    ),
    "normalize": Function(
        lambda x: F.normalize(x * (x > 0), dim=-1),
        lambda x: nn.normalize(x * (x > 0)),
        lambda x: nn.normalize(x),
        ((40, 2),),
    ),
    "normalize with p=3 and a large eps": Function(
        lambda x: F.normalize(x, 3.0, 1, 2.5),
        lambda x: nn.normalize(x, 1, 2.5, 3.0),
        lambda x: nn.normalize(x, 1, 2.5),
        ((6, 5, 3),),
    ),
    "softmax": Function(
        lambda x: F.softmax(x, 1),
        lambda x: nn.softmax(x, axis=1),
        lambda x: nn.softmax(x, axis=2),
        ((3, 5, 6),),
    ),
    "prelu": Function(
        F.prelu, nn.prelu, lambda x, w: nn.prelu(x, -w), ((5, 7), (7,)), (None, None)
    ),
    "layer norm of two axes": Function(
        lambda x, g, b: F.layer_norm(x, (5, 7), g, b),
        lambda x, g, b: nn.layer_norm(x, g, b, axes=2),
        lambda x, g, b: nn.layer_norm(x, g, b),
        ((3, 5, 7), (5, 7), (5, 7)),
        (None, None, None),
    ),
    "max pool of one axis": Function(
        lambda x: F.max_pool1d(x, 3, 2, 1, ceil_mode=True),
        lambda x: nn.max_pool(x.swapaxes(1, 2), 3, 2, 1, ceil_mode=True).swapaxes(1, 2),
        lambda x: nn.max_pool(x.swapaxes(1, 2), 3, 2, 1).swapaxes(1, 2),
        ((2, 3, 8),),
    ),
    "unfold": Function(
        lambda x: F.unfold(x, (3, 2), (1, 2), (1, 0), (2, 1)),
        lambda x: nn.unfold(x.transpose(IMAGE), (3, 2), (1, 2), (1, 0), (2, 1)).swapaxes(1, 2),
        lambda x: nn.unfold(x.transpose(IMAGE), (3, 2), (1, 2), (1, 0), (2, 1))[::-1].swapaxes(
            1, 2
        ),
    ),
    "fold": Function(
        lambda x: F.fold(x, (5, 6), (3, 2), 1, (1, 0), 2),
        lambda x: nn.fold(x.swapaxes(1, 2), (5, 6), (3, 2), 1, (1, 0), 2).transpose(0, 3, 1, 2),
        lambda x: nn.fold(x.swapaxes(1, 2), (5, 6), (3, 2), 1, (1, 0), 2)[..., ::-1].transpose(
            0, 3, 1, 2
        ),
        ((2, 12, 9),),
    ),
    "cosine similarity, with vectors of zero and shorter ones than eps": Function(
        lambda x, y: F.cosine_similarity(x * (x > 0), y, dim=1, eps=0.5),
        lambda x, y: nn.cosine_similarity(x * (x > 0), y, axis=1, eps=0.5),
        lambda x, y: nn.cosine_similarity(x * (x > 0), y, axis=1, eps=0.4),
        ((9, 2, 5), (2, 1)),
        (None, None),
    ),
    **{
        f"antialiased {mode} to {size}": Function(
            partial(F.interpolate, size=size, mode=mode, antialias=True),
            partial(nn.interpolate, size=size, mode=mode, antialias=True),
            partial(nn.interpolate, size=size, mode=mode),
            ((2, 3, 11, 8),),
            (IMAGE,),
        )
        for mode in ("bilinear", "bicubic")
        for size in ((5, 3), (4, 13))
    },
    **{
        f"grid sample {mode} with {padding}, corners {corners}": Function(
            partial(F.grid_sample, mode=mode, padding_mode=padding, align_corners=corners),
            partial(nn.grid_sample, mode=mode, padding_mode=padding, align_corners=corners),
            partial(nn.grid_sample, mode=mode, padding_mode=padding, align_corners=not corners),
            ((2, 3, 7, 5), (2, 4, 6, 2)),
            (IMAGE, None),
        )
        for mode, padding, corners in (
            ("bilinear", "zeros", False),
            ("bilinear", "border", True),
            ("nearest", "border", False),
            ("nearest", "zeros", True),
        )
    },
    **{
        f"affine grid, corners {corners}": Function(
            partial(F.affine_grid, size=(2, 3, 4, 5), align_corners=corners),
            partial(nn.affine_grid, size=(4, 5), align_corners=corners),
            partial(nn.affine_grid, size=(4, 5), align_corners=not corners),
            ((2, 2, 3),),
        )
        for corners in (False, True)
    },
}


SECOND = {
    *("antialiased bilinear to (4, 13)", "antialiased bicubic to (5, 3)"),
    *("grid sample bilinear with border, corners True", "affine grid, corners True"),
    *("grid sample nearest with zeros, corners True", "normalize with p=3 and a large eps"),
}
"""Further cases of a function; tried where there is time."""


@pytest.mark.parametrize("name", fast_only(FUNCTIONS.keys() - SECOND, FUNCTIONS))
def test_every_function_is_pytorchs(name):
    case = FUNCTIONS[name]
    arrays = [inputs(shape, seed) for seed, shape in enumerate(case.shapes)]
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    y_torch = case.theirs(*tensors)
    cotangent = np.random.default_rng(1).standard_normal(y_torch.shape)
    y_torch.backward(torch.from_numpy(cotangent))
    output = case.axes[0]

    def moved(array: Any, axes: tuple[int, ...] | None) -> np.ndarray:
        return np.asarray(array) if axes is None else np.transpose(array, axes)

    placed = [jnp.asarray(moved(a, axes)) for a, axes in zip(arrays, case.axes, strict=True)]
    theirs = [moved(y_torch.detach().numpy(), output)]
    for tensor, axes in zip(tensors, case.axes, strict=True):
        gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        theirs.append(moved(gradient.numpy(), axes))

    @jax.jit
    def both(cotangent: jax.Array, *placed: jax.Array) -> list[tuple[jax.Array, ...]]:
        found = []
        for function in (case.ours, case.wrong):
            y, back = jax.vjp(function, *placed)
            found.append((y, *back(cotangent)) if y.shape == cotangent.shape else (y,))
        return found

    ours, wrong = both(jnp.asarray(moved(cotangent, output)), *placed)
    assert max(map(error, ours, theirs)) <= TOLERANCE
    assert max(map(error, wrong, theirs)) >= FAR


NEAREST = [(3, 7), (7, 14), (10, 10), (14, 46), (26, 22), (14, 5)]


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
def test_nearest_rounds_as_pytorch_does(mode):
    other = {"nearest": "nearest-exact", "nearest-exact": "nearest"}[mode]
    noticed = 0
    for (n, out), dtype in product(NEAREST, (np.float32, np.float64)):
        lines = np.broadcast_to(np.arange(n, dtype=dtype), (1, 3, n))
        images = np.broadcast_to(lines[..., None], (1, 3, n, 5))
        for x, size in ((lines, (out,)), (images, (out, 5))):
            truth = channels_last(F.interpolate(torch.tensor(x), size, mode=mode).numpy())
            ours, wrong = (nn.interpolate(channels_last(x), size, mode=m) for m in (mode, other))
            np.testing.assert_array_equal(ours, truth)
            noticed += bool((wrong != truth).any())
    assert noticed > len(NEAREST)


def test_nearest_by_a_factor_rounds_as_pytorch_does():
    x = np.arange(2.0)[None, None, :]
    truth = F.interpolate(torch.tensor(x), scale_factor=1.3).numpy()
    np.testing.assert_array_equal(
        nn.interpolate(channels_last(x), scale_factor=1.3)[..., 0], truth[0]
    )
    doubled = np.broadcast_to(np.arange(2.0)[:, None], (1, 3, 2, 2))
    truth = F.interpolate(torch.tensor(doubled), scale_factor=1.3).numpy()
    ours = nn.interpolate(channels_last(doubled), scale_factor=1.3)
    np.testing.assert_array_equal(ours, channels_last(truth))


def test_dropped_values_have_pytorchs_rate_and_scale():
    x = jnp.ones((400, 5, 6, 4))
    y = nn.Dropout(0.25, broadcast_dims=(1, 2), rngs=nnx.Rngs(0))(x)
    assert bool((y == y[:, :1, :1]).all())
    np.testing.assert_allclose(sorted(set(np.unique(y))), [0, 4 / 3])
    assert abs(float(y.mean()) - 1) < 0.05
    for mode, rows, calls in (("row", 400, 1), ("batch", 2, 200)):
        depth = nn.StochasticDepth(0.3, mode, rngs=nnx.Rngs(0))
        images = jnp.ones((rows, 3, 2))
        kept = np.stack([depth(images).reshape(rows, -1) for _ in range(calls)])
        together = kept.reshape(calls, -1) if mode == "batch" else kept.reshape(rows, -1)
        assert bool((together == together[:, :1]).all())
        np.testing.assert_allclose(np.unique(together), [0, 1 / 0.7])
        assert abs(float((together > 0).mean()) - 0.7) < 0.08
        depth.eval()
        assert depth(x) is x
    values = jax.nn.selu(jax.random.normal(jax.random.key(0), (200_000,)))
    dropped = nn.AlphaDropout(0.2, rngs=nnx.Rngs(0))(values)
    assert abs(float(dropped.mean()) - float(values.mean())) < 0.01
    assert abs(float(dropped.std()) - float(values.std())) < 0.02
    truth = torch.nn.AlphaDropout(0.2)(torch.ones(1000, dtype=torch.float64)).unique()
    ours = jnp.unique(nn.AlphaDropout(0.2, rngs=nnx.Rngs(0))(jnp.ones(1000)))
    np.testing.assert_allclose(ours, truth, rtol=1e-12)
    slopes = -nn.RReLU(0.1, 0.4, rngs=nnx.Rngs(0))(-jnp.ones(10_000))
    assert 0.1 <= float(slopes.min()) < 0.11
    assert 0.39 < float(slopes.max()) <= 0.4


def test_a_random_layer_without_a_stream_says_so():
    for layer in (nn.StochasticDepth(0.5, rngs=None), nn.AlphaDropout(0.5, rngs=None)):
        with pytest.raises(ValueError, match=r"built with rngs=None .* model\.eval\(\)"):
            layer(jnp.ones((2, 3)))


def test_layers_of_torchvision_and_timm_are_known():
    torchvision, timm = import_torchvision(), pytest.importorskip("timm")
    frozen = randomised(torchvision.ops.FrozenBatchNorm2d(6, 1e-3), 0)
    layer = layer_of(frozen)
    assert layer is not None
    x = inputs((2, 6, 5, 7))
    assert max(differences(frozen, layer, x, train=True).values()) <= TOLERANCE
    wrong = replace(layer, options={})
    assert max(differences(frozen, wrong, x, train=True).values()) >= FAR
    found = {
        expression(known)
        for module in (
            torchvision.ops.StochasticDepth(0.2, "batch"),
            timm.layers.DropPath(0.1, scale_by_keep=False),
            torch.nn.RReLU(0.1),
            timm.layers.activations.GELU(),
            timm.layers.activations.Sigmoid(),
            timm.layers.Linear(2, 3),
        )
        if (known := layer_of(module))
    }
    assert found == {
        "nn.StochasticDepth(0.2, mode='batch', rngs=rngs)",
        "nn.StochasticDepth(0.1, scale_by_keep=False, rngs=rngs)",
        "nn.RReLU(lower=0.1, rngs=rngs)",
        "nn.gelu(x)",
        "nn.sigmoid(x)",
        "nn.Linear(2, 3, rngs=rngs)",
    }


@pytest.mark.parametrize(
    "module",
    [
        T.Conv2d(32, 16, (3, 5), groups=2),
        T.Conv1d(64, 32, 3),
        T.ConvTranspose2d(32, 64, 3, groups=2),
        T.ConvTranspose1d(64, 128, 3),
        T.Linear(64, 32),
        T.PReLU(3),
        T.GroupNorm(2, 4),
    ],
    ids=str,
)
def test_parameters_start_within_pytorchs_bounds(module):
    layer = layer_of(module)
    assert layer is not None
    model = eval(expression(layer), {"nn": nn, "rngs": nnx.Rngs(0)})
    torch.manual_seed(0)
    module.double().reset_parameters()
    for name, (path, codec) in layer.tensors.items():
        theirs = codec.to_flax(module.state_dict()[name].numpy())
        ours = np.asarray(variable_at(model, (path,))[...])
        assert ours.shape == theirs.shape
        # Both are uniform around zero, so far as their numbers of values tell.
        most, few = np.abs(theirs).max(), ours.size**-0.5
        np.testing.assert_allclose(np.abs(ours).max(), most, rtol=2 * few)
        np.testing.assert_allclose(ours.mean(), theirs.mean(), atol=3 * few * most)


def test_every_public_name_is_there():
    assert [name for name in nn.__all__ if not callable(getattr(nn, name))] == []
    assert set(nn.__all__) <= set(dir(nn))
    with pytest.raises(AttributeError, match="has no attribute 'Conv3d'"):
        nn.Conv3d  # noqa: B018


def test_sequential_hands_on_what_a_layer_returns():
    layers = nn.Sequential(lambda x: (x, x + 1), sum, nn.PReLU(rngs=nnx.Rngs(0)), nn.relu)
    assert layers(jnp.asarray(2.0)).tolist() == [5]
    assert len(layers) == 4
    assert [path for path, _ in nnx.to_flat_state(nnx.state(layers))] == [("layers", 2, "weight")]
    assert nn.Sequential()(3) == 3


def test_training_keeps_the_outputs_of_blocks_in_a_sequence():
    """Without that XLA computes each of them again for every user, on a CPU."""

    def block() -> nn.Sequential:
        return nn.Sequential(nn.PReLU(rngs=nnx.Rngs(0)), nn.relu)

    def kept(layers: nn.Sequential, lowering: Any) -> bool:
        with conv_lowering(lowering):
            traced = jax.make_jaxpr(jax.grad(lambda x: layers(x).sum()))(jnp.ones(3))
        return "resblock_materialised" in str(traced)

    blocks, layers = nn.Sequential(block(), block()), nn.Sequential(nn.relu, nn.relu)
    assert [kept(blocks, "auto"), kept(layers, "auto"), kept(blocks, "xla")] == [True, False, False]


def with_hook(module: torch.nn.Module) -> torch.nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


REFUSALS = {
    "three spatial axes are not supported": lambda: T.Conv3d(1, 1, 1),
    "recurrent layers are not supported": lambda: T.LSTM(2, 2),
    "returns indices too": lambda: T.MaxPool2d(2, return_indices=True),
    "has forward hooks": lambda: with_hook(T.ReLU()),
    "has forward pre hooks": lambda: torch.nn.utils.weight_norm(T.Linear(2, 2)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("message", REFUSALS)
def test_what_is_known_and_not_supported_is_refused(message):
    with pytest.raises(InputError, match=message):
        layer_of(REFUSALS[message]())


def test_a_forward_that_was_replaced_is_refused():
    module = T.ReLU()
    module.forward = lambda input: input + 1
    with pytest.raises(InputError, match="a forward that was replaced"):
        layer_of(module)


def test_other_modules_are_left_to_the_trace():
    class Own(T.ReLU):
        pass

    others = (Own(), T.Flatten(), T.Softmax(-1), T.LayerNorm((3, 4)), T.Sequential(), T.Unflatten)
    assert [layer_of(one) for one in others[:-1]] == [None] * 5


@pytest.mark.parametrize(
    ("message", "call"),
    {
        "stride 1": lambda x: nn.convolve(x, x, stride=2, padding="same"),
        "'valid', 'SAME' or numbers": lambda x: nn.convolve(x, x, padding="full"),
        "one number or 2": lambda x: nn.convolve(x, x, stride=(1, 2, 3)),
        "convolve takes": lambda x: nn.convolve(x[0, 0], x[0, 0]),
        "conv_transpose takes": lambda x: nn.conv_transpose(x[0, 0], x[0, 0]),
        "at most half": lambda x: nn.max_pool(x, 2, padding=2),
        "cannot pad an axis of 2 values by": lambda x: nn.pad(x, ((2, 0),) * 4, "reflect"),
        "mode 'even' is unknown": lambda x: nn.pad(x, ((1, 0),) * 4, "even"),
        "needs windows of shape": lambda x: nn.fold(x[0], 2, 1),
        "more than one pixel": lambda x: nn.instance_norm(x[:, :1, :1]),
        "one of size and scale_factor": lambda x: nn.interpolate(x),
        "mode 'area' is unknown": lambda x: nn.interpolate(x, 2, mode="area"),
        "align_corners cannot be set": lambda x: nn.interpolate(x, 2, align_corners=False),
        "antialias needs": lambda x: nn.interpolate(x, 2, antialias=True),
        "positive and finite p": lambda x: nn.normalize(x, p=float("inf")),
        "padding_mode 'even' is": lambda x: nn.Conv(2, 2, 1, padding_mode="even", rngs=None),
        "groups=3 must divide": lambda x: nn.ConvTranspose(2, 2, 1, groups=3, rngs=None),
        "a rate from 0 to 1": lambda x: nn.StochasticDepth(1.5, rngs=None),
        "expects \\(N, L, 3\\)": lambda x: nn.Conv1d(3, 2, 1, rngs=nnx.Rngs(0))(x),
    }.items(),
)
def test_a_wrong_argument_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call(jnp.ones((2, 2, 2, 2)))


CAREFUL, HURRIED = ({"xla_backend_optimization_level": level} for level in (2, 0))
"""With the second, XLA computes the values that are compared once more, and rounds otherwise."""


def test_the_greatest_values_are_found_again_in_the_backward_pass():
    """The gradient of ``jnp.max`` gets lost there: the control."""
    rng = np.random.default_rng(0)
    shapes = ((6, 2, 2, 4), (4,), (4,), (6, 4))

    with jax.enable_x64(True):
        x, scale, bias, weight = (jnp.asarray(rng.standard_normal(shape)) for shape in shapes)

        def gradient(largest, options):
            def loss(x):
                y, _ = normalised_by_batch(x, scale, bias, 1e-5)
                return jnp.sum(largest(nn.relu(y), (1, 2)) * weight)

            return jax.jit(jax.grad(loss), compiler_options=options)(x)

        plain = gradient(jnp.max, CAREFUL)
        assert error(gradient(nn.amax, CAREFUL), plain) <= TOLERANCE
        assert error(gradient(nn.amax, HURRIED), plain) <= TOLERANCE
        assert error(gradient(jnp.max, HURRIED), plain) > FAR
