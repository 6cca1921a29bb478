"""Training goes on in the other framework as if nothing had happened."""

from dataclasses import dataclass, replace

import jax
import numpy as np
import optax
import pytest
import torch

from flax_resblock.checkpoint.torch_file import plain, with_tensors
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT, relative_l2
from flax_resblock.runs.optimizer_state import read_optimizer, write_optimizer
from flax_resblock.runs.scheduler_state import ScheduleState
from flax_resblock.runs.scheduler_writing import write_schedule
from flax_resblock.runs.schedules import Options, Schedule, base_rate
from parity_tests.optimizer_runs import (
    AFTER,
    BEFORE,
    MAP,
    RUNS,
    batches,
    gone_on,
    jax_steps,
    momentum_of,
    reference,
    run_of,
    set_up,
    torch_steps,
)
from parity_tests.support import fast_only, worst

FAST = {"sgd, two groups", "adamw, one cycle", "sgd, two rates down to one"}
"""Runs that are compared in every run of the tests; the others where there is time."""


each_run = pytest.mark.parametrize("name", fast_only(FAST, RUNS))


@each_run
def test_a_torch_run_goes_on_in_jax(name):
    history = reference(name, BEFORE + AFTER)
    for (ours, _, record), there in zip(gone_on(name), history[BEFORE:], strict=True):
        assert worst(ours, there.weights) <= TRAJECTORY_LIMIT
        expected = read_optimizer(there.optimizer, MAP)
        assert {key: set(found) for key, found in record.tensors.items()} == {
            key: set(found) for key, found in expected.tensors.items()
        }
        for key, found in expected.tensors.items():
            assert all(
                relative_l2(record.tensors[key][path], value) <= TRAJECTORY_LIMIT
                for path, value in found.items()
            )
        assert {path: float(step) for path, step in record.steps.items()} == {
            path: float(step) for path, step in expected.steps.items()
        }
        for group, truth in zip(record.groups, expected.groups, strict=True):
            assert group.options["lr"] == pytest.approx(truth.options["lr"], rel=1e-12)
            assert momentum_of(group) == pytest.approx(momentum_of(truth), rel=1e-12)


@each_run
def test_a_jax_run_goes_on_in_torch(name):
    history, back = reference(name, BEFORE + AFTER), 3
    weights, run, record = gone_on(name)[back - 1]
    module, optimizer, scheduler = set_up(name, seed=9)
    module.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=True
    )
    optimizer.load_state_dict(with_tensors(write_optimizer(record, MAP)))
    if scheduler is not None:
        scheduler.load_state_dict(
            write_schedule(run.schedule, [group.options for group in record.groups])
        )
    torch_steps(module, optimizer, scheduler, batches(BEFORE + AFTER)[BEFORE + back :])
    assert worst(plain(module.state_dict()), history[-1].weights) <= TRAJECTORY_LIMIT


def _with_optimizer(run, **changes):
    return replace(run, optimizer=replace(run.optimizer, **changes))


def _with_options(run, **options):
    return _with_optimizer(
        run,
        groups=tuple(
            replace(group, options={**group.options, **options}) for group in run.optimizer.groups
        ),
    )


def _with_schedule(run, schedule, position=BEFORE):
    return replace(run, schedule=ScheduleState(schedule, position))


@dataclass(frozen=True)
class OneShare(Schedule):
    """The share that the first group has, for all of them."""

    schedule: Schedule
    first: Options

    def rate(self, step, group, number=0):
        return base_rate(group) * self.schedule.rate(step, self.first) / base_rate(self.first)


def _one_share(run):
    return _with_schedule(run, OneShare(run.schedule.schedule, run.optimizer.groups[0].options))


def _changed(**fields):
    """The run with a schedule whose fields are others."""
    return lambda run: _with_schedule(run, replace(run.schedule.schedule, **fields))


CONTROLS = {
    "buffers dropped": (
        "sgd, two groups",
        lambda run: _with_optimizer(run, tensors={"momentum_buffer": {}}),
    ),
    "decay of the norms": ("sgd, two groups", lambda run: _with_options(run, weight_decay=5e-4)),
    "schedule off by one": (
        "sgd, two groups",
        lambda run: _with_schedule(run, run.schedule.schedule, BEFORE + 1),
    ),
    "no Nesterov": ("sgd, two groups", lambda run: _with_options(run, nesterov=False)),
    "momentum left as it was": ("sgd, one cycle", _changed(cycle_momentum=False)),
    "beta of Adam left as it was": ("adam, one cycle", _changed(cycle_momentum=False)),
    "beta of AdamW left as it was": ("adamw, one cycle", _changed(cycle_momentum=False)),
    "the first group's peak for both": (
        "adamw, one cycle",
        lambda run: _with_options(run, max_lr=0.002, initial_lr=0.002 / 25, min_lr=0.002 / 25e4),
    ),
    "one rate for both": (
        "sgd, two rates in steps",
        lambda run: _with_options(run, initial_lr=0.03),
    ),
    "steps of another length": ("sgd, two rates in steps", _changed(step_size=4)),
    "one share of the rate for both groups": ("sgd, two rates down to one", _one_share),
    "no floor under the cosine": ("sgd, two rates down to one", _changed(eta_min=0.0)),
}


def largest_error(name, change, optimizer=None):
    history = reference(name, BEFORE + AFTER)
    start = history[BEFORE - 1]
    steps = jax_steps(
        start.weights,
        change(run_of(start, BEFORE)),
        batches(BEFORE + AFTER)[BEFORE:],
        optimizer=optimizer,
    )
    return max(
        worst(ours, there.weights)
        for (ours, *_), there in zip(steps, history[BEFORE:], strict=True)
    )


OFTEN = {"buffers dropped", "decay of the norms", "schedule off by one"}
OFTEN |= {"beta of AdamW left as it was", "one share of the rate for both groups"}


@pytest.mark.parametrize("control", fast_only(OFTEN, CONTROLS))
def test_what_is_carried_over_wrongly_shows_a_thousandfold(control):
    assert largest_error(*CONTROLS[control]) >= 1000 * TRAJECTORY_LIMIT


def at_the_first_rate(*direction):
    """Transformations as an optimizer: all parameters take the first group's learning rate."""
    chained = optax.chain(*direction)

    def update(updates, state, params=None, *, learning_rates, **_):
        updates, state = chained.update(updates, state, params)
        return jax.tree.map(lambda update: -learning_rates[0] * update, updates), state

    return optax.GradientTransformationExtraArgs(chained.init, update)


def kernels(tree):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(getattr(key, "key", None) == "kernel" for key in path), tree
    )


@pytest.mark.slow
def test_decay_after_the_momentum_shows_a_thousandfold():
    momentum, decay = optax.trace(0.9, nesterov=True), optax.add_decayed_weights(5e-4, mask=kernels)
    right, late = (
        largest_error("sgd, two groups", lambda run: run, at_the_first_rate(*order))
        for order in ((decay, momentum), (momentum, decay))
    )
    assert right <= TRAJECTORY_LIMIT  # the wrapper spoils nothing by itself
    assert late >= 1000 * TRAJECTORY_LIMIT


@pytest.mark.slow
def test_one_share_of_the_rate_is_right_where_the_schedule_has_no_floor():
    """What spoils the control is the floor, not the wrapper."""
    assert largest_error("sgd, two rates in steps", _one_share) <= TRAJECTORY_LIMIT
