"""The schedules of Hugging Face's Trainer, which are LambdaLRs without their function.

Their state dict says no more than that the function is one of theirs. The length of the run is in
``trainer_state.json``, and the rate at the file's step then leaves one schedule and one number of
warm-up steps, or is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax_resblock.runs.schedules import Options, Scaled, base_rate

_KINDS = ("linear", "cosine")
_NEAR = 1e-9


@dataclass(frozen=True)
class TransformersSchedule(Scaled):
    """Up in a line for ``warmup`` steps, then down to 0 at step ``total``, and 0 from there.

    Attributes:
      kind: ``"linear"`` or ``"cosine"``.
      warmup, total: Steps.
    """

    kind: str
    warmup: int
    total: int

    def share(self, step: int) -> float:
        if step < self.warmup:
            return step / max(1, self.warmup)
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        down = 1 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return max(0.0, down)

    @property
    def length(self) -> int:
        return self.total


def recognised(position: int, groups: Sequence[Options], total: int) -> TransformersSchedule | None:
    """The one schedule of this length that gives the rates at a position after its warm-up; None if
    none or several do.
    """
    found = []
    for kind in _KINDS:
        for warmup in _warmups(
            kind, position, float(groups[0]["lr"]) / base_rate(groups[0]), total
        ):
            schedule = TransformersSchedule(kind, warmup, total)
            pairs = ((schedule.rate(position, group), float(group["lr"])) for group in groups)
            if all(math.isclose(ours, theirs, rel_tol=_NEAR) for ours, theirs in pairs):
                found.append(schedule)
    return found[0] if len(found) == 1 else None


def _warmups(kind: str, position: int, share: float, total: int) -> list[int]:
    """The number of warm-up steps that explains a share of the base rate."""
    if not 0 < share < 1 or position >= total:
        return []  # the end of the warm-up is that of every schedule, and so is the end
    if kind == "linear":
        warmup = total - (total - position) / share
    else:
        done = math.acos(2 * share - 1) / math.pi
        warmup = (position - done * total) / (1 - done)
    whole = round(warmup)
    near = abs(warmup - whole) <= 1e-6 * total
    return [whole] if near and 0 <= whole < position else []


def written(schedule: TransformersSchedule, groups: int) -> dict[str, Any]:
    """Its entries in a state dict, with one that says what it is; torch takes it along."""
    known = {"kind": schedule.kind, "warmup": schedule.warmup, "total": schedule.total}
    return {"lr_lambdas": [{} for _ in range(groups)], WRITTEN: known}


WRITTEN = "_transformers"
"""Entry of the state dicts that this library writes."""


def read_written(state: Mapping[str, Any]) -> TransformersSchedule | None:
    """What :func:`written` wrote."""
    return TransformersSchedule(**state[WRITTEN]) if WRITTEN in state else None
