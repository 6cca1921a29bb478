"""Small networks and blocks that together use everything this library has: what a new device, or a
new version of a framework, is tried on.

They are generated from the literals of the configurations, so that a new option cannot be
forgotten; only what has numbers instead of choices is listed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from itertools import product
from types import MappingProxyType
from typing import Any, TypeVar

from flax_resblock.config import BlockConfig, Config, ResNetConfig, Slot, choices_of, walk

T = TypeVar("T")
OptionValue = tuple[str, str]
"""A field of a configuration and one of its values."""

_BLOCK: dict[str, Any] = {"in_channels": 8, "out_channels": 16, "stride": 2}
_NETWORK: dict[str, Any] = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8, "num_classes": 10}
_DILATED: dict[str, Any] = {"depths": (1, 2, 2), "widths": (8, 16, 16), "stem_width": 16}
_DILATED["num_classes"] = None
_DEEP: dict[str, Any] = {"stem_hidden": (4, 6)}


def _valid(kind: type[Config], numbers: Mapping[str, Any]) -> Iterator[Config]:
    """A configuration for every combination of options that makes one."""
    choices = choices_of(kind)
    for values in product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        extra = _DEEP if options.get("stem") == "deep" else {}
        try:
            yield kind(**numbers, **options, **extra)
        except ValueError:
            continue


def uses(configs: Iterable[Config]) -> dict[Config, set[OptionValue]]:
    """Which values of options each configuration uses: those that decide about one of its slots.

    Args:
      configs: All valid combinations of the options, with the same numbers.
    """
    slots = {config: tuple(walk(config)) for config in configs}
    by_others: dict[tuple[Any, ...], set[tuple[Slot, ...]]] = {}
    for config, own in slots.items():
        for name in choices_of(type(config)):
            by_others.setdefault(_without(config, name), set()).add(own)
    return {
        config: {
            (name, getattr(config, name))
            for name in choices_of(type(config))
            if len(by_others[_without(config, name)]) > 1
        }
        for config in slots
    }


def _without(config: Config, left_out: str) -> tuple[Any, ...]:
    names = choices_of(type(config))
    return left_out, *(getattr(config, name) for name in names if name != left_out)


def fewest(features: Mapping[T, set[Any]]) -> list[T]:
    """Few of the items that together have every feature of all of them: the greedy cover."""
    missing: set[Any] = set().union(*features.values())
    chosen = []
    while missing:
        best = max(features, key=lambda item: len(features[item] & missing))
        chosen.append(best)
        missing -= features[best]
    return chosen


def covering(kind: type[Config], numbers: Mapping[str, Any]) -> list[Config]:
    """Few configurations in which every value of every option is used, the plainest first."""
    return fewest(uses(_valid(kind, numbers)))


def _title(config: Config) -> str:
    """``"bottleneck block with pooled shortcut, se attention"``: what differs from the defaults."""
    kind, what = ("kind", "block") if isinstance(config, BlockConfig) else ("block", "network")
    defaults = {one.name: one.default for one in fields(config) if one.default is not MISSING}
    changed = [
        f"{name} {getattr(config, name)}"
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
