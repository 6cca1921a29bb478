"""Every layer and function of :mod:`flax_resblock.nn` against PyTorch's, in float64: values, all
gradients and running statistics. Each family has a negative control: one option is changed, and the
comparison must fail by far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import nn
from flax_resblock.nn.variables import variable_at
from flax_resblock.port.layers import Layer, layer_of

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
    """A module, the shape of its input, and options of the layer that are wrong for it."""

    module: torch.nn.Module
    shape: tuple[int, ...] = (2, 6, 7, 9)
    wrong: Mapping[str, Any] = field(default_factory=dict)


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
    Case(T.PReLU(), wrong={}),
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


@pytest.mark.parametrize("case", CASES, ids=named)
def test_every_layer_is_pytorchs(case):
    module = randomised(case.module, 0)
    layer = layer_of(module)
    assert layer is not None
    names = {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    assert set(layer.tensors) == names
    x = inputs(case.shape)
    for train in (True, False):
        found = differences(module, layer, x, train=train)
        assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("case", [case for case in CASES if case.wrong], ids=named)
def test_a_wrong_option_is_found(case):
    module = randomised(case.module, 0)
    layer = layer_of(module)
    assert layer is not None
    wrong = replace(layer, options={**layer.options, **case.wrong}, tensors=dict(layer.tensors))
    x = inputs(case.shape)
    if case.wrong.get("use_bias") is False:
        del wrong.tensors["bias"]
    found = [differences(module, wrong, x, train=train) for train in (True, False)]
    assert max(max(one.values()) for one in found) >= FAR
