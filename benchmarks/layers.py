"""What a residual network multiplies on paper: its operations, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Literal

from flax_resblock.config import Branch, ResNetConfig, Slot, SlotKind, walk

What = Literal["forward", "train-step"]
_PRODUCT_PASSES: Mapping[What, int] = MappingProxyType({"forward": 1, "train-step": 3})
"""The layer itself, and in training the gradients of its input and of its kernel, each with as many
multiplications."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One operation of the network; every count is per image.

    Attributes:
      group: ``"stem"``, ``"stage1"`` ... ``"head"``.
      kind: ``"conv"``, ``"norm"``, ``"relu"``, ``"add"``, ``"pool"``, ``"mean"`` or ``"linear"``.
      inputs, outputs: Elements.
      products: Multiply-adds, with those that meet padding.
      inside: Multiply-adds without them.
      parameters: Trainable ones.
      first: Whether its input is the image, which needs no gradient.
    """

    group: str
    kind: str
    inputs: int
    outputs: int
    products: int = 0
    inside: int = 0
    parameters: int = 0
    first: bool = False

    def multiply_adds(self, what: What, padding: bool) -> int:
        """Of the whole program; ``padding`` says whether multiplications with padding count."""
        passes = _PRODUCT_PASSES[what] - (self.first and what == "train-step")
        return (self.products if padding else self.inside) * passes


def _inside(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pairs of output pixel and tap, along one axis, that meet no padding."""
    outputs = _size(size, kernel, stride, padding, dilation)
    pairs = product(range(outputs), range(kernel))
    return sum(0 <= out * stride - padding + tap * dilation < size for out, tap in pairs)


def _size(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _padding(slot: Slot) -> int:
    if slot.padding == "SAME":
        raise ValueError("networks with padding 'same' are not counted here.")
    return slot.padding


def _conv(slot: Slot, size: int, channels: int, *, first: bool) -> tuple[Layer, int]:
    """The layer of a convolution, and the size of its output."""
    kernel, _, fan, out = slot.shape
    geometry = kernel, slot.stride, _padding(slot), slot.dilation
    after = _size(size, *geometry)
    layer = Layer(
        group=slot.stage,
        kind="conv",
        inputs=size**2 * channels,
        outputs=after**2 * out,
        products=after**2 * kernel**2 * fan * out,
        inside=_inside(size, *geometry) ** 2 * fan * out,
        parameters=slot.parameters,
        first=first,
    )
    return layer, after


def _elementwise(group: str, kinds: Iterable[str], size: int, channels: int) -> list[Layer]:
    n, of_norm = size**2 * channels, 2 * channels
    parameters = {kind: of_norm if kind == "norm" else 0 for kind in kinds}
    return [
        Layer(group=group, kind=kind, inputs=n, outputs=n, parameters=count)
        for kind, count in parameters.items()
    ]


def layers(config: ResNetConfig, size: int) -> list[Layer]:
    """Every operation of a network on square images of ``size`` pixels, in forward order.

    Raises:
      ValueError: Attention, blurs, pooled shortcuts and padding ``"same"`` are not counted.
    """
    slots = list(walk(config))
    if any(slot.branch is Branch.ATTENTION or slot.kind in _UNCOUNTED for slot in slots):
        raise ValueError(
            "networks with attention, blurred strides or pooled shortcuts are not counted "
            "here; use resnet50 or another of torchvision's."
        )
    found: list[Layer] = []
    main = entry = size, config.in_channels  # size and channels: here, and where the block begins
    place = None
    for slot in slots:
        if (slot.stage, slot.block) != place:
            place, entry = (slot.stage, slot.block), main
        before = entry if slot.branch is Branch.SHORTCUT else main
        if slot.branch is Branch.HEAD:
            found.append(_mean(*main))
        operations, after = _operations(slot, *before, first=not found)
        found += operations
        if slot.branch is Branch.SHORTCUT:
            entry = after
        else:
            main = after
    return found if config.num_classes is not None else [*found, _mean(*main)]


_UNCOUNTED = (SlotKind.AVERAGE_POOL, SlotKind.BLUR)


def _mean(size: int, channels: int) -> Layer:
    return Layer(group="head", kind="mean", inputs=size**2 * channels, outputs=channels)


def _operations(
    slot: Slot, size: int, channels: int, *, first: bool
) -> tuple[list[Layer], tuple[int, int]]:
    """What is computed at a slot, and size and channels behind it."""
    activation = ("relu",) if slot.activation else ()
    if slot.convolves:
        conv, after = _conv(slot, size, channels, first=first)
        return [conv], (after, slot.shape[-1])
    if slot.kind is SlotKind.NORM:
        return _elementwise(slot.stage, ("norm", *activation), size, channels), (size, channels)
    if slot.is_block:
        return _elementwise(slot.stage, ("add", *activation), size, channels), (size, channels)
    if slot.kind is SlotKind.MAX_POOL:
        after = _size(size, slot.shape[0], slot.stride, _padding(slot))
        before, behind = size**2 * channels, after**2 * channels
        pool = Layer(group=slot.stage, kind="pool", inputs=before, outputs=behind)
        return [pool], (after, channels)
    products = math.prod(slot.shape)
    head = Layer(
        group=slot.stage,
        kind="linear",
        inputs=channels,
        outputs=slot.shape[-1],
        products=products,
        inside=products,
        parameters=slot.parameters,
    )
    return [head], (1, slot.shape[-1])


def flops(network: Iterable[Layer], what: What, batch: int, *, padding: bool = True) -> int:
    """Two per multiply-add of every convolution and product; a train step has three times those of
    the forward pass, less the gradient of the image."""
    return 2 * batch * sum(layer.multiply_adds(what, padding) for layer in network)
