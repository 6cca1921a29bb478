"""The options that cannot be inferred from the weights, and what is assumed of every network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from flax_resblock.config import BlockConfig, Config, ResNetConfig
from flax_resblock.convert.naming import Naming


@dataclass(frozen=True)
class AssumptionRule:
    """One option that cannot be inferred from the weights.

    Attributes:
      field: Of :class:`~flax_resblock.ResNetConfig`.
      choices: Values in words; the first is assumed unless something says otherwise.
      matters: Whether the choices make different networks of this configuration.
      stated: Whether both kinds are so common in this naming scheme that the assumption is
        reported even for a published network.
    """

    field: str
    choices: Mapping[Any, str]
    matters: Callable[[Config], bool]
    stated: Callable[[Naming], bool] = lambda naming: False

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return f"--{self.field.replace('_', '-')}"

    def argument(self, value: Any) -> str:
        """The choice of a value, as messages name it."""
        return f"`{self.field}={value!r}`"

    def chosen(self, config: Config) -> Any:
        """The value that a configuration has, also where it is the usual one of its stem."""
        usual = {"stem_stride": "stem_striding", "stem_pool": "stem_pooling"}
        return getattr(config, usual.get(self.field, self.field))

    def others(self, config: Config) -> dict[Any, Config]:
        """The networks of the other choices, by value."""
        found: dict[Any, Config] = {}
        for value in self.choices:
            if value != self.chosen(config):
                with suppress(ValueError):  # such a network does not exist
                    found[value] = replace(config, **{self.field: value})
        return {value: other for value, other in found.items() if other != config}


GROUPS = (32, 16, 8, 4, 2, 1)
"""Usual numbers of groups of group norms, the first of which is assumed where it is possible."""


def _blocks(config: Config) -> list[BlockConfig]:
    if isinstance(config, ResNetConfig):
        return [block for _, _, block in config.blocks()]
    return [config]


def hides_its_order(config: ResNetConfig) -> bool:
    """Whether no main path and no projection tells if norms come before their convolutions."""
    blocks = _blocks(config)
    same = all(block.in_channels == block.out_channels for block in blocks)
    # a norm behind a projection is one of post-activation order
    normed = not config.norm_first and any(block.projects for block in blocks)
    return config.block == "basic" and same and not normed


def _network(matters: Callable[[ResNetConfig], bool]) -> Callable[[Config], bool]:
    """A condition that no bare block meets: the caller says its stride anyway."""
    return lambda config: isinstance(config, ResNetConfig) and matters(config)


def _strided(config: ResNetConfig) -> bool:
    return any(block.stride > 1 for _, _, block in config.blocks())


def _projects_at_once(config: ResNetConfig) -> bool:
    """Whether the first block has a projection whatever its stride."""
    return config.stem_width != next(config.blocks())[2].out_channels


ASSUMPTION_RULES = (
    AssumptionRule(
        "stride_on",
        {
            "3x3": "the stride of a bottleneck is on its 3x3 convolution (torchvision)",
            "1x1": "it is on its first 1x1 convolution (Caffe, He et al. 2016)",
        },
        _network(lambda config: config.block == "bottleneck" and _strided(config)),
        lambda naming: True,
    ),
    AssumptionRule(
        "stem_stride",
        {
            2: "the first convolution of the stem halves the resolution",
            1: "the first convolution of the stem keeps the resolution",
        },
        _network(lambda config: True),
    ),
    AssumptionRule(
        "stem_pool",
        {
            "3x3": "max pooling of 3x3 pixels, padded by one, follows the stem",
            "3x3_zeros": "the same pooling sees a border of zeros (BiT)",
            "2x2": "max pooling of 2x2 pixels follows the stem",
            "none": "no pooling follows the stem",
        },
        _network(lambda config: True),
    ),
    AssumptionRule(
        "first_stride",
        {1: "the first stage keeps the resolution", 2: "it halves it"},
        _network(_projects_at_once),
        lambda naming: naming.hub == "transformers",
    ),
    AssumptionRule(
        "antialias",
        {"none": "strides are not blurred", "blur": "they are blurred (timm's resnetblur)"},
        _network(
            lambda config: (
                _strided(config)
                and not config.dilated_stages
                and (config.stride_on, config.padding) == ("3x3", "symmetric")
                and not config.norm_first
            )
        ),
    ),
    AssumptionRule(
        "activation",
        {
            "relu": "the activation is ReLU",
            "leaky_relu": "it is LeakyReLU with slope 0.01",
            "gelu": "it is the exact GELU",
            "silu": "it is SiLU (swish)",
        },
        lambda config: True,
    ),
    AssumptionRule(
        "order",
        {
            "post_activation": "each convolution comes before its norm",
            "pre_activation": "each norm and activation come before their convolution",
        },
        _network(hides_its_order),
    ),
    AssumptionRule(
        "shortcut_from",
        {
            "activated": "a projection takes what its block's first norm and activation give",
            "input": "a projection takes its block's input as it is",
        },
        lambda config: any(block.norm_first and block.changes_shape for block in _blocks(config)),
        lambda naming: True,
    ),
    AssumptionRule(
        "last_activation",
        {True: "a block ends with its activation", False: "nothing follows the addition"},
        lambda config: not config.norm_first,
    ),
    AssumptionRule(
        "shortcut",
        {
            "zero_pad": "a shortcut without weights skips pixels and pads with zeros, half of them "
            "in front of the old channels and half behind",
            "zero_pad_behind": "all of them are behind",
            "none": "no block adds its input",
        },
        lambda config: config.shortcut in ("zero_pad", "zero_pad_behind", "none"),
    ),
    AssumptionRule(
        "attention_place",
        {
            "branch": "attention weighs the channels of the main path, before the addition",
            "sum": "it weighs the sum, before the activation",
            "output": "it weighs the block's output, after the activation (SE-POST)",
        },
        lambda config: config.attention != "none" and config.shortcut != "none",
    ),
    AssumptionRule(
        "head_pool",
        {"mean": "the head takes the mean over all pixels", "max": "it takes the maximum"},
        _network(lambda config: config.num_classes is not None),
    ),
    AssumptionRule(
        "norm_groups",
        {n: f"each norm is a group norm of {n} group{'s' if n > 1 else ''}" for n in GROUPS},
        lambda config: config.norm == "group",
        lambda naming: True,
    ),
    AssumptionRule(
        "standardized",
        {
            False: "kernels are used as they are",
            True: "kernels are standardised (BiT, weight standardisation), with an eps of "
            "`standardized_eps=1e-8`",
        },
        lambda config: config.norm == "group",
        lambda naming: True,
    ),
)
ASSUMABLE_FIELDS = (*(rule.field for rule in ASSUMPTION_RULES), "dilated_stages", "norm")
ASSUMABLE_FIELDS += ("standardized_eps", "dropout", "padding", "stem_padding")
"""Fields of a configuration that tensors do not tell."""


@dataclass(frozen=True)
class Fixed:
    """What is assumed of every network that is read from weights alone.

    Attributes:
      says: What is assumed.
      told_by: Arguments that say it; none where it is no option of this library.
      matters: Whether a network has it.
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
    Fixed(
        "every stage after the first halves the resolution, with the stride of its first block",
        ("dilated_stages",),
        _network(lambda config: len(config.depths) > 1 and not config.dilated_stages),
        unless="it is dilated instead",
    ),
    Fixed(
        "a basic block has its stride in its first convolution",
        (),
        _network(lambda config: config.block == "basic" and _strided(config)),
    ),
    Fixed(
        "the convolution of a shortcut has the stride of its block, and no pooling is beside it",
        (),
        lambda config: config.shortcut == "projection",
    ),
    Fixed(
        "where a block has a stride, its shortcut averages 2x2 pixels in front of the convolution",
        (),
        lambda config: config.shortcut == "pooled",
    ),
    Fixed(
        "where a convolution or a max pooling has a stride, it pads alike on all sides",
        ("padding",),
        _network(lambda config: config.padding == "symmetric"),
        unless="it pads as TensorFlow does",
    ),
    Fixed(
        "each convolution pads with zeros to keep the image's size and comes before its norm; the "
        "activation follows every norm but that of a shortcut and the last of a block",
        (),
        lambda config: not config.norm_first,
    ),
    Fixed(
        "each convolution pads with zeros to keep the image's size and follows its norm and the "
        "activation; the stem has neither of them, and nothing follows an addition in a block",
        (),
        lambda config: config.norm_first,
    ),
    Fixed(
        "each block adds its input to what it computes, both as they are, and any activation comes "
        "after the addition; every block runs once, on what the one before it gives",
        ("shortcut",),
        lambda config: config.shortcut != "none",
        unless="nothing is added (none)",
    ),
    Fixed(
        "nothing follows the head",
        (),
        _network(lambda config: config.num_classes is not None),
    ),
    Fixed("eps is 1e-5 and momentum 0.1 in every norm", ("eps",), lambda config: True),
    Fixed("training drops no values", ("dropout",), lambda config: config.norm_first),
)
"""What is no choice of :data:`ASSUMPTION_RULES`."""
