"""Residual networks as data: blocks, networks, slots, and the table of named architectures.

A *slot* is one place in a network that has parameters, or an activation worth comparing:
``stage1.0.conv1``, ``head``. Both frameworks, the converter and the verifier speak of slots. This
package imports no array library and no framework.
"""

from flax_resblock.config.architectures import (
    ARCHITECTURES,
    architecture,
    architectures,
    as_in_pytorch,
    name_of,
    named_alike,
    unknown_architecture,
)
from flax_resblock.config.block import BlockConfig
from flax_resblock.config.network import Config, ResNetConfig, walk
from flax_resblock.config.options import (
    EXPANSION,
    Antialias,
    Attention,
    AttentionPlace,
    BlockKind,
    BlockOptions,
    HeadPool,
    Lowering,
    NetworkOptions,
    Order,
    PaddingRule,
    Shortcut,
    ShortcutSize,
    ShortcutSource,
    Stem,
    StemPadding,
    StemPool,
    StemStride,
    StridePlacement,
    Transition,
    choices_of,
)
from flax_resblock.config.slots import Activation, Branch, Norm, Path, Slot, SlotKind
from flax_resblock.config.text import from_json, to_json

__all__ = [
    "ARCHITECTURES", "EXPANSION", "Activation", "Antialias", "Attention", "AttentionPlace",
    "BlockConfig", "BlockKind", "BlockOptions", "Branch", "Config", "HeadPool", "Lowering",
    "NetworkOptions", "Norm", "Order", "PaddingRule", "Path", "ResNetConfig", "Shortcut",
    "ShortcutSize", "ShortcutSource", "Slot", "SlotKind", "Stem", "StemPadding", "StemPool",
    "StemStride", "StridePlacement", "Transition", "architecture", "architectures", "as_in_pytorch",
    "choices_of", "from_json", "name_of", "named_alike", "to_json", "unknown_architecture", "walk",
]  # fmt: skip
