"""Known mistakes of a layer that is given the right input and the right weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from flax_resblock.parity.causes import (
    FORMATS,
    MATCH,
    Candidate,
    Cause,
    LayerRun,
    dropped,
    effective_bits,
    explain,
    not_finite,
    rounded,
)
from flax_resblock.parity.causes.norms import norm_candidates, sample_norm_candidates
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.taps import as_array, as_tensor

EXACT = PRECISIONS["float64"]


def explain_layer(layer: LayerRun, value: np.ndarray, limit: float = MATCH) -> Cause | None:
    """The mistake by which the layer gives ``value``; ``limit`` as for
    :func:`flax_resblock.parity.causes.explain`."""
    if cause := not_finite(layer.truth, value, "gives"):
        return cause
    families = (
        (torch.nn.Conv2d, _convolution),
        (torch.nn.modules.batchnorm._BatchNorm, norm_candidates),
        (
            (torch.nn.GroupNorm, torch.nn.LayerNorm, torch.nn.modules.instancenorm._InstanceNorm),
            sample_norm_candidates,
        ),
        (torch.nn.Linear, _linear),
        (torch.nn.MaxPool2d, _pool),
    )
    candidates = next((family for kind, family in families if isinstance(layer.module, kind)), None)
    found = None
    if candidates is not None and layer.x.ndim in (2, 4):
        found = explain(value, candidates(layer, value), limit)
    found = found or explain(value, _any_layer(layer, value), limit)
    return found or _reduced_precision(layer, value)


Pads = tuple[tuple[int, int], tuple[int, int]]


def _conv(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: Any,
    stride: int,
    pads: Pads,
    dilation: int,
    groups: int,
    mode: str = "constant",
) -> np.ndarray:
    (top, bottom), (left, right) = pads
    padded = F.pad(as_tensor(x, EXACT), (left, right, top, bottom), mode=mode)
    weight = torch.from_numpy(np.array(kernel.transpose(3, 2, 0, 1), np.float64, order="C"))
    if bias is not None:
        bias = torch.from_numpy(np.asarray(bias, np.float64))
    return as_array(F.conv2d(padded, weight, bias, stride, 0, dilation, groups))


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def _both(padding: int) -> Pads:
    return (padding, padding), (padding, padding)


def _convolution(layer: LayerRun, value: np.ndarray) -> Iterator[Candidate]:
    module, x, kernel = layer.module, layer.x, layer.tensors["kernel"]
    size, stride, padding, dilation = (
        getattr(module, name)[0] for name in ("kernel_size", "stride", "padding", "dilation")
    )
    groups, bias = int(module.groups), layer.tensors.get("bias")  # pyright: ignore[reportArgumentType]

    def conv(x: np.ndarray = x, kernel: np.ndarray = kernel, **changes: Any) -> np.ndarray:
        options = {"bias": bias, "stride": stride, "pads": _both(padding), "dilation": dilation}
        return _conv(x, kernel, **(options | changes), groups=groups)

    height, width = (_same(n, size, stride, dilation) for n in x.shape[1:3])
    if (height, width) != _both(padding):
        words = (
            f"pads 'SAME', {height} by {width} pixels at the edges, instead of {padding} on each "
            f"side"
        )
        yield "same-padding", words, lambda: conv(pads=(height, width))
    if padding:
        for where, pads in (("at the end", (0, padding)), ("at the beginning", (padding, 0))):
            words = f"pads {padding} pixels {where} only instead of on each side"
            yield "same-padding", words, lambda p=pads: conv(pads=(p, p))
    for other in range(6):
        if other != padding:
            words = f"pads {other} pixels instead of {padding}"
            yield "padding", words, lambda p=other: conv(pads=_both(p))
        if other and other != stride:
            words = f"has stride {other} instead of {stride}"
            yield "stride", words, lambda s=other: conv(stride=s)
        if other and other != dilation:
            words = f"has dilation {other} instead of {dilation}"
            yield "dilation", words, lambda d=other: conv(dilation=d, pads=_both(d * (size // 2)))
            words = f"has dilation {other} instead of {dilation}, at the same padding"
            yield "dilation", words, lambda d=other: conv(dilation=d)
    for mode in ("reflect", "replicate", "circular"):
        words = f"pads in the mode {mode!r} instead of with zeros"
        yield "padding-mode", words, lambda m=mode: conv(mode=m)
    words = "applies the kernel flipped (a convolution, not a cross-correlation)"
    yield "flipped-kernel", words, lambda: conv(kernel=kernel[::-1, ::-1])
    words = "applies the kernel with height and width exchanged"
    yield "transposed-kernel", words, lambda: conv(kernel=kernel.transpose(1, 0, 2, 3))
    words = "applies the kernel with input and output channels exchanged"
    yield "transposed-kernel", words, lambda: conv(kernel=kernel.transpose(0, 1, 3, 2))
    words = "takes the channels of its input in reverse order (RGB and BGR)"
    yield "reversed-channels", words, lambda: conv(x=x[..., ::-1])
    for name, theirs in layer.others.get("kernel", {}).items():
        if theirs.shape == kernel.shape:
            yield "swapped-tensor", f"applies the kernel of {name}", lambda k=theirs: conv(kernel=k)
    if bias is not None:
        yield "bias", "leaves the bias out", lambda: conv(bias=None)
    yield from _rounded(lambda bits: conv(x=rounded(x, bits), kernel=rounded(kernel, bits)))


def _linear(layer: LayerRun, value: np.ndarray) -> Iterator[Candidate]:
    x, kernel = layer.x, layer.tensors["kernel"]
    bias = layer.tensors.get("bias", np.zeros(kernel.shape[-1]))
    yield "bias", "leaves the bias out", lambda: x @ kernel
    yield "transposed-kernel", "applies the matrix transposed", lambda: x @ kernel.T + bias
    yield "bias", "adds the bias twice", lambda: x @ kernel + 2 * bias
    yield from _rounded(lambda bits: rounded(x, bits) @ rounded(kernel, bits) + bias)


def _rounded(formula: Any) -> Iterator[Candidate]:
    for name, bits in list(FORMATS.items())[:2]:
        words = (
            f"computes in {name}: its operands are rounded to {bits} mantissa bits before they are "
            f"multiplied"
        )
        yield "reduced-precision", words, lambda b=bits: formula(b)


def _pool(layer: LayerRun, value: np.ndarray) -> Iterator[Candidate]:
    window, stride, padding = (
        int(v if isinstance(v := getattr(layer.module, name), int) else v[0])
        for name in ("kernel_size", "stride", "padding")
    )
    x = as_tensor(layer.x, EXACT)

    def pool(top: int, bottom: int, left: int, right: int, fill: float = -np.inf) -> np.ndarray:
        padded = F.pad(x, (left, right, top, bottom), value=fill)
        return as_array(F.max_pool2d(padded, window, stride))

    same = [_same(n, window, stride, 1) for n in layer.x.shape[1:3]]
    words = (
        f"pads 'SAME', {same[0]} by {same[1]} pixels at the edges, instead of {padding} on "
        f"each side"
    )
    yield "same-padding", words, lambda: pool(*same[0], *same[1])
    words = "pads with zeros instead of minus infinity"
    yield "padding", words, lambda: pool(padding, padding, padding, padding, 0.0)
    yield "padding", "does not pad", lambda: pool(0, 0, 0, 0)
    words = "takes the mean instead of the maximum"
    average = partial(F.avg_pool2d, x, window, stride, padding)
    yield "other-pooling", words, lambda: as_array(average())
    words = "takes the mean without counting the padding"
    yield "other-pooling", words, lambda: as_array(average(count_include_pad=False))
    longer = partial(F.max_pool2d, x, window, stride, padding, ceil_mode=True)
    yield "ceil-mode", "rounds the output size up (ceil_mode)", lambda: as_array(longer())
    for other in (2, 3):
        for step in (1, 2, 3):
            words = (
                f"pools {other}x{other} windows at stride {step} instead of {window}x{window} at "
                f"stride {stride}"
            )
            pooled = partial(F.max_pool2d, x, other, step, min(padding, other // 2))
            yield "other-pooling", words, lambda pooled=pooled: as_array(pooled())


def _any_layer(layer: LayerRun, value: np.ndarray) -> Iterator[Candidate]:
    """What can happen to any layer."""
    truth = layer.truth
    if value.shape != truth.shape:
        return
    yield "extra-relu", "applies a ReLU that does not belong there", lambda: np.maximum(truth, 0)
    with np.errstate(all="ignore"):
        shift = np.mean(value - truth, axis=tuple(range(truth.ndim - 1)))
        factor = float(np.vdot(value, truth) / np.vdot(truth, truth))
    yield "bias", "adds a bias per channel that the layer does not have", lambda: truth + shift
    yield "scaled", f"gives {factor:.6g} times the value", lambda: factor * truth
    words = "drops {share:.0%} of the values and scales the others (dropout at rate {rate:.3g})"
    yield from dropped(truth, value, words)


_ALIKE = 0.9
"""Correlation of an error with the value above which it is not rounding: truncated mantissas reach
0.87, rounded ones less than a hundredth."""


def _reduced_precision(layer: LayerRun, value: np.ndarray) -> Cause | None:
    """Unstructured error of the size that a narrower format makes."""
    error = relative_l2(value, layer.truth)
    if not 1e-10 < error < 0.02 or value.shape != layer.truth.shape:
        return None
    axes = tuple(range(value.ndim - 1))
    wrong, right = (part - part.mean(axes) for part in (value - layer.truth, layer.truth))
    with np.errstate(all="ignore"):
        alike = abs(np.vdot(wrong, right)) / (np.linalg.norm(wrong) * np.linalg.norm(right))
    if alike > _ALIKE:
        return None
    bits = effective_bits(value, layer.truth)
    close = min(FORMATS, key=lambda name: abs(FORMATS[name] - bits))
    return Cause(
        "reduced-precision",
        f"computes with about {bits:.1f} effective mantissa bits (nearest format: {close}, "
        f"{FORMATS[close]})",
        error,
    )
