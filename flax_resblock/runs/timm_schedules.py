"""timm's schedules, from their state dicts and back.

They keep no count of their own: the program tells them the epoch, or the number of updates, at each
step. So the position is that of the counters beside them."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs.other_schedules import misfits
from flax_resblock.runs.schedules import (
    Options,
    Schedule,
    base_rate,
    base_rates,
    refuse_other_bases,
)
from flax_resblock.runs.ticks import BATCH, EPOCH, Counters, Unit

_NEAR = 1e-9


@dataclass(frozen=True)
class TimmSchedule(Schedule):
    """A line up from ``warmup_lr_init`` in ``warmup_t``, and then the decay; fields as in timm.

    Attributes:
      kind: ``"cosine"``, ``"tanh"``, ``"poly"``, ``"step"`` or ``"multistep"``.
      t_in_epochs: Whether it counts epochs.
      warmup_prefix: Whether the decay begins after the warm-up; else the warm-up is cut out of it.
      t_initial, lr_min, cycle_mul, cycle_decay, cycle_limit: Of the first three kinds.
      k_decay: Of cosine and poly.
      power: Of poly.
      lb, ub: Of tanh.
      decay_t, decay_rate: Of step and multistep.
    """

    kind: str
    t_in_epochs: bool
    warmup_t: float
    warmup_lr_init: float
    warmup_prefix: bool
    t_initial: float = 1
    lr_min: float = 0.0
    cycle_mul: float = 1.0
    cycle_decay: float = 1.0
    cycle_limit: int = 1
    k_decay: float = 1.0
    power: float = 0.5
    lb: float = -7.0
    ub: float = 3.0
    decay_t: Any = 1.0
    decay_rate: float = 1.0

    @property
    def unit(self) -> Unit:
        """What it counts."""
        return EPOCH if self.t_in_epochs else BATCH

    @property
    def cycles(self) -> int:
        """Steps until the last cycle ends, of the kinds that have cycles."""
        length = self.t_initial * self.cycle_limit
        if self.cycle_mul != 1:
            mul = self.cycle_mul
            length = math.floor(-self.t_initial * (mul**self.cycle_limit - 1) / (1 - mul))
        return int(length + (self.warmup_t if self.warmup_prefix else 0))

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        base = base_rate(group)
        value = self._decayed(step, base)
        if step < self.warmup_t:
            value = self.warmup_lr_init + step * self.warmup_step(base)
        return value * float(group.get("lr_scale", 1.0))

    def warmup_step(self, base: float) -> float:
        """By how much the rate rises in the warm-up."""
        if not self.warmup_t:
            return 1
        whole = self.kind != "tanh" or self.warmup_prefix
        end = base if whole else self._decayed(self.warmup_t, base)
        return (end - self.warmup_lr_init) / self.warmup_t

    def _decayed(self, t: float, base: float) -> float:
        t = t - self.warmup_t if self.warmup_prefix else t
        if self.kind == "step":
            return base * self.decay_rate ** (t // self.decay_t)
        if self.kind == "multistep":
            return base * self.decay_rate ** bisect_right(self.decay_t, t + 1)
        cycle, length, since = t // self.t_initial, self.t_initial, t % self.t_initial
        if self.cycle_mul != 1:
            mul = self.cycle_mul
            cycle = math.floor(math.log(1 - t / self.t_initial * (1 - mul), mul))
            length = mul**cycle * self.t_initial
            since = t - (1 - mul**cycle) / (1 - mul) * self.t_initial
        if cycle >= self.cycle_limit:
            return self.lr_min
        height, share = base * self.cycle_decay**cycle - self.lr_min, since / length
        if self.kind == "tanh":
            return self.lr_min + 0.5 * height * (
                1 - math.tanh(self.lb * (1.0 - share) + self.ub * share)
            )
        share = since**self.k_decay / length**self.k_decay
        if self.kind == "poly":
            return self.lr_min + height * (1 - share) ** self.power
        return self.lr_min + 0.5 * height * (1 + math.cos(math.pi * share))


_WARMUP = ("t_in_epochs", "warmup_t", "warmup_lr_init", "warmup_prefix")
_CYCLES = ("t_initial", "lr_min", "cycle_mul", "cycle_decay", "cycle_limit")
KINDS: Mapping[str, tuple[str, ...]] = {
    "cosine": (*_WARMUP, *_CYCLES, "k_decay"),
    "tanh": (*_WARMUP, *_CYCLES, "lb", "ub"),
    "poly": (*_WARMUP, *_CYCLES, "power", "k_decay"),
    "step": (*_WARMUP, "decay_t", "decay_rate"),
    "multistep": (*_WARMUP, "decay_t", "decay_rate"),
}
"""The entries of the state of each that are its own."""
_COMMON = {
    "param_group_field": "lr",
    "_initial_param_group_field": "initial_lr",
    "metric": None,
    "noise_range_t": None,
    "noise_pct": 0.67,
    "noise_type": "normal",
    "noise_std": 1.0,
    "noise_seed": 42,
}
"""Entries that all have."""
_REST = {"base_values", "warmup_steps", "last_epoch"}


def is_timm(state: Mapping[str, Any]) -> bool:
    """Whether a scheduler's state dict is one of timm's."""
    return {"param_group_field", "base_values", "t_in_epochs"} <= state.keys()


def read_timm(state: Mapping[str, Any], groups: Sequence[Options], source: str) -> TimmSchedule:
    """The schedule in a state dict of timm's; raises CheckpointError for one unknown here."""
    own = state.keys() - _COMMON.keys() - _REST
    listed = isinstance(state.get("decay_t"), list | tuple)
    kinds = [
        kind
        for kind, entries in KINDS.items()
        if own == set(entries) and listed == (kind == "multistep")
    ]
    if not kinds or state["param_group_field"] != "lr":
        raise CheckpointError(
            f"{source} is a scheduler of timm without counterpart here: it has "
            f"{some(sorted(map(str, own)))}."
        )
    refuse_noise(state.get("noise_range_t"), source)
    values = {name: state[name] for name in KINDS[kinds[0]]}
    if listed:
        values["decay_t"] = tuple(values["decay_t"])
    schedule = TimmSchedule(kinds[0], **values)
    refuse_other_bases(state["base_values"], groups, source)
    steps = [schedule.warmup_step(base) for base in base_rates(groups)]
    pairs = zip(steps, state["warmup_steps"], strict=True)
    if not all(math.isclose(ours, theirs, rel_tol=_NEAR) for ours, theirs in pairs):
        raise CheckpointError(
            f"{source} has a warm-up by {list(state['warmup_steps'])} per step, and its other "
            f"entries give {steps}."
        )
    return schedule


