"""Every scheduler of torch that a run can have, and what torch does with it step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
    StepLR,
)

from flax_resblock.runs.schedules import Options

STEPS = 40
LOWEST = 0.03
"""The second group's rate."""
LIMIT = 1e-12
"""Relative to a group's base rate; a momentum's is absolute."""
CONTROL = 1000 * LIMIT

Make = Callable[[torch.optim.Optimizer], LRScheduler]


KINDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adamw": torch.optim.AdamW,
}


def two_rates(kind: str = "sgd") -> torch.optim.Optimizer:
    """Two param groups of different rates."""
    return KINDS[kind](
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))]},
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": LOWEST},
        ],
        lr=0.1,
    )


def sequence(milestones: list[int], *parts: Make) -> Make:
    return lambda optimizer: SequentialLR(
        optimizer, [part(optimizer) for part in parts], milestones
    )


def chain(*parts: Make) -> Any:
    return lambda optimizer: ChainedScheduler([part(optimizer) for part in parts])


LINEAR = partial(LinearLR, start_factor=0.1, total_iters=5)

SCHEDULERS: dict[str, Make] = {
    "step": partial(StepLR, step_size=7, gamma=0.5),
    "multi-step, one milestone twice": partial(MultiStepLR, milestones=[4, 11, 11, 25], gamma=0.3),
    "constant": partial(ConstantLR, factor=0.2, total_iters=6),
    "constant for ever": partial(ConstantLR, factor=0.2, total_iters=0),
    "linear up": LINEAR,
    "linear down": partial(LinearLR, start_factor=0.9, end_factor=0.1, total_iters=30),
    "exponential": partial(ExponentialLR, gamma=0.9),
    "multi-step from the start": partial(MultiStepLR, milestones=[0, 4], gamma=0.3),
    "polynomial": partial(PolynomialLR, total_iters=17, power=2.5),
    "cosine down and up again": partial(CosineAnnealingLR, T_max=12, eta_min=0.002),
    "cosine down to 0": partial(CosineAnnealingLR, T_max=STEPS),
    "one cycle": partial(OneCycleLR, max_lr=0.5, total_steps=STEPS),
    "one cycle, a peak per group": partial(
        OneCycleLR,
        max_lr=[0.5, 0.2],
        total_steps=STEPS,
        base_momentum=[0.8, 0.7],
        max_momentum=[0.9, 0.99],
    ),
    "one cycle, three phases": partial(OneCycleLR, max_lr=0.5, total_steps=STEPS, three_phase=True),
    "one cycle, linear": partial(
        OneCycleLR,
        max_lr=[0.5, 0.2],
        total_steps=STEPS,
        anneal_strategy="linear",
        pct_start=0.25,
        div_factor=7.0,
    ),
    "one cycle, three linear phases": partial(
        OneCycleLR, max_lr=0.5, total_steps=STEPS, three_phase=True, anneal_strategy="linear"
    ),
    "one cycle, momentum fixed": partial(
        OneCycleLR, max_lr=[0.5, 0.2], total_steps=STEPS, cycle_momentum=False
    ),
    "warm-up, cosine": sequence([5], LINEAR, partial(CosineAnnealingLR, T_max=20, eta_min=0.001)),
    "warm-up, cosine, constant": sequence(
        [5, 25],
        LINEAR,
        partial(CosineAnnealingLR, T_max=20),
        partial(ConstantLR, factor=0.01, total_iters=10),
    ),
    "warm-up cut short, step": sequence([3], LINEAR, partial(StepLR, step_size=6, gamma=0.4)),
    "warm-up, multi-step": sequence(
        [5],
        partial(ConstantLR, factor=0.1, total_iters=5),
        partial(MultiStepLR, milestones=[6, 15], gamma=0.2),
    ),
    "warm-up, exponential": sequence([8], LINEAR, partial(ExponentialLR, gamma=0.95)),
    "warm-up, polynomial": sequence([5], LINEAR, partial(PolynomialLR, total_iters=20)),
    "a sequence of one": sequence([], partial(StepLR, step_size=7)),
    "restarts": partial(CosineAnnealingWarmRestarts, T_0=7, eta_min=0.002),
    "restarts, ever longer": partial(CosineAnnealingWarmRestarts, T_0=3, T_mult=2),
    "warm-up, restarts": sequence(
        [5], LINEAR, partial(CosineAnnealingWarmRestarts, T_0=4, T_mult=3)
    ),
    "triangles": partial(
        CyclicLR, base_lr=[0.1, LOWEST], max_lr=0.4, step_size_up=6, step_size_down=3
    ),
    "triangles, ever lower": partial(
        CyclicLR,
        base_lr=[0.1, LOWEST],
        max_lr=[0.5, 0.2],
        step_size_up=5,
        mode="triangular2",
        base_momentum=[0.8, 0.7],
        max_momentum=[0.9, 0.95],
    ),
    "triangles, exponential": partial(
        CyclicLR,
        base_lr=[0.1, LOWEST],
        max_lr=0.4,
        step_size_up=4,
        mode="exp_range",
        gamma=0.97,
        cycle_momentum=False,
    ),
    "a chain, warm-up times exponential": chain(LINEAR, partial(ExponentialLR, gamma=0.9)),
    "a chain, warm-up times cosine": chain(
        partial(ConstantLR, factor=0.2, total_iters=6),
        partial(MultiStepLR, milestones=[4, 11], gamma=0.3),
        partial(CosineAnnealingLR, T_max=50),
    ),
    "warm-up, one cycle": sequence(
        [8], LINEAR, partial(OneCycleLR, max_lr=[0.6, 0.9], total_steps=32)
    ),
    "warm-up, step, one cycle": sequence(
        [5, 16],
        LINEAR,
        partial(StepLR, step_size=7),
        partial(OneCycleLR, max_lr=[0.6, 0.9], total_steps=24),
    ),
    "a cycle, then steps": sequence(
        [11], partial(OneCycleLR, max_lr=[0.6, 0.9], total_steps=10), partial(StepLR, step_size=7)
    ),
}


class Moment(NamedTuple):
    """A scheduler's state dict and the optimizer's param groups at one step."""

    state: dict[str, Any]
    groups: list[Options]


def options_of(optimizer: torch.optim.Optimizer) -> list[Options]:
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def walked(make: Make, kind: str = "sgd", steps: int = STEPS) -> list[Moment]:
    """torch at every step from 0 to ``steps``."""
    optimizer = two_rates(kind)
    scheduler = make(optimizer)
    moments = [Moment(copy.deepcopy(scheduler.state_dict()), options_of(optimizer))]
    for _ in range(steps):
        scheduler.step()
        moments.append(Moment(copy.deepcopy(scheduler.state_dict()), options_of(optimizer)))
    return moments
