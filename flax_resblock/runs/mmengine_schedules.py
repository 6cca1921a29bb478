"""MMEngine's schedules: several at a time, each in a range of steps of its own."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax_resblock.errors import CheckpointError
from flax_resblock.runs.other_schedules import chains
from flax_resblock.runs.scheduler_kinds import one_schedule
from flax_resblock.runs.schedules import Options, Scaled, Schedule, base_rate
from flax_resblock.runs.ticks import BATCH, EPOCH, Unit

PARTS = "param_schedulers"
"""Entry of a checkpoint of MMEngine."""
_OWN = ("param_name", "begin", "end", "by_epoch", "base_values", "last_step", "_global_step")
_COMMON = {*_OWN, "verbose", "_last_value"}


@dataclass(frozen=True)
class Part:
    """One of them: PyTorch's schedule of the same name, which multiplies the rate; the steps from
    the first to before the last at which it does; and the entries of its state dict that are its
    own."""

    schedule: Schedule
    begin: int
    end: int
    entries: Mapping[str, Any] = field(compare=False)

    def since(self, step: int) -> int:
        """Its own step; -1 before it begins."""
        return min(step, self.end - 1) - self.begin if step >= self.begin else -1


@dataclass(frozen=True)
class MMEngineSchedule(Scaled):
    """All of them together; ``by_epoch`` says whether they count epochs."""

    parts: tuple[Part, ...]
    by_epoch: bool

    @property
    def unit(self) -> Unit:
        """What they count."""
        return EPOCH if self.by_epoch else BATCH

    def share(self, step: int) -> float:
        whole = {"lr": 1.0, "initial_lr": 1.0}
        begun = [part for part in self.parts if step >= part.begin]
        return math.prod(part.schedule.rate(part.since(step), whole) for part in begun)


def read_parts(states: Any, groups: Sequence[Options], source: str) -> tuple[MMEngineSchedule, int]:
    """The schedule in the state dicts of MMEngine's schedulers, and its position; raises
    CheckpointError for one without counterpart, or states that do not belong together."""
    if not isinstance(states, list):
        raise CheckpointError(f"{source} are the schedulers of several optimizers.")
    parts = tuple(_part(state, source) for state in states)
    units, positions = ({state[name] for state in states} for name in ("by_epoch", "_global_step"))
    if len(units) > 1:
        raise CheckpointError(
            f"{source} has schedulers that count epochs and others that count iterations, which "
            "have no counterpart together here. Let MMEngine count alike: "
            "convert_to_iter_based=True."
        )
    if len(positions) > 1:
        raise CheckpointError(f"{source} has schedulers at the steps {sorted(positions)}.")
    position, bases = positions.pop(), [base_rate(group) for group in groups]
    for state, part in zip(states, parts, strict=True):
        if state["last_step"] != part.since(position) or state["base_values"] != bases:
            raise CheckpointError(
                f"{source}: a scheduler from step {part.begin} is at its step "
                f"{state['last_step']} with the base rates {state['base_values']}, where step "
                f"{part.since(position)} and {bases} are expected."
            )
    return MMEngineSchedule(parts, units.pop()), position


def _part(state: Mapping[str, Any], source: str) -> Part:
    own = {name: value for name, value in state.items() if name not in _COMMON}
    plain = {name: value for name, value in own.items() if name != "eta_min_ratio"}
    if "power" in plain and not plain.get("eta_min"):
        plain.pop("eta_min", None)
    schedule = one_schedule(plain, source)
    known = state["param_name"] == "lr" and not own.get("eta_min_ratio") and chains(schedule)
    if not known:
        raise CheckpointError(
            f"{source}: a scheduler of the {state['param_name']} that is a "
            f"{type(schedule).__name__}, or one with a lowest rate, has no counterpart here."
        )
    return Part(schedule, int(state["begin"]), int(state["end"]), own)


def written(
    schedule: MMEngineSchedule, position: int, groups: Sequence[Options], rates: Sequence[float]
) -> dict[str, Any]:
    """The state dicts of its parts."""
    bases, parts = [base_rate(group) for group in groups], []
    for part in schedule.parts:
        own = dict(part.entries)
        if "milestones" in own:
            own["milestones"] = Counter({int(n): count for n, count in own["milestones"].items()})
        values = ("lr", part.begin, part.end, schedule.by_epoch, bases)
        counts = (part.since(position), position)
        common = dict(zip(_OWN, (*values, *counts), strict=True))
        parts.append({**own, **common, "verbose": False, "_last_value": list(rates)})
    return {PARTS: parts, "last_epoch": position}
