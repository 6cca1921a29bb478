"""What is assumed of every network that is read from weights alone, and is no choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flax_resblock.config import Config
from flax_resblock.convert.detection.assumption_rules import blocks_of, has_strides, network_where


@dataclass(frozen=True)
class FixedAssumption:
    """What is assumed of every network that is read from weights alone and that ``matters`` picks.

    Attributes:
      told_by: Arguments that say it; none where it is no option of this library.
      unless: What these arguments say, where that is only one of the other cases.
    """

    says: str
    told_by: Sequence[str]
    matters: Callable[[Config], bool]
    unless: str = ""

    @property
    def note(self) -> str:
        """What was assumed, and how to change it."""
        if not self.told_by:
            return f"{self.says} ({OWN_MODULE})"
        said = " and ".join(f"`{name}=...`" for name in self.told_by)
        when = f"{said} if {self.unless}; {OWN_MODULE}" if self.unless else f"{said} if not"
        return f"{self.says} ({when})"


OWN_MODULE = "if not, convert your own module with from_torch"

FIXED = (
    FixedAssumption(
        "every stage after the first halves the resolution, with the stride of its first block",
        ("dilated_stages",),
        network_where(
            lambda config: (
                len(config.depths) > 1
                and config.transition == "strided"
                and not config.dilated_stages
            )
        ),
        unless="it is dilated instead",
    ),
    FixedAssumption(
        "every stage begins with a convolution, norm and activation, and every one but the first "
        "then with max pooling of 2x2 pixels",
        (),
        network_where(lambda config: config.transition == "pooled"),
    ),
    FixedAssumption(
        "a basic block has its stride in its first convolution",
        (),
        network_where(lambda config: config.block == "basic" and has_strides(config)),
    ),
    FixedAssumption(
        "the convolution of a shortcut has the stride of its block, and no pooling is beside it",
        (),
        lambda config: (
            config.shortcut == "projection" and any(one.projects for one in blocks_of(config))
        ),
    ),
    FixedAssumption(
        "where a block has a stride, its shortcut averages 2x2 pixels in front of the convolution",
        (),
        lambda config: config.shortcut == "pooled",
    ),
    FixedAssumption(
        "where a convolution or a max pooling has a stride, it pads alike on all sides",
        ("padding",),
        network_where(lambda config: config.padding == "symmetric"),
        unless="it pads as TensorFlow does",
    ),
    FixedAssumption(
        "each convolution pads with zeros to keep the image's size and comes before its norm; the "
        "activation follows every norm but that of a shortcut and the last of a block",
        (),
        lambda config: not config.norm_first and not config.branch_activation,
    ),
    FixedAssumption(
        "each convolution pads with zeros to keep the image's size and comes before its norm; the "
        "activation follows every norm but that of a shortcut",
        (),
        lambda config: not config.norm_first and config.branch_activation,
    ),
    FixedAssumption(
        "each convolution pads with zeros to keep the image's size and follows its norm and the "
        "activation; the stem has neither of them, and nothing follows an addition in a block",
        (),
        lambda config: config.norm_first,
    ),
    FixedAssumption(
        "each block adds its input to what it computes, both as they are; every block runs once, "
        "on what the one before it gives",
        ("shortcut",),
        lambda config: config.shortcut != "none",
        unless="nothing is added (none)",
    ),
    FixedAssumption(
        "nothing follows the head", (), network_where(lambda config: config.num_classes is not None)
    ),
    FixedAssumption("eps is 1e-5 and momentum 0.1 in every norm", ("eps",), lambda config: True),
    FixedAssumption("training drops no values", ("dropout",), lambda config: config.norm_first),
)
"""What is no choice of
:data:`flax_resblock.convert.detection.assumption_rules.ASSUMPTION_RULES`."""
