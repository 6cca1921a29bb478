"""Options that cannot be inferred from the weights, such as where a stride sits or whether it is
blurred: two networks that differ in nothing else have the same names and shapes.

They are taken from the first of these that has them: the caller's arguments, this library's own
metadata, a ``config.json``, other entries of the checkpoint. Otherwise the first choice of a rule
is assumed and, if the rule says so, reported with the flag that changes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from flax_resblock.config import BlockConfig, Config, ResNetConfig
from flax_resblock.convert.naming import Naming
from flax_resblock.errors import InputError


@dataclass(frozen=True)
class AssumptionRule:
    """One option that cannot be inferred from the weights.

    Attributes:
      field: Of :class:`~flax_resblock.ResNetConfig`.
      choices: Values in words; the first is assumed unless something says otherwise.
      matters: Whether the choices make different networks of this configuration.
      stated: Whether both kinds are so common in this naming scheme that the assumption is
        reported.
    """

    field: str
    choices: Mapping[Any, str]
    matters: Callable[[ResNetConfig], bool]
    stated: Callable[[Naming], bool]

    @property
    def flag(self) -> str:
        """The flag of the command line."""
        return f"--{self.field.replace('_', '-')}"


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
        lambda config: config.block == "bottleneck" and _strided(config),
        lambda naming: True,
    ),
    AssumptionRule(
        "first_stride",
        {1: "the first stage keeps the resolution", 2: "it halves it"},
        _projects_at_once,
        lambda naming: naming.hub == "transformers",
    ),
    AssumptionRule(
        "antialias",
        {"none": "strides are not blurred", "blur": "they are blurred (timm's resnetblur)"},
        lambda config: _strided(config) and not config.dilated_stages and config.stride_on == "3x3",
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
    config: ResNetConfig

    @property
    def alternatives(self) -> dict[Any, ResNetConfig]:
        """The networks of the other choices, by value."""
        chosen = getattr(self.config, self.rule.field)
        return {
            value: replace(self.config, **{self.rule.field: value})
            for value in self.rule.choices
            if value != chosen
        }

    @property
    def note(self) -> str:
        """What was assumed, and the flag that changes it."""
        chosen = getattr(self.config, self.rule.field)
        others = "; ".join(
            f"{self.rule.flag} {value} if {self.rule.choices[value]}" for value in self.alternatives
        )
        return f"assumed, as the weights do not show it: {self.rule.choices[chosen]}; {others}"


def open_assumptions(config: Config, naming: Naming, told: Mapping[str, Any]) -> list[Assumption]:
    """Choices that had to be made for a network and that must be said.

    Args:
      config: As it was read.
      naming: Its naming scheme.
      told: Fields that someone gave.
    """
    if not isinstance(config, ResNetConfig):
        return []
    return [
        Assumption(rule, config)
        for rule in ASSUMPTION_RULES
        if rule.field not in told and rule.stated(naming) and rule.matters(config)
    ]


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
