"""Schedulers that cannot be carried over, and damaged ones, are refused with the reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as torch_schedules
from torch.optim.lr_scheduler import ConstantLR, ExponentialLR, LRScheduler, OneCycleLR

from flax_resblock import CheckpointError
from flax_resblock.runs.scheduler_state import read_schedule
from flax_resblock.runs.schedules import Options
from parity_tests.schedulers import (
    LINEAR,
    SCHEDULERS,
    chain,
    options_of,
    sequence,
    two_rates,
    walked,
)

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


def lambda_lr(optimizer: torch.optim.Optimizer) -> LRScheduler:
    return torch_schedules.LambdaLR(optimizer, lambda step: 0.9**step)


def by_fractions(optimizer: torch.optim.Optimizer) -> LRScheduler:
    scheduler = torch_schedules.CosineAnnealingWarmRestarts(optimizer, T_0=4)
    scheduler.step(2.5)  # type: ignore[arg-type]
    return scheduler


class Held(LRScheduler):
    """Exponential, after a while."""

    def __init__(self, optimizer: torch.optim.Optimizer, gamma: float = 0.9, hold: int = 3) -> None:
        self.gamma, self.hold = gamma, hold
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        return [base * self.gamma ** max(0, self.last_epoch - self.hold) for base in self.base_lrs]


REFUSED: dict[str, tuple[Callable[[torch.optim.Optimizer], Any], str]] = {
    "LambdaLR": (
        lambda_lr,
        r"LambdaLR \(or MultiplicativeLR\) keeps its function in the program, not in the file",
    ),
    "LambdaLR after a warm-up": (
        sequence([5], LINEAR, lambda_lr),
        "a LambdaLR that is still to come inside a SequentialLR",
    ),
    "restarts by fractions of an epoch": (
        by_fractions,
        r"is 2\.5 steps after its last restart, of 4, at its step 2\. It was stepped by fractions",
    ),
    "CyclicLR with a function": (
        partial(
            torch_schedules.CyclicLR,
            base_lr=0.1,
            max_lr=0.4,
            scale_fn=lambda x: 0.5,
            scale_mode="iterations",
        ),
        "a CyclicLR with a scale_fn of the program's own",
    ),
    "a chain of what does not multiply": (
        chain(LINEAR, partial(torch_schedules.CosineAnnealingLR, T_max=9, eta_min=0.01)),
        "a CosineAnnealingLR inside a ChainedScheduler",
    ),
    "a chain of cycles": (
        chain(partial(OneCycleLR, max_lr=1.0, total_steps=10), LINEAR),
        "a OneCycleLR inside a ChainedScheduler",
    ),
    "SWALR": (partial(torch.optim.swa_utils.SWALR, swa_lr=0.01), "SWALR has no counterpart here"),
    "a sequence in a sequence": (
        sequence([8], sequence([2], LINEAR, partial(ConstantLR, total_iters=3)), LINEAR),
        "a sequence or chain inside a SequentialLR",
    ),
    "a constant of no steps after a warm-up": (
        sequence([5], LINEAR, partial(ConstantLR, total_iters=0)),
        "a ConstantLR of 0 steps after another",
    ),
    "a scheduler of one's own with torch's field": (
        Held,
        "no learning-rate scheduler with a counterpart here: it has gamma, hold",
    ),
    "another object's state": (
        lambda optimizer: optimizer,
        "no learning-rate scheduler with a counterpart here: it has param_groups, state",
    ),
}


def assert_refused(state: Any, groups: list[Options], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        read_schedule(state, groups, source="run.pth, entry 'scheduler'")
    assert str(caught.value).startswith("run.pth, entry 'scheduler'")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_a_scheduler_without_counterpart_is_refused_by_name(name):
    make, words = REFUSED[name]
    optimizer = two_rates()
    assert_refused(make(optimizer).state_dict(), options_of(optimizer), words)


def test_rates_that_the_scheduler_did_not_begin_with_are_refused():
    optimizer = two_rates()
    state = ExponentialLR(optimizer, 0.9).state_dict()
    groups = [{**group, "initial_lr": 0.5, "lr": 0.5} for group in options_of(optimizer)]
    words = (
        r"scales the learning rates \[0\.1, 0\.03\], but the optimizer began with \[0\.5, 0\.5\]"
    )
    assert_refused(state, groups, words)


def test_a_rate_changed_by_hand_is_refused_with_both_rates():
    state, groups = walked(SCHEDULERS["step"])[8]
    changed = [groups[0], {**groups[1], "lr": 0.07}]
    words = (
        "gives param group 1 the learning rate 0.015 at its step 8, but the optimizer has 0.07: it "
        "was changed by other means"
    )
    assert_refused(state, changed, words)
    slightly = [{**group, "lr": group["lr"] * (1 + 1e-7)} for group in groups]
    assert_refused(state, slightly, "changed by other means than the schedule")


DAMAGED: list[tuple[str, dict[str, Any], str]] = [
    ("step", {"last_epoch": None}, "no complete state of a learning-rate scheduler .TypeError"),
    ("step", {"last_epoch": math.nan}, "no complete state"),
    ("step", {"step_size": "7"}, r"no complete state .* \(TypeError"),
    ("step", {"step_size": 0}, r"no complete state .* \(ZeroDivisionError"),
    ("step", {"gamma": 0.4}, "changed by other means"),
    ("exponential", {"gamma": math.nan}, "the learning rate nan at its step 9"),
    ("exponential", {"last_epoch": 12}, "at its step 12, but the optimizer has"),
    ("multi-step, one milestone twice", {"milestones": [4, 11]}, "no complete state"),
    ("cosine down to 0", {"T_max": 0}, "no complete state"),
    ("one cycle", {"_schedule_phases": []}, "no complete state .*at least one phase"),
    ("one cycle", {"_anneal_func_type": "exp"}, "no complete state .*exp"),
    ("warm-up, cosine", {"_schedulers": 3}, "no complete state"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGED)
def test_a_damaged_state_is_refused(name, damage, words):
    state, groups = walked(SCHEDULERS[name])[9]
    read_schedule(state, groups)
    assert_refused({**state, **damage}, groups, words)


def test_what_is_missing_from_a_state_is_named():
    state, groups = walked(SCHEDULERS["step"])[9]
    without = {key: value for key, value in state.items() if key != "last_epoch"}
    assert_refused(without, groups, "no complete state .* .KeyError: 'last_epoch'")
    bare = {key: value for key, value in state.items() if key not in ("gamma", "step_size")}
    assert_refused(bare, groups, "no learning-rate scheduler with a counterpart here")
    state, groups = walked(SCHEDULERS["warm-up, cosine"])[9]
    state["_schedulers"].pop()
    assert_refused(state, groups, r"no complete state .* \(IndexError")
    state, groups = walked(SCHEDULERS["one cycle"])[9]
    unscaled = [{name: value for name, value in g.items() if name != "max_lr"} for g in groups]
    assert_refused(state, unscaled, "no complete state .*max_lr")
    del state["_schedule_phases"][1]["end_lr"]
    assert_refused(state, groups, "no complete state .*end_lr")
