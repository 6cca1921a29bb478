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
)
from flax_resblock.config.block import (
    EXPANSION,
    Antialias,
    Attention,
    BlockConfig,
    BlockKind,
    BlockOptions,
    Lowering,
    PaddingRule,
    Shortcut,
    StridePlacement,
    choices_of,
)
from flax_resblock.config.network import (
    Config,
    NetworkOptions,
    ResNetConfig,
    Stem,
    StemPadding,
    StemPool,
    StemStride,
    from_json,
    to_json,
    walk,
)
from flax_resblock.config.slots import Activation, Branch, Path, Slot, SlotKind

__all__ = [
    "ARCHITECTURES", "EXPANSION", "Activation", "Antialias", "Attention", "BlockConfig",
    "BlockKind", "BlockOptions", "Branch", "Config", "Lowering", "NetworkOptions",
    "PaddingRule", "Path",
    "ResNetConfig", "Shortcut", "Slot", "SlotKind", "Stem", "StemPadding",
    "StemPool", "StemStride",
    "StridePlacement", "architecture", "architectures", "as_in_pytorch", "choices_of",
    "from_json", "name_of", "to_json", "walk",
]  # fmt: skip
