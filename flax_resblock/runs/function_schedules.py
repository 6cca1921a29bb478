"""Schedules whose functions are the program's own, in the states of torch's schedulers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax_resblock.errors import CheckpointError
from flax_resblock.runs.other_schedules import LambdaLR, LRLambda, MultiplicativeLR
from flax_resblock.runs.schedules import Options, Schedule, base_rate

_MOST_CALLS = 1 << 24
_NEAR = 1e-9
"""Relative difference between the closed form's rate and torch's own that rounding explains."""


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
