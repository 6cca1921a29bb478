"""Estimates of what fits where a program does not, and the largest batch, found by compiling."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from flax_resblock.aot.outcome import Outcome
from flax_resblock.aot.request import Request
from flax_resblock.aot.targets import CHIPS, TPUS, Target
from flax_resblock.config import SlotKind, walk

Compile = Callable[[Request], Outcome]

_STEPS = 32
"""The search for the largest batch ends when it is known to one part in this many."""
_GUESSES = 4
"""Steps of the search that go by proportion; later ones bisect."""
_CAUTION = 0.8
"""Share of the proportional estimate that is suggested: in tight memory the compiler needs more
temporaries to schedule."""
_TILE = 8
"""Suggested images per device are a multiple of it."""
_COPIES = {"forward": 1, "train-step": 3}
"""Copies of the parameters in memory: in training also their gradients and momentum."""


def fixed_bytes(request: Request) -> int:
    """Bytes on each device that do not depend on the batch; 0 where the network is not known."""
    if request.exported:
        return 0
    slots = list(walk(request.config))
    statistics = sum(
        2 * slot.shape[0]
        for slot in slots
        if slot.normalises and slot.kind is not SlotKind.GROUP_NORM
    )
    trained = sum(slot.parameters for slot in slots)
    return 4 * (statistics + trained * _COPIES[request.what])


def _images_per_device(request: Request, outcome: Outcome, capacity: int) -> float:
    """By proportion, as if memory grew with the images on each device."""
    fixed = fixed_bytes(request)
    each = max(outcome.needed - fixed, 1) / (request.batch / outcome.devices)
    return max(capacity - fixed, 0) / each


@dataclass(frozen=True)
class Suggestion:
    """A change that should make a program fit, by estimate."""

    batch: int
    target: str


def suggestions(request: Request, outcome: Outcome) -> list[Suggestion]:
    """Changes that should make a program fit: a smaller batch, more of the same chips, or as many
    chips with more memory. They are estimates; the next compilation decides.
    """
    here = request.parsed_target
    found = []
    limit = _cautious(_images_per_device(request, outcome, outcome.capacity))
    if limit:
        found.append(Suggestion(limit * outcome.devices, str(here)))
    for topology in _larger(here):
        devices = outcome.devices * math.prod(_sizes(topology)) // math.prod(_sizes(here.topology))
        if request.batch % devices == 0 and request.batch // devices <= limit:
            found.append(Suggestion(request.batch, str(Target(here.platform, here.chip, topology))))
            break
    chips = CHIPS[here.platform]
    for chip, row in sorted(chips.items(), key=lambda item: item[1].memory):
        if row.memory > outcome.capacity and request.batch / outcome.devices <= _cautious(
            _images_per_device(request, outcome, row.memory)
        ):
            topology = TPUS[chip].topology if here.platform == "tpu" else here.topology
            if here.platform == "cuda" or here.topology == TPUS[here.chip].topology:
                found.append(Suggestion(request.batch, str(Target(here.platform, chip, topology))))
                break
    return found


def _cautious(images: float) -> int:
    """A round number of images per device below an estimate."""
    images *= _CAUTION
    return int(images) // _TILE * _TILE if images >= _TILE else int(images)


def _sizes(topology: str) -> list[int]:
    return [int(size) for size in topology.split("x")]


def _larger(target: Target) -> list[str]:
    """Topologies of the same chip, each twice as large as the one before."""
    sizes, found = _sizes(target.topology), []
    for _ in range(8):
        smallest = min(range(len(sizes)), key=lambda axis: (sizes[axis], axis))
        sizes[smallest] *= 2
        found.append("x".join(map(str, sorted(sizes) if target.chip in ("v5e", "v6e") else sizes)))
    return found


@dataclass(frozen=True)
class Largest:
    """The result of a search.

    Attributes:
      batch: Fits; 0 where not even one image per device does.
      too_large: The smallest batch that was tried and does not fit.
    """

    batch: int
    outcome: Outcome | None
    too_large: int


def largest_batch(request: Request, compile_one: Compile) -> Largest:
    """The largest batch that fits, by compiling: a few guesses in proportion, then bisection
    between one that fits and one that does not."""
    fits, best, too_large, batch, tries = 0, None, 0, request.batch, 0
    while True:
        outcome = compile_one(request.but(batch=batch))
        tries += 1
        if outcome.fits:
            fits, best = batch, outcome
        else:
            too_large = batch
        unit = outcome.devices
        resolution = max(unit, fits // _STEPS // unit * unit)
        if too_large and too_large - fits <= resolution:
            return Largest(fits, best, too_large)
        if tries <= _GUESSES:
            wanted = (
                int(_images_per_device(request.but(batch=batch), outcome, outcome.capacity)) * unit
            )
        else:
            wanted = (fits + too_large) // 2 // unit * unit if too_large else 2 * fits
        batch = max(wanted, fits + resolution)
        if too_large:
            batch = max(min(batch, too_large - unit), fits + unit)
