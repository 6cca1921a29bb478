"""What a residual network costs on paper: bytes, the time that a device's two roofs allow, and the
time of all-reduces. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from layers import Layer, What, flops

Fusion = Literal["fused", "alone"]

ELEMENTWISE, OPTIMIZER = "BatchNorm, ReLU, addition", "optimizer"
PARAMETER_BYTES = 4
_OPTIMIZER_PASSES = 5
"""Of SGD with momentum: parameter, gradient and momentum are read, parameter and momentum
written."""
_PARAMETER_PASSES: Mapping[What, int] = MappingProxyType({"forward": 1, "train-step": 3})
"""Kernels are read forward and for the gradient of the input, and their own gradient is written."""
_CASES: tuple[tuple[What, Fusion], ...] = (
    ("forward", "alone"),
    ("forward", "fused"),
    ("train-step", "alone"),
    ("train-step", "fused"),
)
_PASSES = {
    "conv": ((1, 1), (1, 1), (3, 3), (3, 2)),
    "norm": ((0, 2), (0, 0), (0, 9), (0, 2)),
    "relu": ((0, 2), (0, 0), (0, 5), (0, 0)),
    "add": ((0, 3), (0, 1), (0, 6), (0, 4)),
    "pool": ((1, 1), (1, 1), (3, 2), (3, 2)),
    "mean": ((1, 1), (1, 1), (2, 2), (2, 2)),
    "linear": ((1, 1), (1, 1), (3, 3), (3, 2)),
}

TRAFFIC: Mapping[tuple[What, Fusion], Mapping[str, tuple[int, int]]] = MappingProxyType(
    {case: {kind: of[i] for kind, of in _PASSES.items()} for i, case in enumerate(_CASES)}
)
"""How often the elements of a layer's input and of its output cross the memory interface.

``"alone"``: every operation is a kernel of its own. A norm in training reads its input three times
  and writes once (mean, deviations, normalisation);
backward it reads gradient and input twice and writes once.

