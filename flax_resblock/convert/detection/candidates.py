"""Finds architecture, number of classes and naming scheme of a state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from flax_resblock.config import (
    ARCHITECTURES,
    BlockConfig,
    Config,
    ResNetConfig,
    architecture,
    name_of,
    unknown_architecture,
)
from flax_resblock.convert.detection.assumption_rules import hides_its_order
from flax_resblock.convert.detection.assumptions import with_assumptions
from flax_resblock.convert.detection.configuration import TensorInfos, infer_block, infer_network
from flax_resblock.convert.naming import Naming, is_outside
from flax_resblock.convert.namings import NAMINGS, naming_of
from flax_resblock.convert.state_map import Misfit, StateMap
from flax_resblock.errors import CheckpointError, InputError, some


@dataclass(frozen=True)
class Match:
    """One reading of a state dict."""

    state_map: StateMap
    misfit: Misfit

    @property
    def title(self) -> str:
        """``resnet18 in naming scheme 'torchvision'``."""
        return f"{name_of(self.state_map.config)} in naming scheme '{self.state_map.naming.name}'"


class NoFitError(CheckpointError):
    """No reading fits; ``nearest`` is the one with the fewest differences, if there is any."""

    def __init__(self, message: str, nearest: Match | None) -> None:
        super().__init__(message)
        self.nearest = nearest


def _requested(
    wanted: str | Config,
    found: TensorInfos,
    naming: Naming,
    num_classes: int | None,
    stride: int | None,
) -> Config:
    """The configuration asked for; classes and channels left open come from the file."""
    if isinstance(wanted, BlockConfig):
        return wanted if stride is None else replace(wanted, stride=stride)
    if isinstance(wanted, ResNetConfig):
        return wanted if num_classes is None else replace(wanted, num_classes=num_classes)
    seen = infer_network(naming, found)
    changes: dict[str, object] = {}
    if seen is not None:
        changes = {"in_channels": seen.in_channels, "num_classes": seen.num_classes}
    if num_classes is not None:
        changes["num_classes"] = num_classes
    return architecture(wanted, **changes)


def _matches(
    found: TensorInfos,
    namings: Iterable[Naming],
    wanted: str | Config | None,
    num_classes: int | None,
    stride: int | None,
    allow_missing: Sequence[str] = (),
    assumptions: Mapping[str, Any] | None = None,
) -> list[Match]:
    matches = []
    for naming in namings:
        if wanted is not None:
            config: Config | None = _requested(wanted, found, naming, num_classes, stride)
        else:
            config = infer_network(naming, found) or infer_block(naming, found, stride)
            if isinstance(config, ResNetConfig) and num_classes is not None:
                config = replace(config, num_classes=num_classes)
            if config is not None and config.norm_first:
                config = replace(config, **naming.assumes)
        if config is None:
            continue
        if not isinstance(wanted, ResNetConfig | BlockConfig):
            try:
                config = with_assumptions(config, naming.told)
            except InputError:
                continue  # the program that this scheme comes from has no such network
        unsuited = None
        try:
            config = with_assumptions(config, assumptions or {})
        except InputError as error:
            unsuited = error
        try:
            state_map = StateMap(config, naming)
        except InputError:
            continue  # this scheme cannot name the network at all
        match = Match(state_map, state_map.check(found, allow_missing))
        if unsuited is None:
            matches.append(match)
        elif not len(match.misfit):
            raise unsuited  # the tensors fit, and what was said of them does not

    def order(match: Match) -> tuple[bool, int, int]:
        """Of two, first the one that knows every name. One that knows none and says of the network
        what nobody asked for comes last, few as its own tensors may be."""
        misfit = match.misfit
        says_more = bool(match.state_map.naming.told) and misfit.not_fitting == len(found)
        return says_more, len(misfit), len(misfit.unexpected)

    return sorted(matches, key=order)


def _same(a: StateMap, b: StateMap) -> bool:
    """Whether two readings are the same conversion, but for what both schemes assume."""
    usual = {**a.naming.assumes, **b.naming.assumes}
    told = {name: getattr(a.config, name) for name in usual if hasattr(b.config, name)}
    return replace(b.config, **told) == a.config and [
        (e.torch_key, e.codec) for e in a.entries
    ] == [(e.torch_key, e.codec) for e in b.entries]


def _are_orders(a: Config, b: Config) -> bool:
    """Whether two readings guess different orders, which no tensor tells: it is an assumption."""
    if not isinstance(a, ResNetConfig) or not isinstance(b, ResNetConfig):
        return False
    return a.order != b.order and hides_its_order(a) and hides_its_order(b)


def identify(
    found: TensorInfos,
    *,
    architecture: str | Config | None = None,
    naming: str | Naming | None = None,
    num_classes: int | None = None,
    stride: int | None = None,
    allow_missing: Sequence[str] = (),
    assumptions: Mapping[str, Any] | None = None,
    source: str = "the state dict",
) -> Match:
    """The one reading of a state dict that fits; the arguments are those of
    :class:`~flax_resblock.convert.opened.ReadOptions`.

    Raises:
      CheckpointError: Nothing fits, or several readings fit; the message shows the nearest and the
        flag to use.
      InputError: An unknown name, or a number of classes or a stride below 1.
    """
    if isinstance(architecture, str) and architecture not in ARCHITECTURES:
        raise InputError(unknown_architecture(architecture))
    for name, number in (("num_classes", num_classes), ("stride", stride)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise InputError(f"{name}={number!r} must be a positive integer.")
    namings = NAMINGS.values() if naming is None else (naming_of(naming),)
    matches = _matches(
        found, namings, architecture, num_classes, stride, allow_missing, assumptions
    )
    fitting = [match for match in matches if not len(match.misfit)]
    if not fitting:
        was_told = any(one is not None for one in (architecture, naming, num_classes))
        words = _no_fit(found, source, matches, was_told, stride)
        raise NoFitError(words, matches[0] if matches else None)
    best, *others = fitting
    rivals = [one for one in others if not _same(best.state_map, one.state_map)]
    rivals = [one for one in rivals if not _are_orders(best.state_map.config, one.state_map.config)]
    if rivals:
        choices = "; ".join(match.title for match in (best, *rivals))
        raise CheckpointError(
            f"{source} fits several readings equally well: {choices}. Say which with "
            f"`naming=NAME` or `architecture=NAME`."
        )
    config = best.state_map.config
    if (
        isinstance(config, BlockConfig)
        and stride is None
        and config.changes_shape
        and isinstance(architecture, str | None)
    ):
        raise CheckpointError(
            f"{source} is a bare {config.kind} block "
            f"{config.in_channels}->{config.out_channels} whose skip changes shape "
            f"(naming scheme '{best.state_map.naming.name}'). Its stride cannot be read off "
            f"the weights. Say it with `stride=1` or `stride=2`."
        )
    return best


def _no_fit(
    found: TensorInfos, source: str, matches: list[Match], was_told: bool, stride: int | None
) -> str:
    free = _matches(found, NAMINGS.values(), None, None, stride) if was_told else matches
    if not matches:
        keys = list(found)
        sample = f"its {len(keys)} tensors are named like {', '.join(keys[:3])}"
        sample = sample if keys else "it holds no tensors"
        nearest = f" Nearest: {free[0].title} ({_differences(free[0])})." if free else None
        nearest = nearest or _closest_family(found)
        # whatever else it is, it is a network of convolutions
        if any(len(info.shape) == 4 for info in found.values()):
            advice = (
                "`naming=flax_resblock.Naming(...)` takes a naming scheme of your own; "
                "`architecture=NAME` with `naming=NAME` lists every difference from one reading."
            )
        else:
            advice = "It has no convolution; check that it is the right file."
        return (
            f"{source} is no residual network in any known naming scheme ({', '.join(NAMINGS)}); "
            f"{sample}.{nearest}\n{advice}"
        )
    best, misfit = matches[0], matches[0].misfit
    fits = len(found) - misfit.not_fitting
    lines = [
        f"{source} does not fit {best.title}; {fits} of its {len(found)} tensors do.",
        *misfit.lines(),
    ]
    better = [match for match in free if len(match.misfit) < len(best.misfit)]
    others = [match for match in (better or matches[1:]) if match is not best]
    if better and not len(better[0].misfit):
        lines.append(
            f"It does fit {better[0].title}; leave out what you gave, or pass "
            f"`naming={better[0].state_map.naming.name!r}`."
        )
    elif others:
        next_best = "; ".join(f"{one.title} ({_differences(one)})" for one in others[:2])
        lines.append(f"Next nearest: {next_best}.")
    lines.append("Try `naming=NAME` or `architecture=NAME` for another reading.")
    return "\n".join(lines)


def _differences(match: Match) -> str:
    number = len(match.misfit)
    return f"{number} difference{'' if number == 1 else 's'}"


def _closest_family(found: TensorInfos) -> str:
    """The named network and scheme that at least half of the tensors fit, and which do not."""
    best: tuple[int, Match] | None = None
    for naming in NAMINGS.values():
        outside = {name for place, name in naming.modules.items() if is_outside(place)}
        named = (naming.is_inside_block(k) or k.rpartition(".")[0] in outside for k in found)
        if 2 * sum(named) < len(found):
            continue
        for published in ARCHITECTURES:
            state_map = _published(published, naming.name)
            if state_map is None:
                continue
            fits = sum(
                (info := found.get(entry.torch_key)) is not None and info.shape == entry.torch_shape
                for entry in state_map.entries
            )
            if 2 * fits >= len(found) and (best is None or fits > best[0]):
                best = fits, Match(state_map, state_map.check(found))
    if best is None or not found:
        return ""
    fits, match = best
    others = [*match.misfit.unexpected, *match.misfit.wrong_shape]
    return (
        f" Closest family: {match.title}, which {fits} of {len(found)} tensors fit; these do "
        f"not: {some(others)}."
    )


@cache  # a refusal asks for its words several times
def _published(name: str, naming: str) -> StateMap | None:
    """The named network in a known scheme; None if that has no names for it."""
    try:
        return StateMap(ARCHITECTURES[name], NAMINGS[naming])
    except InputError:
        return None
