"""Schedules of PyTorch that keep more than their own few numbers: restarts, cycles, products, and
functions of the program's own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flax_resblock.errors import CheckpointError
from flax_resblock.runs.schedules import CosineAnnealingLR, Options, Scaled, Schedule, base_rate

LRLambda = Callable[[int], float] | Sequence[Callable[[int], float]]
"""The function of a LambdaLR or MultiplicativeLR, or one per param group."""
_MOST_CALLS = 1 << 24
_NEAR = 1e-9
"""Relative difference between the closed form's rate and torch's own that rounding explains."""


@dataclass(frozen=True)
class CosineAnnealingWarmRestarts(Schedule):
    """Half a cosine down to ``eta_min`` in ``T_0`` steps, and again, ``T_mult`` times as long.

    Reference: Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    T_0: int
    T_mult: int
    eta_min: float

    def since(self, step: int) -> tuple[int, int]:
        """Steps since the last restart, and from there to the next: torch's ``T_cur``, ``T_i``."""
        length = self.T_0
        if self.T_mult == 1:
            return step % length, length
        while step >= length:
            step, length = step - length, length * self.T_mult
        return step, length

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        now, length = self.since(step)
        height = base_rate(group) - self.eta_min
        return self.eta_min + height * (1 + math.cos(math.pi * now / length)) / 2


@dataclass(frozen=True)
class CyclicLR(Schedule):
    """Up to a peak and down again, over and over; the momentum goes the other way.

    Attributes:
      base_lrs, max_lrs: Lowest and highest rate, one per param group.
      total_size: Steps of a cycle.
      step_ratio: Share of the cycle that goes up.
      mode: ``"triangular"``, ``"triangular2"`` (half as high each time) or ``"exp_range"``.
      gamma: Of ``"exp_range"``.
      scale_mode: As torch stores it.
      cycle_momentum, use_beta1: As in :class:`~flax_resblock.runs.schedules.OneCycleLR`.
      base_momentums, max_momentums: Empty unless the momentum moves.
    Reference: Smith 2017, arXiv:1506.01186.
    """

    base_lrs: tuple[float, ...]
    max_lrs: tuple[float, ...]
    total_size: float
    step_ratio: float
    mode: str
    gamma: float
    scale_mode: str
    cycle_momentum: bool
    use_beta1: bool = False
    base_momentums: tuple[float, ...] = ()
    max_momentums: tuple[float, ...] = ()

    def _height(self, step: int) -> float:
        """Share of the way up."""
        cycle = math.floor(1 + step / self.total_size)
        x = 1.0 + step / self.total_size - cycle
        rising = x <= self.step_ratio
        share = x / self.step_ratio if rising else (x - 1) / (self.step_ratio - 1)
        scales = {
            "triangular": lambda: 1.0,
            "triangular2": lambda: 1 / 2.0 ** (cycle - 1),
            "exp_range": lambda: self.gamma**step,
        }
        return share * scales[self.mode]()

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        low = self.base_lrs[number]
        return low + (self.max_lrs[number] - low) * self._height(step)

    def momentum(self, step: int, group: Options, number: int = 0) -> float | None:
        if not self.cycle_momentum:
            return None
        high = self.max_momentums[number]
        return high - (high - self.base_momentums[number]) * self._height(step)


@dataclass(frozen=True)
class ChainedScheduler(Schedule):
    """The product of several schedules: each multiplies the rate that the others left."""

    schedules: tuple[Schedule, ...]

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        base = base_rate(group)
        return base * math.prod(part.rate(step, group, number) / base for part in self.schedules)

    @property
    def length(self) -> int | None:
        return min((n for part in self.schedules if (n := part.length) is not None), default=None)

    @property
    def end(self) -> int | None:
        # torch climbs again from 0 by a sum, which is no product
        cosines = (part for part in self.schedules if isinstance(part, CosineAnnealingLR))
        return min((part.T_max for part in cosines), default=None)


def chains(schedule: Schedule) -> bool:
    """Whether a schedule multiplies the last rate, whatever changed it."""
    cosine = isinstance(schedule, CosineAnnealingLR) and not schedule.eta_min
    return isinstance(schedule, Scaled) or cosine


@dataclass(frozen=True)
class LambdaLR(Schedule):
    """The base rate times a function of the program's own, one per param group. ``states`` are what
    torch keeps of each: None of a function, the attributes of an object."""

    functions: tuple[Callable[[int], float], ...]
    states: tuple[Mapping[str, Any] | None, ...] = ()

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        return base_rate(group) * float(self.functions[number](step))


@dataclass(frozen=True)
class MultiplicativeLR(LambdaLR):
    """The base rate times the values of a function at every step from 1."""

    _products: dict[tuple[int, int], float] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def rate(self, step: int, group: Options, number: int = 0) -> float:
        known = self._products
        first = next((n for n in range(step, 0, -1) if (number, n) in known), 0)
        product = known.get((number, first), 1.0)
        for n in range(first + 1, step + 1):
            product = known[number, n] = product * float(self.functions[number](n))
        return base_rate(group) * product


def misfits(schedule: Schedule, position: int, groups: Sequence[Options]) -> Iterator[int]:
    """The numbers of the param groups whose rate is not the schedule's."""
    for number, group in enumerate(groups):
        expected, found = schedule.rate(position, group, number), float(group["lr"])
        if not abs(expected - found) <= _NEAR * max(abs(expected), base_rate(group)):
            yield number


def of_functions(
    state: Mapping[str, Any], groups: Sequence[Options], lr_lambda: LRLambda | None, source: str
) -> Schedule:
    """A LambdaLR or MultiplicativeLR: whichever gives the rates that the optimizer has."""
    if lr_lambda is None:
        raise CheckpointError(
            f"{source}: LambdaLR (or MultiplicativeLR) keeps its function in the program, not in "
            "the file. Name it with `lr_lambda=FUNCTION`."
        )
    functions = tuple(lr_lambda) if isinstance(lr_lambda, Sequence) else (lr_lambda,) * len(groups)
    if len(functions) != len(groups):
        raise CheckpointError(
            f"{source} has {len(groups)} param groups, and lr_lambda {len(functions)} functions. "
            "Give one for all, or one for each."
        )
    states, position = tuple(state["lr_lambdas"]), int(state["last_epoch"])
    if position > _MOST_CALLS:
        raise CheckpointError(
            f"{source} was stepped {position} times, more often than a function is called here."
        )
    both = LambdaLR(functions, states), MultiplicativeLR(functions, states)
    fitting = [one for one in both if next(misfits(one, position, groups), None) is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CheckpointError(
            f"{source}: at its step {position}, the function is that of a LambdaLR as well as of a "
            "MultiplicativeLR. Save the run a few steps later."
        )
    words = [f"{one.rate(position, groups[0]):.9g} as {type(one).__name__}" for one in both]
    raise CheckpointError(
        f"{source}: at its step {position} the function gives param group 0 the learning rate "
        f"{' and '.join(words)}, but the optimizer has {float(groups[0]['lr']):.9g}. It is "
        "another function, or the rate was changed by other means."
    )


def ended(part: Mapping[str, Any]) -> Schedule:
    """A LambdaLR or MultiplicativeLR of a sequence that has gone on to the next: nothing asks for
    more than the rates that it ended with."""
    pairs = zip(part["_last_lr"], part["base_lrs"], strict=True)
    factors = [float(last) / float(base) if base else 1.0 for last, base in pairs]
    functions = tuple(lambda step, factor=factor: factor for factor in factors)
    return LambdaLR(functions, tuple(part["lr_lambdas"]))
