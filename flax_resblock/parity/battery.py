"""Small networks and blocks that together use everything this library has: what a new device, or a
new version of a framework, is tried on.

They are generated from the literals of the configurations, so that a new option cannot be
forgotten; only what has numbers instead of choices is listed."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Set
from dataclasses import MISSING, fields
from functools import cache
from types import MappingProxyType
from typing import Any

from flax_resblock.config import BlockConfig, Config, ResNetConfig, Slot, choices_of, walk

OptionValue = tuple[str, Any]
"""A field of a configuration and one of its values."""

_BLOCK: dict[str, Any] = {"in_channels": 8, "out_channels": 16, "stride": 2}
_NETWORK: dict[str, Any] = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8, "num_classes": 10}
_DILATED: dict[str, Any] = {"depths": (1, 2, 2), "widths": (8, 16, 16), "stem_width": 16}
_DILATED["num_classes"] = None
_WITH: dict[OptionValue, dict[str, Any]] = {
    ("stem", "deep"): {"stem_hidden": (4, 6)},
    ("norm", "group"): {"norm_groups": 2},
    ("attention_bias", False): {"attention": "se"},
    ("attention_place", "sum"): {"attention": "se"},
    ("attention_place", "output"): {"attention": "se"},
}
"""What a value of an option needs."""


@cache
def _slots(config: Config) -> tuple[Slot, ...]:
    return tuple(walk(config))


@cache
def _made(kind: type[Config], options: Set[OptionValue]) -> Config | None:
    """The configuration; None where the options make none."""
    extra = [more for pair, more in _WITH.items() if pair in options]
    try:
        return kind(**ChainMap(*extra, dict(options)))
    except ValueError:
        return None


def used(config: Config, among: Set[OptionValue] | None = None) -> set[OptionValue]:
    """The values of options, of all or of those ``among`` which it is asked, that decide about one
    of the slots of a configuration: with another value of the same option, the slots are others."""
    kind, own = type(config), {one.name: getattr(config, one.name) for one in fields(config)}
    for name in ("stem_hidden", "norm_groups"):
        own.pop(name, None)
    return {
        (name, own[name])
        for name, values in choices_of(kind).items()
        if (among is None or (name, own[name]) in among)
        and any(
            other is not None and _slots(other) != _slots(config)
            for value in values
            for other in [_made(kind, frozenset({**own, name: value}.items()))]
        )
    }


def covering(kind: type[Config], numbers: Mapping[str, Any]) -> list[Config]:
    """Few configurations in which every value of every option is used, the plainest first: each
    begins with the defaults and takes every value, if need be with a value of another option, that
    adds one which none before it uses."""
    values = [{name: value} for name, known in choices_of(kind).items() for value in known]
    missing = {pair for value in values for pair in value.items()}
    chosen: list[Config] = []
    while missing:
        options, config = dict(numbers), _made(kind, frozenset(numbers.items()))
        best = used(config, missing) if config else set[OptionValue]()
        for pair in sorted(missing, key=str):
            for other in ({}, *values):
                tried = {**options, **other, **dict([pair])}
                made = _made(kind, frozenset(tried.items()))
                found = used(made, missing) if made else set[OptionValue]()
                if len(found) > len(best):
                    options, config, best = tried, made, found
                if pair in found:
                    break
        if config is None or not best:
            break
        chosen.append(config)
        missing -= best
    return chosen


def _title(config: Config) -> str:
    """``"bottleneck block with pooled shortcut, se attention"``: what differs from the defaults."""
    kind, what = ("kind", "block") if isinstance(config, BlockConfig) else ("block", "network")
    defaults = {one.name: one.default for one in fields(config) if one.default is not MISSING}
    changed = [
        name if getattr(config, name) is True else f"{name} {getattr(config, name)}"
        for name in choices_of(type(config))
        if name != kind and getattr(config, name) != defaults[name]
    ]
    return f"{getattr(config, kind)} {what}" + (f", {', '.join(changed)}" if changed else "")


_NUMBERS: dict[str, Config] = {
    "basic block": BlockConfig(in_channels=16, out_channels=16),
    "basic block, stride 2": BlockConfig(**_BLOCK),
    "basic block, dilated and grouped": BlockConfig(**_BLOCK, dilation=2, groups=2),
    "ResNeXt": ResNetConfig(**_NETWORK, block="bottleneck", groups=8, base_width=16),
    "dilated network": ResNetConfig(**_DILATED, block="bottleneck", dilated_stages=(2, 3)),
}
BATTERY: Mapping[str, Config] = MappingProxyType(
    _NUMBERS
    | {
        _title(config): config
        for kind, numbers in ((BlockConfig, _BLOCK), (ResNetConfig, _NETWORK))
        for config in covering(kind, numbers)
    }
)
"""By a name that says what is in it."""