def refuse_noise(noise: Any, source: str) -> None:
    """Raises CheckpointError for a schedule with noise, which PyTorch's generator draws."""
    if noise is not None:
        raise CheckpointError(
            f"{source} adds noise to the learning rates, drawn by PyTorch's generator, which has "
            "no counterpart here."
        )


def refuse_plateau(state: Mapping[str, Any], source: str) -> None:
    """Raises CheckpointError for timm's PlateauLRScheduler."""
    if state.keys() == {"best", "last_epoch"}:
        raise CheckpointError(
            f"{source} is timm's PlateauLRScheduler, of which a file holds the best value alone: "
            "neither its factor nor its patience. timm itself begins anew with them."
        )


def fitting(
    schedule: TimmSchedule, groups: Sequence[Options], positions: Sequence[int]
) -> list[int]:
    """Which of the positions give the rates that the optimizer has."""
    return [one for one in positions if next(misfits(schedule, one, groups), None) is None]


def located(
    state: Mapping[str, Any], counters: Counters, groups: Sequence[Options], source: str
) -> Mapping[str, Any]:
    """The state with the one position that fits counters and rates; else CheckpointError."""
    if "last_epoch" in state:  # which this library writes
        return state
    schedule, done = read_timm(state, groups, source), counters.epochs
    # an epoch may be the last one that was done or the next
    possible = [] if done is None else [done, done + 1]
    if not schedule.t_in_epochs:
        counts = (counters.steps, counters.updates, counters.batches)
        possible = list(dict.fromkeys(count for count in counts if count is not None))
    found = fitting(schedule, groups, possible)
    if len(found) == 1:
        return {**state, "last_epoch": found[0]}
    rates = [f"{float(group['lr']):.9g}" for group in groups]
    raise CheckpointError(
        f"{source} is a {schedule.kind} schedule of timm, which does not count its steps. The "
        f"optimizer has the rates {', '.join(rates)}, and the file {counters}: "
        + (f"that fits {found[0]} steps as well as {found[1]}." if found else "that fits none.")
    )


def written(schedule: TimmSchedule, position: int, groups: Sequence[Options]) -> dict[str, Any]:
    """Its state dict, with the position, which timm takes along."""
    bases = base_rates(groups)
    own = {name: value for name, value in asdict(schedule).items() if name in KINDS[schedule.kind]}
    if isinstance(schedule.decay_t, tuple) and "decay_t" in own:
        own["decay_t"] = list(schedule.decay_t)
    steps = [schedule.warmup_step(base) for base in bases]
    return {**_COMMON, "base_values": bases, **own, "warmup_steps": steps, "last_epoch": position}