``"fused"``, the least that batch statistics allow: norms, ReLUs and masks are computed where their
values are written or read anyway. A convolution reads its input and writes its output; backward it
reads the gradient of its output once for both of its own gradients and the saved input, and writes
the gradient of the input. A norm's backward pass needs the saved output of the convolution twice,
because its sums must be complete before they are used. An addition waits for the last norm's
statistics, so that three arrays move, and the second of two gradients that meet at a block's input
is one more. In evaluation nothing
waits: an addition only reads the skip."""


def moved(layer: Layer, what: What, batch: int, width: int, fusion: Fusion) -> tuple[int, int]:
    """Bytes of activations, ``width`` each, and of parameters that a layer's passes move; see
    :data:`TRAFFIC`."""
    ins, outs = TRAFFIC[what, fusion][layer.kind]
    ins -= layer.first and what == "train-step"
    activations = batch * width * (ins * layer.inputs + outs * layer.outputs)
    return activations, PARAMETER_BYTES * layer.parameters * _PARAMETER_PASSES[what]


def group_of(layer: Layer) -> str:
    """Its row in a table: norms, ReLUs and additions have one for the whole network."""
    return ELEMENTWISE if layer.kind in ("norm", "relu", "add") else layer.group


@dataclass(frozen=True)
class Device:
    """The two roofs of a device.

    Attributes:
      name: For people.
      peaks: FLOP/s of products, by arithmetic.
      bandwidth: Bytes/s of its memory.
      memory: Bytes.
      source: Where the numbers come from.
    """

    name: str
    peaks: Mapping[str, float]
    bandwidth: float
    memory: float
    source: str


@dataclass
class Part:
    """A group of layers: FLOPs, bytes, and seconds at least, in all and of the layers that wait for
    memory."""

    group: str
    flops: float = 0
    bytes: float = 0
    seconds: float = 0
    waiting: float = 0

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    def add(self, flops: float, bytes_: float, peak: float, bandwidth: float) -> None:
        """One more operation, which takes as long as the slower of its FLOPs and its bytes."""
        seconds = max(flops / peak, bytes_ / bandwidth)
        self.flops += flops
        self.bytes += bytes_
        self.seconds += seconds
        self.waiting += seconds if bytes_ / bandwidth > flops / peak else 0


def roofline(
    network: Iterable[Layer],
    what: What,
    batch: int,
    *,
    width: int,
    fusion: Fusion,
    peak: float,
    bandwidth: float,
) -> dict[str, Part]:
    """The least time of a program, by groups of layers; the operations follow one another, each at
    the roof that is lower for it.

    Args:
      network, what, batch: The program, and its images.
      width: Bytes of an activation.
      fusion: See :data:`TRAFFIC`.
      peak, bandwidth: FLOP/s and bytes/s of the device.
    """
    network = list(network)
    parts: dict[str, Part] = {}
    for layer in network:
        part = parts.setdefault(group_of(layer), Part(group_of(layer)))
        bytes_ = sum(moved(layer, what, batch, width, fusion))
        part.add(2 * batch * layer.multiply_adds(what, True), bytes_, peak, bandwidth)
    parts[ELEMENTWISE] = parts.pop(ELEMENTWISE)  # last
    if what == "train-step":
        parts[OPTIMIZER] = Part(OPTIMIZER)
        bytes_ = PARAMETER_BYTES * _OPTIMIZER_PASSES * sum(layer.parameters for layer in network)
        parts[OPTIMIZER].add(0, bytes_, peak, bandwidth)
    return parts


def total(parts: Mapping[str, Part]) -> Part:
    """All groups together."""
    sums = ((part.flops, part.bytes, part.seconds, part.waiting) for part in parts.values())
    return Part("all", *map(sum, zip(*sums, strict=True)))


def balanced_batch(
    network: Iterable[Layer],
    what: What,
    *,
    width: int,
    fusion: Fusion,
    peak: float,
    bandwidth: float,
) -> int | None:
    """The smallest batch whose FLOPs take as long as its bytes; None where the bytes take longer at
    every batch, as they grow with it too."""
    network = list(network)
    each = [moved(layer, what, 1, width, fusion) for layer in network]
    fixed = sum(parameters for _, parameters in each)
    if what == "train-step":
        fixed += PARAMETER_BYTES * _OPTIMIZER_PASSES * sum(layer.parameters for layer in network)
    moving = sum(activations for activations, _ in each)
    gained = flops(network, what, 1) / peak - moving / bandwidth
    return math.ceil(fixed / bandwidth / gained) if gained > 0 else None


@dataclass(frozen=True)
class Network:
    """How devices are joined: some of them closely, and such groups by what their hosts have.

    Attributes:
      name: For people.
      inner: Devices that are joined closely, at most.
      inner_bandwidth: Bytes/s that one device sends.
      inner_latency: Seconds per step.
      outer_bandwidth: Bytes/s that one group sends; 0 where there are no further groups.
      outer_latency: Seconds per step.
      torus: Whether the close ones form a grid, whose axes are reduced one after the other; else
        there is a switch between them.
    """

    name: str
    inner: int
    inner_bandwidth: float
    inner_latency: float
    outer_bandwidth: float = 0
    outer_latency: float = 0
    torus: bool = False

    def seconds(self, bytes_: float, devices: int) -> float:
        """Of one all-reduce: within every group, and between the groups, one after the other.
        ``devices`` is a power of two."""
        inner = min(devices, self.inner)
        spent = 0.0
        if inner > 1 and self.torus:
            side = 2 ** (int(math.log2(inner)) // 2)
            spent = 2 * (inner - 1) / inner * bytes_ / self.inner_bandwidth
            spent += 2 * (side + inner // side - 2) * self.inner_latency
        elif inner > 1:
            spent = switched(bytes_, inner, self.inner_bandwidth, self.inner_latency)
        groups = devices // inner
        if groups > 1:
            spent += switched(bytes_, groups, self.outer_bandwidth, self.outer_latency)
        return spent


def switched(bytes_: float, members: int, bandwidth: float, latency: float) -> float:
    """Seconds of an all-reduce through a switch, in a ring or along a tree, whichever is faster:
    rings are for large arrays, trees for small ones.

    In a ring everything but one's own share is sent twice, in twice as many steps as there are
    others; along a tree and back everything is sent twice."""
    ring = 2 * (members - 1) / members * bytes_ / bandwidth + 2 * (members - 1) * latency
    tree = 2 * bytes_ / bandwidth + 2 * math.ceil(math.log2(members)) * latency
    return min(ring, tree)


def efficiency(step: float, gradients: float, statistics: float, *, overlap: float) -> float:
    """Share of the time that a chip computes.

    Args:
      step: Seconds of computation.
      gradients: Seconds of the gradients' all-reduce.
      statistics: Seconds of the all-reduces inside norms; the computation waits for them.
      overlap: Share of the computation behind which the gradients' all-reduce can hide.
    """
    return step / (step + max(0.0, gradients - overlap * step) + statistics)
