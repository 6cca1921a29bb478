"""The schedules of Hugging Face's Trainer, which are LambdaLRs without their function.

Their state dict says no more than that the function is one of theirs. The length of the run is in
``trainer_state.json``, with the rates of the steps that were logged. Together with the rate at the
file's step they have to leave one schedule, or it is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import reduce
from typing import Any

from flax_resblock.runs.schedules import Options, Scaled, base_rate

_NEAR = 1e-9
_MOST_CYCLES = 8
_POWERS = (1.0, 2.0, 3.0, 0.5)
_ENDS = (1e-7, 0.0)
"""Cycles, powers and last rates that are tried; the Trainer's defaults are 1, 1 and 1e-7."""

Logged = Sequence[tuple[int, float]]
"""Steps, and the rates that were logged there."""


@dataclass(frozen=True)
class TransformersSchedule(Scaled):
    """Up in a line for ``warmup`` steps, then down until step ``total``.

    Attributes:
      kind: ``"linear"`` and ``"cosine"`` go down to 0; so do ``"restarts"``, a cosine that begins
        again; ``"polynomial"`` goes down to ``floor``; ``"constant"`` stays.
      warmup, total: Steps.
      cycles: Cosines of ``"restarts"``.
      power: Of ``"polynomial"``.
      floor: Last share of the base rate of ``"polynomial"``.
    """

    kind: str
    warmup: int
    total: int
    cycles: int = 1
    power: float = 1.0
    floor: float = 0.0

    def share(self, step: int) -> float:
        if step < self.warmup:
            return step / max(1, self.warmup)
        if self.kind == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        if self.kind == "polynomial":
            return (1 - self.floor) * max(0.0, 1 - done) ** self.power + self.floor
        if self.kind == "restarts":
            done = 1.0 if done >= 1 else (self.cycles * done) % 1.0
        down = 1 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return max(0.0, down)

    @property
    def length(self) -> int:
        return self.total


def recognised(
    position: int, groups: Sequence[Options], total: int, logged: Logged = ()
) -> TransformersSchedule | None:
    """The one schedule of this length that gives the rates at a position after its warm-up, and
    those that were logged before; None if none or several do."""
    base, found = base_rate(groups[0]), []
    share = float(groups[0]["lr"]) / base
    known = [(step, rate / base) for step, rate in logged if step <= position]
    for schedule in _candidates(position, share, total, base, known):
        pairs = ((schedule.rate(position, group), float(group["lr"])) for group in groups)
        same = all(math.isclose(ours, theirs, rel_tol=_NEAR) for ours, theirs in pairs)
        if same and schedule not in found and _logs(schedule, known):
            found.append(schedule)
    return found[0] if len(found) == 1 else None


def _logs(schedule: TransformersSchedule, known: Logged) -> bool:
    """Whether it gives what was logged: the rates before a step, or in older versions after it."""
    return any(
        all(
            math.isclose(schedule.share(step - back), share, rel_tol=_NEAR, abs_tol=1e-300)
            for step, share in known
        )
        for back in (0, 1)
    )


def _candidates(
    position: int, share: float, total: int, base: float, known: Logged
) -> Iterator[TransformersSchedule]:
    """Schedules with a whole number of warm-up steps that explain a share of the base rate."""
    level = [step for step, found in known if found == 1.0 and step < position - 1]
    if share == 1.0 and level and not _restarts_there([*level, position], total):
        yield TransformersSchedule("constant", _end_of_warmup(known), total)
    if not 0 < share < 1 or position >= total:
        return  # the end of the warm-up is that of every schedule, and so is the end
    part = math.acos(2 * share - 1) / math.pi
    places: list[tuple[float, dict[str, Any]]] = [
        (1 - share, {"kind": "linear"}),
        (part, {"kind": "cosine"}),
    ]
    for power in _POWERS:
        for last in (rate / base for rate in _ENDS):
            plain = power == 1 and last == 0  # the linear one
            if share > last and not plain:
                done = 1 - ((share - last) / (1 - last)) ** (1 / power)
                places.append((done, {"kind": "polynomial", "power": power, "floor": last}))
    for cycles in range(2, _MOST_CYCLES + 1):
        known_as = {"kind": "restarts", "cycles": cycles}
        places += [((cycle + part) / cycles, known_as) for cycle in range(cycles)]
    for done, about in places:
        # (position - warmup) / (total - warmup) is done
        warmup = (position - done * total) / (1 - done)
        whole = round(warmup)
        if abs(warmup - whole) <= 1e-6 * total and 0 <= whole < position:
            yield TransformersSchedule(warmup=whole, total=total, **about)


def _end_of_warmup(known: Logged) -> int:
    """The steps of a warm-up whose rates were logged; 0 for none, which is the same from there."""
    rising = [(step, share) for step, share in known if 0 < share < 1]
    if not rising:
        return 0
    step, share = rising[-1]
    found = {round((step - back) / share) for back in (0, 1)}
    schedules = (TransformersSchedule("constant", warmup, warmup) for warmup in sorted(found))
    return next((one.warmup for one in schedules if _logs(one, known)), 0)


def _restarts_there(steps: Sequence[int], total: int) -> bool:
    """Whether a cosine with restarts may begin a cycle at each of these steps."""
    gap = reduce(math.gcd, (step - steps[0] for step in steps[1:]))
    return any(
        cycles * gap % parts == 0 and 0 <= total - cycles * gap // parts <= steps[0]
        for cycles in range(2, _MOST_CYCLES + 1)
        for parts in range(1, cycles + 1)
    )


def written(schedule: TransformersSchedule, groups: int) -> dict[str, Any]:
    """Its entries in a state dict, with one that says what it is; torch takes it along."""
    usual = {one.name: one.default for one in fields(schedule)}
    known = {name: v for name, v in asdict(schedule).items() if v != usual[name]}
    return {"lr_lambdas": [{} for _ in range(groups)], WRITTEN: known}


WRITTEN = "_transformers"
"""Entry of the state dicts that this library writes."""


def read_written(state: Mapping[str, Any]) -> TransformersSchedule | None:
    """What :func:`written` wrote."""
    return TransformersSchedule(**state[WRITTEN]) if WRITTEN in state else None
