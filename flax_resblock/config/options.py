"""The fields of a network's configuration as keyword arguments, for functions that pass them on."""

from __future__ import annotations

from typing import TypedDict

from flax_resblock.config.block import (
    Activation,
    Antialias,
    Attention,
    BlockKind,
    Shortcut,
    StridePlacement,
)
from flax_resblock.config.network import Stem


class NetworkOptions(TypedDict, total=False):
    """Every field of ``ResNetConfig`` but ``in_channels`` and ``num_classes``."""

    block: BlockKind
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Stem
    stem_width: int
    stem_hidden: tuple[int, ...]
    first_stride: int
    shortcut: Shortcut
    stride_on: StridePlacement
    attention: Attention
    attention_ratio: float
    antialias: Antialias
    activation: Activation
    groups: int
    base_width: int
    dilated_stages: tuple[int, ...]
