"""What cannot be inferred from the weights: an activation, a stride, a pooling layer. Two networks
that differ in nothing else have the same names and shapes.

Options are taken from the first of these that has them: the caller's arguments, this library's own
metadata, a ``config.json``, other entries of the checkpoint. Otherwise the first choice of a rule
is assumed, and said, with the flag that changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from flax_resblock.config import ARCHITECTURES, BlockConfig, Config, ResNetConfig
from flax_resblock.convert.naming import Naming
from flax_resblock.errors import InputError

LEARNED = "learned"
"""Name of every naming scheme that :mod:`flax_resblock.convert.detection.learning` finds."""
KNOWN = "known"
"""Value of ``assume=`` that accepts every assumption without a warning."""


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
    stated: Callable[[Naming], bool]

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return f"--{self.field.replace('_', '-')}"

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
        return found


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
        lambda naming: False,
    ),
    AssumptionRule(
        "stem_pool",
        {
            "3x3": "max pooling of 3x3 pixels, padded by one, follows the stem",
            "2x2": "max pooling of 2x2 pixels follows the stem",
            "none": "no pooling follows the stem",
        },
        _network(lambda config: True),
        lambda naming: False,
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
                _strided(config) and not config.dilated_stages and config.stride_on == "3x3"
            )
        ),
        lambda naming: False,
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
        lambda naming: False,
    ),
)
ASSUMABLE_FIELDS = (*(rule.field for rule in ASSUMPTION_RULES), "dilated_stages")
"""Fields of a configuration that tensors do not tell."""


@dataclass(frozen=True)
class Assumption:
    """A choice that nobody made.

    Attributes:
      rule: What was to be chosen.
      config: With the choice.
    """

    rule: AssumptionRule
    config: Config

    @property
    def alternatives(self) -> dict[Any, Config]:
        """The networks of the other choices, by value."""
        return self.rule.others(self.config)

    @property
    def brief(self) -> str:
        """What was assumed, and the flag that changes it, without the meaning of its values."""
        says = self.rule.choices[self.rule.chosen(self.config)]
        values = ", ".join(map(str, self.alternatives))
        return f"{says} ({self.rule.flag} {values} if not)"

    @property
    def note(self) -> str:
        """What was assumed, and the flag that changes it, in words."""
        chosen = self.rule.chosen(self.config)
        others = "; ".join(
            f"{self.rule.flag} {value} if {self.rule.choices[value]}" for value in self.alternatives
        )
        return f"assumed, as the weights do not show it: {self.rule.choices[chosen]}; {others}"


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
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in self.told_by)
        when = f"{flags} if {self.unless}; {OWN_MODULE}" if self.unless else f"{flags} if not"
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
        "a shortcut without weights skips pixels and pads with zeros, half of them in front of the "
        "old channels and half behind",
        (),
        lambda config: config.shortcut == "zero_pad",
    ),
    Fixed(
        "the 1x1 convolution of a shortcut has the stride of its block, and no pooling is beside "
        "it",
        (),
        lambda config: config.shortcut == "projection",
    ),
    Fixed(
        "where a block has a stride, its shortcut averages 2x2 pixels in front of the convolution",
        (),
        lambda config: config.shortcut == "pooled",
    ),
    Fixed(
        "each convolution pads with zeros to keep the image's size and comes before its norm; the "
        "activation follows every norm but that of a shortcut and the last of a block",
        (),
        lambda config: True,
    ),
    Fixed(
        "each block adds its input to what it computes, both as they are, with its activation "
        "after the addition, and every block runs once, on what the one before it gives",
        (),
        lambda config: True,
    ),
    Fixed(
        "the head takes the mean over all pixels, and nothing follows it",
        (),
        _network(lambda config: config.num_classes is not None),
    ),
    Fixed("eps is 1e-5 and momentum 0.1 in every norm", ("eps",), lambda config: True),
)
"""What is no choice of :data:`ASSUMPTION_RULES`."""

_ORDER = (
    "layers of equal shape run in the order of their numbers, else in that in which the file has "
    "them, and norms belong to convolutions in the same order (--naming FILE.toml if not)"
)


@dataclass(frozen=True)
class Assumptions:
    """Everything that was assumed about a checkpoint.

    Attributes:
      choices: Those that are said whatever the network, as networks of both kinds are common.
      others: The others, each as a note.
      known: Name of the published network that it was read as; None where it is one's own.
    """

    choices: tuple[Assumption, ...] = ()
    others: tuple[str, ...] = ()
    known: str | None = None

    @property
    def notes(self) -> list[str]:
        """One line each; all of :attr:`others` in one for a published network."""
        notes = [assumption.note for assumption in self.choices]
        if self.known is not None and self.others:
            return [
                *notes,
                f"assumed: it computes what the published {self.known} does, with its activation, "
                f"strides, pooling and eps",
            ]
        return [*notes, *(f"assumed: {one}" for one in self.others)]


def assumptions_of(
    config: Config, naming: Naming, told: Mapping[str, Any], *, by_file: bool
) -> Assumptions:
    """What had to be assumed about a network.

    Args:
      config: As it was read.
      naming: Its naming scheme.
      told: Options that someone gave, by name.
      by_file: Whether a file beside the weights describes the network.
    """
    rules = [
        Assumption(rule, config)
        for rule in ASSUMPTION_RULES
        if rule.field not in told and rule.matters(config)
    ]
    choices = tuple(one for one in rules if one.rule.stated(naming))
    if by_file:
        return Assumptions(choices)
    labels = [_ORDER] if naming.name == LEARNED else []
    others = [
        *labels,
        *(one.brief for one in rules if one not in choices),
        *(f.note for f in FIXED if f.matters(config) and not set(f.told_by) & told.keys()),
    ]
    known = None if labels else published(config)
    return Assumptions(choices, tuple(others), known)


def published(config: Config) -> str | None:
    """The name of the architecture that a configuration is, but for its classes and the channels of
    its images; None for a network of one's own and for those with a 3x3 stem, which everyone
    writes differently."""
    if not isinstance(config, ResNetConfig) or config.stem == "cifar":
        return None
    same = {"num_classes": config.num_classes, "in_channels": config.in_channels}
    return next(
        (name for name, one in ARCHITECTURES.items() if replace(one, **same) == config), None
    )


def with_assumptions(config: Config, assumptions: Mapping[str, Any]) -> Config:
    """The configuration with the assumptions that it has a field for.

    Raises:
      InputError: Values that make no network.
    """
    names = {field.name for field in fields(config)}
    if isinstance(config, BlockConfig) and config.kind == "basic":
        names.discard("stride_on")
    changes = {name: value for name, value in assumptions.items() if name in names}
    try:
        return replace(config, **changes) if changes else config
    except ValueError as error:
        said = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        raise InputError(f"{said} does not suit this network: {error}") from error


_MARKS: tuple[tuple[tuple[str, ...], tuple[str, ...], Mapping[str, Any]], ...] = tuple(
    (("meta", entry), (f"style='{s}'", f'style="{s}"', f'"style": "{s}"'), {"stride_on": placed})
    for s, placed in (("caffe", "1x1"), ("pytorch", "3x3"))
    for entry in ("config", "cfg")
)
"""Entry of a checkpoint (as text, by OpenMMLab), what stands in it, and what that says."""


def told_by_entries(extras: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """What entries beside the weights say, and a note on each."""
    told: dict[str, Any] = {}
    notes = []
    for path, marks, says in _MARKS:
        value: Any = extras
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        mark = next((mark for mark in marks if isinstance(value, str) and mark in value), None)
        if mark is not None and not says.keys() & told.keys():
            told |= says
            notes.append(
                f"its entry {'.'.join(path)} has {mark}: "
                f"{', '.join(f'{name} {value}' for name, value in says.items())}"
            )
    return told, notes
