"""Known mistakes between the layers: activations, pooling, flattening, additions and the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
import torch
from torch.nn import functional as F

from flax_resblock.parity.causes import Candidate, Cause, dropped, explain, not_finite
from flax_resblock.parity.oracle import relative_l2


@dataclass(frozen=True)
class Connection:
    """What arrives at a slot.

    Attributes:
      truth: What is meant to arrive, NHWC.
      outputs: What every slot before this place gave, by slot name in forward order; the most
        recent ones matter most.
      all_outputs: What every slot gave; the branches of a block may run in any order.
    """

    truth: np.ndarray
    images: np.ndarray
    outputs: Mapping[str, np.ndarray]
    all_outputs: Mapping[str, np.ndarray]


Activation = Callable[[torch.Tensor], torch.Tensor]

_ACTIVATIONS: Mapping[str, Activation] = {
    "ReLU": F.relu,
    "no activation": lambda x: x.clone(),
    "GELU": F.gelu,
    "GELU (tanh form)": partial(F.gelu, approximate="tanh"),
    "SiLU": F.silu,
    "LeakyReLU(0.01)": partial(F.leaky_relu, negative_slope=0.01),
    "LeakyReLU(0.1)": partial(F.leaky_relu, negative_slope=0.1),
    "LeakyReLU(0.2)": partial(F.leaky_relu, negative_slope=0.2),
    "ReLU6": F.relu6,
    "ELU": F.elu,
    "SELU": F.selu,
    "softplus": F.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "Mish": F.mish,
    "hardswish": F.hardswish,
}


def _in_float64(function: Activation) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: function(torch.from_numpy(np.array(x, np.float64))).numpy()


ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    name: _in_float64(function) for name, function in _ACTIVATIONS.items()
}
"""Activations by the names that a diagnosis calls them; evaluated in float64."""


def activation_between(before: np.ndarray, after: np.ndarray) -> str | None:
    """The name of the activation that turns one array into the other, if it is a known one."""
    return next((n for n, f in ACTIVATIONS.items() if relative_l2(f(before), after) <= 1e-12), None)


def activation_slope(name: str, before: np.ndarray) -> np.ndarray:
    """The derivative of an activation at ``before``."""
    x = torch.from_numpy(np.array(before, np.float64)).requires_grad_()
    _ACTIVATIONS[name](x).sum().backward()
    assert x.grad is not None
    return x.grad.numpy()


_CONSTANTS = {
    "ImageNet's mean and standard deviation": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "CIFAR-10's mean and standard deviation": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    "mean 0.5 and standard deviation 0.5": ([0.5], [0.5]),
    "a factor of 255": ([0.0], [255.0]),
    "a factor of 1/255": ([0.0], [1 / 255]),
}


def explain_connection(connection: Connection, value: np.ndarray) -> Cause | None:
    """The mistake by which ``value`` arrives."""
    found = not_finite(connection.truth, value, "feeds it")
    return found or explain(value, _candidates(connection, value))


def _candidates(connection: Connection, value: np.ndarray) -> Iterator[Candidate]:
    truth, images = connection.truth, connection.images
    if truth.ndim == 4:
        if truth.shape[-1] > 1:
            words = "feeds the channels in reverse order (RGB and BGR)"
            yield "reversed-channels", words, lambda: truth[..., ::-1]
        words = "feeds the image with height and width exchanged"
        yield "transposed-image", words, lambda: truth.transpose(0, 2, 1, 3)
        yield "flipped-image", "feeds the image upside down", lambda: truth[:, ::-1]
        yield "flipped-image", "feeds the image mirrored", lambda: truth[:, :, ::-1]
        words = "reads the NHWC image as NCHW (reshaped instead of transposed)"
        yield "memory-layout", words, lambda: truth.transpose(0, 3, 1, 2).reshape(truth.shape)
        words = "reads the NCHW image as NHWC (reshaped instead of transposed)"
        n, height, width, channels = truth.shape
        shape = n, channels, height, width
        yield "memory-layout", words, lambda: truth.reshape(shape).transpose(0, 2, 3, 1)
    outputs = list(connection.outputs.items())[::-1]
    before = [(name, array) for name, array in outputs if array.shape == truth.shape]
    for source, array in before:  # which layer's output, under which activation, is meant to arrive
        meant = activation_between(array, truth)
        if meant is None:
            continue
        for other, f in ACTIVATIONS.items():
            if other != meant:
                name = "missing-relu" if other == "no activation" else "other-activation"
                words = f"applies {other} after {source} instead of {meant}"
                yield name, words, lambda f=f, a=array: f(a)
        for second, theirs in [*before, *connection.all_outputs.items(), ("the input", images)]:
            if second != source and theirs.shape == array.shape:
                words = f"adds {second} to {source} already here"
                yield "skip-before-norm", words, lambda a=array, t=theirs: a + t
        break
    if value.shape == truth.shape and value.ndim == 4:
        yield from _normalisation(truth, value)
    yield from _pooling(connection, value)
    for source, array in outputs:
        if source != "input" and array.shape == value.shape:
            yield "overwritten-branch", f"feeds it the output of {source}", lambda a=array: a
            words = f"feeds it the ReLU of the output of {source}"
            yield "overwritten-branch", words, lambda a=array: np.maximum(a, 0)
    if value.shape == truth.shape:
        words = "drops {share:.0%} of the values before it (dropout at rate {rate:.3g})"
        yield from dropped(truth, value, words)


def _normalisation(truth: np.ndarray, value: np.ndarray) -> Iterator[Candidate]:
    """An affine map per channel."""
    x, y = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (truth, value))
    centred = x - x.mean(0)
    with np.errstate(all="ignore"):
        scale = np.sum(centred * (y - y.mean(0)), 0) / np.sum(centred**2, 0)
    shift = y.mean(0) - scale * x.mean(0)
    known = ""
    for words, (mean, deviation) in _CONSTANTS.items():
        for once in (np.divide(1, deviation), np.asarray(deviation)):
            if len(mean) in (1, len(scale)) and np.allclose(scale, once, rtol=1e-3):
                known = f" ({words})"
    listed = ", ".join(f"{a:.4g} x {b:+.4g}" for a, b in zip(scale[:4], shift[:4], strict=True)) + (
        ", ..." if len(scale) > 4 else ""
    )
    words = f"normalises its input with other constants: per channel {listed}{known}"
    yield "normalisation-constants", words, lambda: truth * scale + shift


_FLATTENED: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "flattened in the order (channel, height, width)": lambda x: x.transpose(0, 3, 1, 2).reshape(
        len(x), -1
    ),
    "flattened in the order (height, width, channel)": lambda x: x.reshape(len(x), -1),
    "averaged over the image": lambda x: x.mean((1, 2)),
    "maximised over the image": lambda x: x.max((1, 2)),
    "summed over the image": lambda x: x.sum((1, 2)),
    "cut to one corner of the image": lambda x: x[:, 0, 0],
    "averaged and maximised over the image, together": lambda x: x.mean((1, 2)) + x.max((1, 2)),
}


def _pooling(connection: Connection, value: np.ndarray) -> Iterator[Candidate]:
    """What comes between the last image and a linear layer: an activation, and a way from the image
    to a vector."""
    truth = connection.truth
    if truth.ndim != 2:
        return

    def pooled(array: np.ndarray, way: tuple[str, str]) -> np.ndarray:
        return _FLATTENED[way[1]](ACTIVATIONS[way[0]](array))

    for source, array in list(connection.outputs.items())[::-1]:
        if array.ndim != 4 or len(array) != len(value):
            continue
        fitting = [how for how, f in _FLATTENED.items() if f(array).shape == truth.shape]
        ways = list(product(ACTIVATIONS, fitting))
        meant = next((way for way in ways if relative_l2(pooled(array, way), truth) <= 1e-12), None)
        if meant is None:
            continue
        # one mistake before two
        for a, how in sorted(ways, key=lambda way: (way[0] != meant[0]) + (way[1] != meant[1])):
            if (a, how) == meant:
                continue
            orders = "flattened" in how and "flattened" in meant[1]
            name = "flatten-order" if orders else "other-pooling"
            if how == meant[1]:
                name = "other-activation"
            words = f"feeds {source} with {a}, {how}, instead of with {meant[0]}, {meant[1]}"
            yield name, words, lambda way=(a, how), array=array: pooled(array, way)
        return
