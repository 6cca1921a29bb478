"""Slots: the places of a network, with everything that decides what is computed there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType
from typing import Any, Literal

Activation = Literal["relu", "leaky_relu", "gelu", "silu"]
Norm = Literal["batch", "group", "frozen"]
Path = tuple[str | int, ...]


class SlotKind(Enum):
    """What a slot holds. It decides which tensors belong to the slot."""

    CONV = "conv"
    BIASED_CONV = "biased_conv"
    CHANNEL_CONV = "channel_conv"
    NORM = "norm"
    FROZEN_NORM = "frozen_norm"
    GROUP_NORM = "group_norm"
    LINEAR = "linear"
    MAX_POOL = "max_pool"
    AVERAGE_POOL = "average_pool"
    BLUR = "blur"
    OUTPUT = "output"
    """The result of a part that has slots of its own: of a block, of its attention."""


NORMS: Mapping[Norm, SlotKind] = MappingProxyType(
    {"batch": SlotKind.NORM, "frozen": SlotKind.FROZEN_NORM, "group": SlotKind.GROUP_NORM}
)


class Branch(Enum):
    """The part of a network that a slot belongs to."""

    STEM = "stem"
    MAIN = "main path"
    ATTENTION = "attention"
    """Weighs channels: of the main path after its last norm, or behind the addition."""
    SHORTCUT = "shortcut"
    HEAD = "head"


@dataclass(frozen=True)
class Slot:
    """One place of a network, with everything that decides what is computed there.

    Attributes:
      stage: ``"stem"``, ``"stage1"`` ..., ``"head"``, or ``""`` in a bare block.
      block: Index of the block within its stage; None outside the stages.
      role: Dotted place within the block or stem, ``"conv1"``, ``"shortcut.norm"``; ``""`` is the
        whole.
      kind: What it holds.
      shape: Shape of its kernel ``(kh, kw, I // groups, O)``, ``(k, I, O)`` over channels or ``(in,
        out)``; ``(C,)`` of a norm; the window ``(h, w)`` of a pool or blur; ``()`` of an output.
      stride, padding, dilation: In pixels, equal in both directions; padding is on each side, or
        ``"SAME"``, which depends on the size of the image.
      groups: Channel groups of a convolution or group norm.
      branch: The part of the network that it belongs to.
      activation: Applied to what a norm gives, or the last step of a block; may be None.
      standardized: Added to the variance by which a kernel is standardised; None: it is used as it
        is.
      takes: What a slot is given where the order of the slots does not say it: the option of a
        shortcut, attention or head.
    """

    stage: str
    block: int | None
    role: str
    kind: SlotKind
    shape: tuple[int, ...] = ()
    stride: int = field(default=1, kw_only=True)
    padding: int | Literal["SAME"] = field(default=0, kw_only=True)
    dilation: int = field(default=1, kw_only=True)
    groups: int = field(default=1, kw_only=True)
    branch: Branch = field(default=Branch.MAIN, kw_only=True)
    activation: Activation | None = field(default=None, kw_only=True)
    standardized: float | None = field(default=None, kw_only=True)
    takes: str = field(default="", kw_only=True)

    @property
    def path(self) -> Path:
        """Attribute path in the Flax module: ``("stage1", 0, "shortcut", "conv")``."""
        place: Path = (self.stage,) if self.stage else ()
        if self.block is not None:
            place += (self.block,)
        return place + tuple(self.role.split(".")) if self.role else place

    @property
    def name(self) -> str:
        """Dotted path, ``"stage1.0.shortcut.conv"``; a bare block as a whole is ``"block"``."""
        return ".".join(map(str, self.path)) or "block"

    @property
    def is_block(self) -> bool:
        """Whether it is the output of a whole block."""
        return self.kind is SlotKind.OUTPUT and not self.role

    @property
    def convolves(self) -> bool:
        """Whether it is a 2-d convolution."""
        return self.kind in (SlotKind.CONV, SlotKind.BIASED_CONV)

    @property
    def normalises(self) -> bool:
        """Whether it is a norm of any kind."""
        return self.kind in NORMS.values()

    @property
    def multiplies(self) -> bool:
        """Whether it is a 2-d convolution or a matrix product."""
        return self.convolves or self.kind is SlotKind.LINEAR

    @property
    def parameters(self) -> int:
        """Number of trainable values."""
        if self.kind in (SlotKind.NORM, SlotKind.GROUP_NORM):
            return 2 * self.shape[0]
        if self.multiplies or self.kind is SlotKind.CHANNEL_CONV:
            biased = self.kind in (SlotKind.BIASED_CONV, SlotKind.LINEAR)
            return math.prod(self.shape) + (self.shape[-1] if biased else 0)
        return 0


def padded(size: int, stride: int, rule: str, symmetric: int) -> int | Literal["SAME"]:
    """The padding of a window of ``size`` pixels: ``"SAME"`` where that differs from
    ``symmetric`` pixels on each side for some image."""
    return "SAME" if rule == "same" and min(size, stride) > 1 else symmetric


def norm_slot(
    stage: str,
    block: int | None,
    role: str,
    channels: int,
    *,
    norm: Norm,
    norm_groups: int,
    activation: Activation | None,
    branch: Branch = Branch.MAIN,
) -> Slot:
    """A norm; arguments as for :func:`normalised_conv`."""
    groups = norm_groups if norm == "group" else 1
    kind, ending = NORMS[norm], {"branch": branch, "activation": activation}
    return Slot(stage, block, role, kind, (channels,), groups=groups, **ending)


def normalised_conv(
    stage: str,
    block: int | None,
    names: tuple[str, str | None],
    size: int,
    channels: tuple[int, int],
    *,
    dilation: int = 1,
    groups: int = 1,
    bias: bool = False,
    padding_rule: str = "symmetric",
    activation: Activation | None = None,
    norm: Norm,
    norm_groups: int,
    norm_first: bool = False,
    **numbers: Any,
) -> Iterator[Slot]:
    """A convolution of ``size`` by ``size`` pixels that keeps the resolution at stride 1, and the
    norm that follows it or, with ``norm_first``, precedes it.

    Args:
      names: Roles of the two; the second may be None, of a convolution without norm.
      channels: Of input and output.
      padding_rule: See :class:`~flax_resblock.config.options.BlockOptions`.
      dilation, groups, activation, **numbers: See :class:`Slot`.
    """
    conv, its = names
    shape = (size, size, channels[0] // groups, channels[1])
    padding = padded(size, numbers.get("stride", 1), padding_rule, dilation * (size // 2))
    geometry = {"padding": padding, "dilation": dilation, "groups": groups}
    kind = SlotKind.BIASED_CONV if bias else SlotKind.CONV
    both = [Slot(stage, block, conv, kind, shape, **geometry, **numbers)]
    if its is not None:
        told: dict[str, Any] = {"norm": norm, "norm_groups": norm_groups, "activation": activation}
        told["branch"] = numbers.get("branch", Branch.MAIN)
        its_channels = channels[0] if norm_first else channels[1]
        both.append(norm_slot(stage, block, its, its_channels, **told))
    yield from reversed(both) if norm_first else both


def pooled_conv(
    stage: str, inputs: int, outputs: int, stride: int, *, padding_rule: str, **numbers: Any
) -> Iterator[Slot]:
    """A 3x3 convolution and its norm, and max pooling with a window of ``stride`` pixels that has
    the stride where there is one; the others as for :func:`normalised_conv`."""
    ends = ("conv", "norm"), 3, (inputs, outputs)
    yield from normalised_conv(stage, None, *ends, padding_rule=padding_rule, **numbers)
    if stride > 1:
        sides, window = padded(stride, stride, padding_rule, 0), (stride, stride)
        yield Slot(stage, None, "pool", SlotKind.MAX_POOL, window, stride=stride, padding=sides)
