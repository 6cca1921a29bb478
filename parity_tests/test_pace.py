"""A schedule goes on at the pace at which the program stepped it, or is refused with the counters.

The rates of the next 100 steps are torch's own, of a run that went on."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from flax_resblock import CheckpointError, InputError
from flax_resblock.checkpoint.torch_file import plain
from flax_resblock.runs.run import Run, read_run
from flax_resblock.runs.run_file import pack_run, run_entries, unpack_run
from flax_resblock.runs.ticks import BATCH, EPOCH, Counters, Unit, read_unit, unit_of, word_of
from flax_resblock.training.pace import Pace
from parity_tests.optimizer_runs import MAP, module_of

DONE, NEXT, PER_EPOCH = 60, 100, 12
LIMIT = 1e-12


class Stopped(NamedTuple):
    """A run in torch: what it saved after :data:`DONE` steps, and its next rates."""

    extras: dict[str, Any]
    rates: np.ndarray


def stopped(ticks: int, *, per_epoch: bool = False, skipped: int = 0, sgd: bool = False) -> Stopped:
    """A run whose scheduler is stepped ``ticks`` times per step, or once per epoch; loss scaling
    has skipped the first ``skipped`` steps of the optimizer."""
    parameters = list(module_of().parameters())
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.1)
    if sgd:
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.97)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    extras, rates = {}, []
    for step in range(DONE + NEXT):
        if step == DONE:
            states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            extras = json.loads(json.dumps({"epoch": DONE // PER_EPOCH}))
            extras |= plain({name: _copied(state) for name, state in states.items()})
        if step >= DONE:
            rates.append(optimizer.param_groups[0]["lr"])
        if step >= skipped and step < DONE:
            optimizer.step()
        for _ in range(ticks if not per_epoch or (step + 1) % PER_EPOCH == 0 else 0):
            scheduler.step()
    return Stopped(extras, np.array(rates))


def _copied(state: Any) -> Any:
    return torch.utils._pytree.tree_map(
        lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, state
    )


def rates_of(run: Run, count: int = NEXT) -> np.ndarray:
    pace = Pace.of(run, PER_EPOCH)
    assert pace.start == DONE
    return np.array([pace.rates(step).learning_rates[0] for step in range(DONE, DONE + count)])


def error(run: Run, truth: np.ndarray) -> float:
    return float(np.max(np.abs(rates_of(run, len(truth)) / truth - 1)))


RUNS = {
    **{f"{n} per step": (Unit(n), {"ticks": n}) for n in (1, 2, 4, 8)},
    "once per epoch": (EPOCH, {"ticks": 1, "per_epoch": True}),
    "3 steps skipped": (BATCH, {"ticks": 1, "skipped": 3}),
}
GUESSES = ("batch", "epoch", 2, 4, 8)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", RUNS)
def test_the_next_100_rates_are_torchs_and_every_wrong_guess_shows_a_thousandfold(name):
    unit, options = RUNS[name]
    extras, truth = stopped(**options)
    run = read_run(extras, MAP)
    assert run.schedule is not None, run.problem
    assert run.schedule.unit == unit
    assert error(run, truth) <= LIMIT
    (said,) = (entry.use for entry in run.found if entry.name == "scheduler")
    assert f", {unit} (" in said
    assert "optimizer updates, epoch 5" in said
    for guess in GUESSES:
        guessed = read_run(extras, MAP, schedule_unit=guess)
        right = unit_of(guess) == unit
        assert (
            (error(guessed, truth) <= LIMIT) if right else (error(guessed, truth) >= 1000 * LIMIT)
        )
    # the pace survives the way back, 30 steps later, in both formats
    later = Pace.of(run, PER_EPOCH).after(DONE + 30)
    for again in (
        read_run(run_entries(later, MAP), MAP),
        unpack_run(*pack_run(later, MAP), MAP),
    ):
        assert again.schedule == later.schedule
        pace = Pace.of(again, PER_EPOCH)
        assert pace.start == DONE + 30
        rates = [pace.rates(step).learning_rates[0] for step in range(DONE + 30, DONE + NEXT)]
        np.testing.assert_allclose(rates, truth[30:], rtol=LIMIT)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_sgd_which_counts_nothing_is_told_by_the_program_or_by_batch_norm():
    extras, truth = stopped(4, sgd=True)
    for more, batches in (({"global_step": DONE}, None), ({}, DONE)):
        run = read_run({**extras, **more}, MAP, batches=batches)
        assert run.schedule is not None
        assert run.schedule.unit == Unit(4)
        assert error(run, truth) <= LIMIT
    run = read_run(extras, MAP)
    assert run.schedule is None
    assert "stepped 240 times, and the file has epoch 5: that is neither" in (run.problem or "")
    assert "Say `schedule_unit='batch'`, `schedule_unit='epoch'` or" in (run.problem or "")


READ = {
    "one per batch": (100, Counters(100), BATCH),
    "a few skipped": (1003, Counters(1000, epochs=4), BATCH),
    "skipped at the start": (116, Counters(100), BATCH),
    "skipped, and the program counts all": (30, Counters(20, 30), BATCH),
    "saved before the scheduler's step": (99, Counters(100), BATCH),
    "four per step": (400, Counters(100), Unit(4)),
    "four per step, a few skipped": (400, Counters(97), Unit(4)),
    "two per step, though few": (8, Counters(4, 4), Unit(2)),
    "two per step, as batch norm says": (20, Counters(10, batches=10), Unit(2)),
    "Accelerate's, which waits for skipped steps": (400, Counters(100, 103), Unit(4)),
    "the program counts batches, four per step": (100, Counters(100, 400), BATCH),
    "per epoch": (5, Counters(500, epochs=5), EPOCH),
    "per epoch, by the number of the last": (5, Counters(500, epochs=4), EPOCH),
    "per epoch, uncounted": (5, Counters(500), EPOCH),
    "per epoch, pretrained batch norms": (5, Counters(batches=5000, epochs=5), EPOCH),
    "one step per epoch": (20, Counters(20, epochs=20), BATCH),
    "one batch per epoch": (20, Counters(batches=20, epochs=19), BATCH),
    "per epoch in the first": (0, Counters(7, epochs=0), EPOCH),
}
UNREADABLE = {
    "no whole number": (150, Counters(100), "100 optimizer updates: that is neither once"),
    "2 per step or skipped": (
        10,
        Counters(5),
        "fits 2 per optimizer step as well as one per batch",
    ),
    "2 per step or skipped, whose batches batch norm saw": (
        20,
        Counters(10, batches=20),
        "fits 2 per optimizer step as well as one per batch",
    ),
    "another optimizer's count": (
        1000,
        Counters(10, 1000),
        "100 per optimizer step as well as one",
    ),
    "every batch of four": (400, Counters(100, 400), "4 per optimizer step as well as one"),
    "four per epoch": (20, Counters(500, epochs=5), "500 optimizer updates, epoch 5: that is"),
    "nothing counted": (7, Counters(), "nothing else that was counted"),
    "nothing done": (0, Counters(0, 0, epochs=0), "0 optimizer updates, 0 steps by the program"),
    "epochs or the steps before": (10, Counters(11, epochs=10), "one per batch as well as one per"),
}


def test_counters_that_tell_are_read_and_those_that_do_not_are_shown():
    for name, (position, counters, unit) in READ.items():
        assert read_unit(position, counters, "run.pth") == unit, name
    for name, (position, counters, words) in UNREADABLE.items():
        with pytest.raises(CheckpointError, match=r"run\.pth was stepped") as caught:
            read_unit(position, counters, "run.pth")
        assert words in str(caught.value), (name, str(caught.value))
        assert "schedule_unit=" in str(caught.value)


def test_units_are_said_as_a_flag_says_them():
    for unit in (BATCH, EPOCH, Unit(4)):
        assert unit_of(word_of(unit)) == unit
    for word in ("", "0", "-4", "1.5", "epochs", "9" * 30):
        with pytest.raises(InputError, match="none of: batch, epoch, or the number"):
            unit_of(word)
