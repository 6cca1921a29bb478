"""What cannot be inferred from the weights: an activation, a stride, a pooling layer. Two networks
that differ in nothing else have the same names and shapes.

Options are taken from the first of these that has them: the caller's arguments, this library's own
metadata, a ``config.json``, other entries of the checkpoint. Otherwise the first choice of a rule
is assumed, and said, with the argument that changes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from flax_resblock.config import BlockConfig, Config, ResNetConfig, named_alike
from flax_resblock.convert.detection.assumption_rules import ASSUMPTION_RULES, AssumptionRule
from flax_resblock.convert.detection.fixed_assumptions import FIXED
from flax_resblock.convert.naming import Naming
from flax_resblock.errors import InputError

LEARNED = "learned"
"""Name of every naming scheme that :mod:`flax_resblock.convert.detection.learning` finds."""
SPELLED_DIFFERENTLY = ("shortcut_from",)
"""Fields that differ between repositories which call their networks by the same name."""
_MANY = 2
"""Alternatives that a sentence still lists with their meaning."""
KNOWN = "known"
"""Value of ``assume=`` that accepts every assumption without a warning."""


@dataclass(frozen=True)
class Assumption:
    """A choice that nobody made, and the configuration with it."""

    rule: AssumptionRule
    config: Config

    @property
    def alternatives(self) -> dict[Any, Config]:
        """The networks of the other choices, by value."""
        return self.rule.others(self.config)

    @property
    def brief(self) -> str:
        """What was assumed, and the argument that changes it, without the meaning of its values."""
        says = self.rule.choices[self.rule.chosen(self.config)]
        values = "|".join(map(repr, self.alternatives))
        return f"{says} (`{self.rule.field}={values}` if not)"

    @property
    def note(self) -> str:
        """What was assumed, and the argument that changes it, in words."""
        chosen = self.rule.chosen(self.config)
        if len(self.alternatives) > _MANY:
            return f"assumed, as the weights do not show it: {self.brief}"
        others = "; ".join(
            f"{self.rule.argument(value)} if {self.rule.choices[value]}"
            for value in self.alternatives
        )
        return f"assumed, as the weights do not show it: {self.rule.choices[chosen]}; {others}"


_ORDER = (
    "layers of equal shape run in the order of their numbers, else in that in which the file has "
    "them, and norms belong to convolutions in the same order "
    "(`naming=flax_resblock.Naming(...)` if not)"
)


@dataclass(frozen=True)
class Assumptions:
    """Everything that was assumed about a checkpoint: choices that are said whatever the network,
    as networks of both kinds are common; the others, each as a note; and the published network, or
    that of a known JAX program, that it was read as (None where it is one's own)."""

    choices: tuple[Assumption, ...] = ()
    others: tuple[str, ...] = ()
    known: str | None = None

    def of(self, fields: Collection[str]) -> Assumptions:
        """Those choices alone that are about these fields."""
        return Assumptions(tuple(one for one in self.choices if one.rule.field in fields))

    @property
    def notes(self) -> list[str]:
        """One line each; all in one for a published network."""
        if self.known is not None and self.others:
            choices = "".join(f"; {one.brief}" for one in self.choices)
            return [
                f"assumed: it computes what {self.known} does, with its activation, "
                f"strides, pooling and eps{choices}"
            ]
        notes = [assumption.note for assumption in self.choices]
        return [*notes, *(f"assumed: {one}" for one in self.others)]


def assumptions_of(
    config: Config, naming: Naming, told: Mapping[str, Any], *, by_file: bool
) -> Assumptions:
    """What had to be assumed about a network that was read so. ``told`` are the options that
    someone gave, ``by_file`` says whether a file beside the weights describes the network."""
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
    if naming.origin_tells:
        known = naming.origin
    elif known is not None:
        known = f"the published {known}"
    return Assumptions(choices, tuple(others), known)


def published(config: Config) -> str | None:
    """The name of the architecture that a configuration is, but for its classes and the channels of
    its images; None for a network of one's own and for those with a 3x3 stem, which everyone
    writes differently."""
    if not isinstance(config, ResNetConfig) or config.stem == "cifar":
        return None
    return named_alike(config)


def with_assumptions(config: Config, assumptions: Mapping[str, Any]) -> Config:
    """The configuration with these assumptions; raises InputError if that is no network."""
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
