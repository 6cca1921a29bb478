"""ReduceLROnPlateau: torch's rates and state after any metrics, from wherever a run is taken."""

from __future__ import annotations

import copy
import math
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

from flax_resblock import InputError, load_run, training
from flax_resblock.checkpoint.torch_file import plain
from flax_resblock.runs.run import read_run
from flax_resblock.runs.run_file import pack_run, run_entries, unpack_run
from flax_resblock.training.pace import Pace
from flax_resblock.training.reports import EvaluationReport
from parity_tests import runs
from parity_tests.optimizer_runs import MAP, by_ndim, module_of

CASES: dict[str, dict[str, Any]] = {
    "loss": {"factor": 0.5, "patience": 1, "cooldown": 1, "min_lr": [0.01, 0.02]},
    "loss, absolute": {"factor": 0.3, "patience": 0, "threshold": 0.05, "threshold_mode": "abs"},
    "accuracy": {"mode": "max", "factor": 0.5, "patience": 2, "eps": 0.01},
    "percent, absolute": {"mode": "max", "patience": 0, "threshold": 2, "threshold_mode": "abs"},
}


@pytest.mark.parametrize("name", CASES)
def test_the_rates_after_any_metrics_are_torchs_and_so_is_the_state(name):
    optimizer = torch.optim.SGD(by_ndim(module_of(), True), lr=0.1, momentum=0.9)
    optimizer.param_groups[1]["lr"] = 0.07
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scheduler = ReduceLROnPlateau(optimizer, **CASES[name])
    metrics = np.random.default_rng(3).uniform(0.4, 0.6, 24) - 0.004 * np.arange(24)
    scale = 100 if "percent" in name else 1

    def extras(epoch: int) -> dict[str, Any]:
        states = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
        return {"epoch": epoch, **copy.deepcopy(plain(states))}

    pace, rates = None, set()
    for epoch, metric in enumerate(metrics.tolist(), 1):
        scheduler.step(scale * metric)
        there = [group["lr"] for group in optimizer.param_groups]
        rates.add(tuple(there))
        if pace is not None:
            pace = pace.seeing(EvaluationReport(epoch * 5, epoch, metric, metric))
            assert pace.rates(epoch * 5).learning_rates.tolist() == there
            written = run_entries(pace.after(epoch * 5), MAP)
            assert written["lr_scheduler"] == scheduler.state_dict()
            assert written["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
        run = read_run(extras(epoch), MAP)
        assert run.schedule is not None, run.problem
        assert unpack_run(*pack_run(run, MAP), MAP).schedule == run.schedule
        if epoch % 7 == 1:
            pace = Pace.of(run, 5)
    assert len(rates) > 3
    spoiled = extras(24)
    spoiled["optimizer"]["param_groups"][0]["lr"] *= 1.01
    assert "changed by other means" in (read_run(spoiled, MAP).problem or "")
    spoiled = {**extras(24), "epoch": 7}
    assert "stepped 24 times" in (read_run(spoiled, MAP).problem or "")


def test_the_loop_steps_it_by_the_test_loss_after_each_epoch(tmp_path):
    run = runs.started(runs.momentum_sgd(runs.by_kind), None).epochs(1)
    assert run.optimizer.param_groups[0]["lr"] == 0.05
    scheduler = ReduceLROnPlateau(run.optimizer, factor=0.5, patience=0, threshold=0.9)
    scheduler.step(math.inf)  # no improvement, and no patience
    first = 0.025
    run.scheduler = scheduler  # type: ignore[assignment]
    path = runs.torchvision_reference(run, tmp_path)
    data = runs.few_digits()
    with jax.enable_x64(True):
        model, carried = load_run(path, assume="known")
        config = runs.config(epochs=4)
        with pytest.raises(InputError, match="stepped by what is measured on the test images"):
            training.fit(model, data, config, run=carried, progress=False)
        history = training.fit(model, data, config, test=data, run=carried, progress=False)
    losses = [evaluation.loss for evaluation in history.evaluations]
    for loss in losses:
        scheduler.step(loss)
    assert len(losses) == 3
    assert history.run is not None
    last = [group.options["lr"] for group in history.run.optimizer.groups]
    assert last == [group["lr"] for group in run.optimizer.param_groups]
    assert last[0] < first
    assert history.run.schedule is not None
    assert history.run.schedule.schedule.best == scheduler.best  # type: ignore[attr-defined]
    assert history.run.schedule.position == 4
    rates = [step.learning_rate for step in history.steps]
    assert rates[: runs.STEPS] == [first] * runs.STEPS  # until the first evaluation
    assert rates[runs.STEPS :] != rates[: 2 * runs.STEPS]
