"""The options that cannot be inferred from the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def blocks_of(config: Config) -> list[BlockConfig]:
    """All blocks of a network, or the bare block."""
    if isinstance(config, ResNetConfig):
        return [block for _, _, block in config.blocks()]
    return [config]


def hides_its_order(config: ResNetConfig) -> bool:
    """Whether no main path and no projection tells if norms come before their convolutions."""
    blocks = blocks_of(config)
    same = all(block.in_channels == block.out_channels for block in blocks)
    # a norm behind a projection, and one in front of a pooling, are of post-activation order
    normed = not config.norm_first and any(block.projects for block in blocks)
    return config.block == "basic" and same and not normed and config.transition == "strided"


def network_where(matters: Callable[[ResNetConfig], bool]) -> Callable[[Config], bool]:
    """A condition that no bare block meets: the caller says its stride anyway."""
    return lambda config: isinstance(config, ResNetConfig) and matters(config)


def has_strides(config: ResNetConfig) -> bool:
    """Whether a block has a stride."""
    return any(block.stride > 1 for _, _, block in config.blocks())


def _projects_at_once(config: ResNetConfig) -> bool:
    """Whether the first block has a projection whatever its stride, or pooling may have it."""
    return (
        config.transition == "pooled" or config.stem_width != next(config.blocks())[2].out_channels
    )


ASSUMPTION_RULES = (
    AssumptionRule(
        "stride_on",
        {
            "3x3": "the stride of a bottleneck is on its 3x3 convolution (torchvision)",
            "1x1": "it is on its first 1x1 convolution (Caffe, He et al. 2016)",
        },
        network_where(lambda config: config.block == "bottleneck" and has_strides(config)),
        lambda naming: True,
    ),
    AssumptionRule(
        "stem_stride",
        {
            2: "the first convolution of the stem halves the resolution",
            1: "the first convolution of the stem keeps the resolution",
        },
        network_where(lambda config: True),
    ),
    AssumptionRule(
        "stem_pool",
        {
            "3x3": "max pooling of 3x3 pixels, padded by one, follows the stem",
            "3x3_zeros": "the same pooling sees a border of zeros (BiT)",
            "2x2": "max pooling of 2x2 pixels follows the stem",
            "none": "no pooling follows the stem",
        },
        network_where(lambda config: True),
    ),
    AssumptionRule(
        "first_stride",
        {1: "the first stage keeps the resolution", 2: "the first stage halves the resolution"},
        network_where(_projects_at_once),
        lambda naming: naming.hub == "transformers",
    ),
    AssumptionRule(
        "antialias",
        {"none": "strides are not blurred", "blur": "they are blurred (timm's resnetblur)"},
        network_where(
            lambda config: (
                has_strides(config)
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
        network_where(hides_its_order),
    ),
    AssumptionRule(
        "shortcut_from",
        {
            "activated": "a projection takes what its block's first norm and activation give",
            "input": "a projection takes its block's input as it is",
        },
        lambda config: any(block.norm_first and block.changes_shape for block in blocks_of(config)),
        lambda naming: True,
    ),
    AssumptionRule(
        "last_activation",
        {True: "a block ends with its activation", False: "nothing follows the addition"},
        lambda config: not config.norm_first,
    ),
    AssumptionRule(
        "branch_activation",
        {
            False: "no activation is between the last norm of a block and the addition",
            True: "an activation is between the last norm of a block and the addition",
        },
        lambda config: not config.norm_first and config.shortcut != "none",
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
        {"mean": "the head takes the mean over all pixels", "max": "the head takes the maximum"},
        network_where(lambda config: config.num_classes is not None),
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
