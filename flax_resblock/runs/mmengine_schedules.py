"""What MMEngine's files say: schedules, several at a time, each in a range of steps of its own; and
the clipping of gradients, in its configuration."""

from __future__ import annotations

import ast
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax_resblock.errors import CheckpointError
from flax_resblock.runs.other_schedules import chains
from flax_resblock.runs.scheduler_kinds import one_schedule
from flax_resblock.runs.schedules import Options, Scaled, Schedule, base_rates
from flax_resblock.runs.ticks import BATCH, EPOCH, Unit

PARTS = "param_schedulers"
"""Entry of a checkpoint of MMEngine."""
_OWN = ("param_name", "begin", "end", "by_epoch", "base_values", "last_step", "_global_step")
_COMMON = {*_OWN, "verbose", "_last_value"}
_LONGEST = 1 << 20
"""Characters of a configuration; those of its projects have some ten thousand."""


@dataclass(frozen=True)
class SchedulePart:
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

    parts: tuple[SchedulePart, ...]
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
    position, bases = positions.pop(), base_rates(groups)
    for state, part in zip(states, parts, strict=True):
        if state["last_step"] != part.since(position) or state["base_values"] != bases:
            raise CheckpointError(
                f"{source}: a scheduler from step {part.begin} is at its step "
                f"{state['last_step']} with the base rates {state['base_values']}, where step "
                f"{part.since(position)} and {bases} are expected."
            )
    return MMEngineSchedule(parts, units.pop()), position


def _part(state: Mapping[str, Any], source: str) -> SchedulePart:
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
    return SchedulePart(schedule, int(state["begin"]), int(state["end"]), own)


def written(
    schedule: MMEngineSchedule, position: int, groups: Sequence[Options], rates: Sequence[float]
) -> dict[str, Any]:
    """The state dicts of its parts."""
    bases, parts = base_rates(groups), []
    for part in schedule.parts:
        own = dict(part.entries)
        if "milestones" in own:
            own["milestones"] = Counter({int(n): count for n, count in own["milestones"].items()})
        values = ("lr", part.begin, part.end, schedule.by_epoch, bases)
        counts = (part.since(position), position)
        common = dict(zip(_OWN, (*values, *counts), strict=True))
        parts.append({**own, **common, "verbose": False, "_last_value": list(rates)})
    return {PARTS: parts, "last_epoch": position}


def gradient_settings(text: Any) -> dict[str, Any]:
    """How gradients are clipped, ``clip_grad`` and ``clip_mode`` as timm's script has them, by a
    configuration in Python, which is parsed and not executed; empty if they are not clipped, or if
    it is no such text."""
    if not isinstance(text, str) or len(text) > _LONGEST:
        return {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of strings with unknown escapes
            lines = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    wrapper = {}
    for line in lines:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "optim_wrapper":
            wrapper = _arguments(line.value)
    clip = _arguments(wrapper.get("clip_grad"))
    kind, norm = (
        _literal(clip.get(name), usual) for name, usual in (("type", "norm"), ("norm_type", 2))
    )
    largest = _literal(clip.get("max_norm"), _literal(clip.get("clip_value")))
    if largest is None:
        return {}
    by_norm = kind == "norm" and norm == 2
    return {"clip_grad": largest, "clip_mode": "norm" if by_norm else f"{kind}, norm_type={norm}"}


def _arguments(call: ast.expr | None) -> dict[str, ast.expr]:
    """The arguments of ``dict(name=value)``, or the entries of ``{"name": value}``."""
    if isinstance(call, ast.Call):
        return {one.arg: one.value for one in call.keywords if one.arg}
    if isinstance(call, ast.Dict):
        pairs = zip(call.keys, call.values, strict=True)
        return {str(key.value): value for key, value in pairs if isinstance(key, ast.Constant)}
    return {}


def _literal(node: ast.expr | None, usual: Any = None) -> Any:
    return node.value if isinstance(node, ast.Constant) else usual
