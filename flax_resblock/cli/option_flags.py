"""Flags for what cannot be inferred from the weights of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

YesOrNo = Annotated[bool | None, tyro.conf.FlagConversionOff]
"""An option with a value, ``True`` or ``False``."""


@dataclass(frozen=True)
class OptionFlags:
    """Options of a network; each says what was assumed otherwise."""

    stride_on: Literal["3x3", "1x1"] | None = None
    """Convolution of a bottleneck that has the stride: 3x3 as in torchvision, 1x1 as in Caffe."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of the stem's first convolution: by default 1 of a 3x3 stem and 2 of the others."""
    stem_pool: Literal["3x3", "3x3_zeros", "2x2", "none"] | None = None
    """Max pooling after the stem: by default none of a 3x3 stem and 3x3 of the others; 3x3_zeros
    pads with zeros, as BiT does."""
    first_stride: Literal[1, 2] | None = None
    """Stride of the first stage. Can be inferred from the weights of basic blocks only."""
    antialias: Literal["none", "blur"] | None = None
    """Whether strided convolutions are blurred, as in timm's resnetblur."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu"] | None = None
    """Activation of the stem and the blocks, relu by default."""
    dilated_stages: tuple[int, ...] | None = None
    """Stages (from 1) whose stride is replaced by dilation."""
    eps: float | None = None
    """eps of every norm, 1e-5 by default."""
    order: Literal["post_activation", "pre_activation"] | None = None
    """Whether norms come before or after their convolutions. Can be inferred from the weights
    unless no block changes the number of channels."""
    shortcut_from: Literal["activated", "input"] | None = None
    """What a projection takes in pre-activation order: what its block's first norm and activation
    give, or the block's input."""
    shortcut: Literal["zero_pad", "zero_pad_behind", "none"] | None = None
    """Where shortcuts without weights put new channels, or that no block adds its input."""
    attention_place: Literal["branch", "sum", "output"] | None = None
    """What squeeze-and-excitation and other attention weighs: the main path before the addition,
    the sum, or the block's output after its activation."""
    last_activation: YesOrNo = None
    """Whether a block ends with its activation."""
    branch_activation: YesOrNo = None
    """Whether the main path of a block ends with an activation before the addition."""
    head_pool: Literal["mean", "max"] | None = None
    """How the head pools over all pixels."""
    norm: Literal["batch", "frozen"] | None = None
    """frozen: training leaves every norm as it is."""
    norm_groups: int | None = None
    """Groups of each group norm."""
    standardized: YesOrNo = None
    """Whether kernels are standardised before they are used."""
    standardized_eps: float | None = None
    """Added to the variance of standardised kernels, 1e-8 by default."""
    dropout: float | None = None
    """Probability of dropping a value in front of a block's second convolution in training."""
    padding: Literal["symmetric", "same"] | None = None
    """Padding of convolutions and pooling with a stride: symmetric as in PyTorch, same as in
    TensorFlow and Flax. Known JAX programs have theirs."""
    stem_padding: Literal["symmetric", "same"] | None = None
    """Padding of the stem's first convolution, if it is another than the rest of the network has.
    """
