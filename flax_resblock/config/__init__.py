"""Residual networks as data: blocks, networks, slots, and the table of named architectures.

A *slot* is one place in a network that has parameters, or an activation worth comparing:
``stage1.0.conv1``, ``head``. Both frameworks, the converter and the verifier speak of slots. This
package imports no array library and no framework.
"""

from flax_resblock.config.architectures import (
    ARCHITECTURES,
    architecture,
    architectures,
    name_of,
    named_alike,
    unknown_architecture,
)
from flax_resblock.config.block import BlockConfig
from flax_resblock.config.network import Config, ResNetConfig, walk
from flax_resblock.config.options import (
    EXPANSION,
    BlockOptions,
    Lowering,
    NetworkOptions,
    Shortcut,
    StridePlacement,
    choices_of,
)
from flax_resblock.config.slots import Activation, Branch, Path, Slot, SlotKind
from flax_resblock.config.text import from_json, to_json

__all__ = [
    "ARCHITECTURES", "EXPANSION", "Activation", "BlockConfig", "BlockOptions", "Branch", "Config",
    "Lowering", "NetworkOptions", "Path", "ResNetConfig", "Shortcut", "Slot", "SlotKind",
    "StridePlacement", "architecture", "architectures", "choices_of", "from_json", "name_of",
    "named_alike", "to_json", "unknown_architecture", "walk",
]  # fmt: skip
