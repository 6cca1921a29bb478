"""How often a run steps its learning-rate scheduler, from the counters in its file.

A scheduler counts its own steps, here called ticks. A plain loop ticks once per optimizer step or
once per epoch; Accelerate ticks once per process at every step. The count alone shows none of that,
and a wrong guess goes on at another pace without any other sign. So it is held against everything
else that was counted: Adam's ``step``, the counters of the program, BatchNorm's
``num_batches_tracked`` and the epochs."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import NamedTuple

from flax_resblock.errors import CheckpointError, InputError


class Unit(NamedTuple):
    """What a scheduler counts: ``ticks`` per optimizer step, or per epoch."""

    ticks: int = 1
    per_epoch: bool = False

    def __str__(self) -> str:
        what = "epoch" if self.per_epoch else "batch" if self.ticks == 1 else "optimizer step"
        return f"{'one' if self.ticks == 1 else self.ticks} per {what}"


BATCH, EPOCH = Unit(), Unit(per_epoch=True)
FLAG = (
    "Say `schedule_unit='batch'`, `schedule_unit='epoch'` or, with the number of scheduler steps "
    "per optimizer step, `schedule_unit=N`."
)
"""What to do where the counters do not tell."""


def unit_of(word: str | int) -> Unit:
    """The unit that ``"batch"``, ``"epoch"`` or a number of ticks names, or InputError."""
    text = str(word)
    if text in ("batch", "epoch"):
        return Unit(per_epoch=text == "epoch")
    if text.isdecimal() and 0 < int(text) < 1 << 20:
        return Unit(int(text))
    raise InputError(
        f"schedule unit {text[:60]!r} is none of: batch, epoch, or the number of scheduler steps "
        f"per optimizer step, such as 4."
    )


def word_of(unit: Unit) -> str:
    """The inverse of :func:`unit_of`."""
    return "epoch" if unit.per_epoch else "batch" if unit.ticks == 1 else str(unit.ticks)


@dataclass(frozen=True)
class Counters:
    """What a file counts; None for what it does not.

    Attributes:
      updates: Updates that the optimizer counted, as Adam does. Loss scaling skips some steps.
      steps: The program's own count: optimizer steps, or batches where several make a step.
      batches: Batches that BatchNorm has seen.
      epochs: Number of the last epoch or of the next one, whatever the program means.
    """

    updates: int | None = None
    steps: int | None = None
    batches: int | None = None
    epochs: int | None = None

    def __str__(self) -> str:
        counted = {
            "optimizer updates": self.updates,
            "steps by the program's own count": self.steps,
            "batches seen by BatchNorm": self.batches,
        }
        words = [f"{count} {what}" for what, count in counted.items() if count is not None]
        words += [] if self.epochs is None else [f"epoch {self.epochs}"]
        return ", ".join(words) or "nothing else that was counted"

    @property
    def done(self) -> int | None:
        """Optimizer steps done, as far as the counters say; a program that counts several batches
        per step is put right by the optimizer's own count."""
        if self.steps is None or not self.updates or not _finer(self.steps, self.updates):
            return self.updates if self.steps is None else self.steps
        return self.updates

    def steps_at(self, position: int, unit: Unit) -> int | None:
        """Optimizer steps done, with those skipped by loss scaling, which were ticked as well."""
        done, (whole, rest) = self.done, divmod(position, unit.ticks)
        if done is None:
            return None if rest else whole
        skipped = 0 if self.steps == done else _most_skipped(done)
        return whole if not rest and 0 <= whole - done <= skipped else done


_SKIPPED, _ONE_IN, _FEW = 16, 500, 4
"""Steps that loss scaling may have skipped: its scale of 2**16 can be halved so often at the start,
and it tries a larger one every 2,000 steps; and how many of them leave a factor recognisable."""
_MOST_TICKS = 1 << 12


def _finer(steps: int, updates: int) -> bool:
    return steps >= 2 * updates and steps % updates == 0


def _most_skipped(updates: int) -> int:
    return _SKIPPED + updates // _ONE_IN


def _readings(position: int, count: int | None, skipped: int = 0) -> set[Unit]:
    """Ticks per step that explain the position of a scheduler after ``count`` steps, of which None
    or 0 explain nothing. ``skipped`` is by how many the count may be behind the true number; it may
    also differ by one, where a file was written between the optimizer's step and the scheduler's.
    """
    if not count:
        return set()
    found = {BATCH} if -1 <= position - count <= max(skipped, 1) else set()
    if position % count == 0 and 2 * count <= position <= _MOST_TICKS * count:
        found.add(Unit(position // count))
    if found or not skipped:
        return found
    most = min(position // count, _MOST_TICKS)
    factors = (n for n in range(2, most + 1) if position % n == 0)
    return {Unit(n) for n in factors if position // n - count <= _FEW}


def _per_step(position: int, counters: Counters) -> set[Unit]:
    updates, steps, seen = counters.updates, counters.steps, counters.batches
    skipped = _most_skipped(updates or 0)
    if updates and seen is not None and seen >= updates:
        skipped = min(skipped, seen - updates)  # BatchNorm sees the batches of skipped steps too
    by_updates = _readings(position, updates, skipped)
    by_steps = _readings(position, steps)
    if not updates and not steps:
        return _readings(position, seen)
    behind = steps - updates if updates and steps and not _finer(steps, updates) else -1
    if 0 <= behind <= _most_skipped(updates or 0):
        # the program counts the steps, skipped ones too; Accelerate does not tick at those
        return by_steps | {unit for unit in by_updates if unit.ticks * (updates or 0) == position}
    return by_updates | by_steps


def read_unit(position: int, counters: Counters, source: str) -> Unit:
    """What a scheduler counts that was stepped ``position`` times; raises CheckpointError, which
    shows all counters of its file, where they leave none or several readings."""
    found, epochs = _per_step(position, counters), counters.epochs
    done = counters.done or counters.batches
    if position or done:
        if epochs is None:
            whole = position and done and done % position == 0
            found |= {EPOCH} if whole and not found else set()
        elif position in (epochs, epochs + 1) and (done is None or done >= position):
            one_step_each = BATCH in found and position == done
            found |= set() if one_step_each else {EPOCH}
    if len(found) == 1:
        return found.pop()
    raise CheckpointError(
        f"{source} was stepped {position} times, and the file has {counters}: {_said(found)}. "
        f"{FLAG}"
    )


def _said(found: Set[Unit]) -> str:
    if not found:
        return "that is neither once per batch or epoch nor a whole number of times per step"
    return f"that fits {' as well as '.join(sorted(map(str, found)))}"
