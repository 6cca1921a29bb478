"""timm's schedules go on at timm's own rates, from their states and from its script's arguments."""

import argparse
import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from flax_resblock import CheckpointError, load_run
from flax_resblock.runs.scheduler_state import ScheduleState, read_schedule
from flax_resblock.runs.scheduler_writing import write_schedule
from flax_resblock.runs.ticks import BATCH, EPOCH, Counters
from flax_resblock.runs.timm_schedules import fitting, located
from flax_resblock.runs.timm_script import of_script
from parity_tests import runs
from parity_tests.families import import_timm
from parity_tests.schedulers import LIMIT, two_rates

STEPS = 30
WARM = {"warmup_epochs": 4, "warmup_lr": 1e-4}
SCRIPTS = {
    "cosine": {**WARM, "epochs": 20, "min_lr": 1e-3, "cooldown_epochs": 5},
    "cosine, cycles": {"sched": "cosine", "epochs": 5, "lr_cycle_limit": 3, "lr_cycle_mul": 2.0},
    "cosine, prefix": {**WARM, "sched": "cosine", "epochs": 20, "warmup_prefix": True},
    "cosine, k-decay": {**WARM, "sched": "cosine", "epochs": 20, "lr_k_decay": 1.5},
    "tanh": {**WARM, "epochs": 20, "min_lr": 1e-3, "lr_cycle_decay": 0.5, "lr_cycle_limit": 2},
    "poly": {**WARM, "epochs": 20, "decay_rate": 2.0},
    "step": {**WARM, "epochs": 20, "decay_epochs": 3, "decay_rate": 0.7},
    "multistep": {**WARM, "epochs": 20, "decay_milestones": [7, 9, 20], "decay_rate": 0.3},
    "constant": {**WARM, "epochs": 20},
}


def arguments_of(name):
    return {"sched": name, "warmup_epochs": 0, "warmup_lr": 0.0, **SCRIPTS[name]}


def walked(arguments, updates_per_epoch=0):
    """timm's scheduler, and the param groups before each of its steps."""
    optimizer = two_rates()
    optimizer.param_groups[1]["lr_scale"] = 0.5
    import_timm()
    scheduler = importlib.import_module("timm.scheduler")
    made, epochs = scheduler.create_scheduler(
        SimpleNamespace(**arguments), optimizer, updates_per_epoch
    )
    step = made.step_update if arguments.get("sched_on_updates") else made.step
    moments = []
    for t in range(STEPS):
        step(t)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        moments.append(groups)
    return made, moments, epochs


def deviation(schedule, moments, start):
    return max(
        abs(schedule.rate(step, group, n) - moments[step][n]["lr"]) / group["initial_lr"]
        for step in range(start, STEPS)
        for n, group in enumerate(moments[start])
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_state_and_the_arguments_give_timms_rates(name):
    arguments = arguments_of(name)
    made, moments, epochs = walked(arguments)
    for start in (1, 3, 6, 12):
        groups = moments[start]
        state = {**made.state_dict(), "last_epoch": start}
        schedule, position = read_schedule(state, groups)
        assert position == start
        assert deviation(schedule, moments, start) <= LIMIT
        late = [schedule.rate(start + 1, group, n) for n, group in enumerate(groups)]
        if late != [group["lr"] for group in groups]:
            assert fitting(schedule, groups, [start, start + 1]) == [start]
        back = json.loads(json.dumps(write_schedule(ScheduleState(schedule, start), groups)))
        assert back == {**json.loads(json.dumps(made.state_dict())), "last_epoch": start}
        for saved in (start - 1, start):  # the script saves the rates of the last epoch
            found = of_script(arguments, Counters(), start, moments[saved], "x")
            assert (found[0], found[1:]) == (schedule, (start, epochs))


def test_updates_are_counted_by_what_the_optimizer_or_the_norms_have_seen():
    arguments = {**arguments_of("cosine"), "epochs": 6, "warmup_epochs": 1}
    arguments |= {"sched_on_updates": True, "sched": "cosine"}
    made, moments, _ = walked(arguments, 5)
    for counters in (Counters(updates=10), Counters(batches=10)):
        schedule, position, total = of_script(arguments, counters, 2, moments[10], "x")
        assert (position, schedule.unit, total) == (10, BATCH, 11)
        assert deviation(schedule, moments, 10) <= LIMIT
    with pytest.raises(CheckpointError, match="does not say how many an epoch has"):
        of_script(arguments, Counters(updates=11), 2, moments[10], "x")
    found = located(made.state_dict(), Counters(steps=10, epochs=1), moments[10], "x")
    assert found["last_epoch"] == 10


def test_a_position_that_the_rates_do_not_leave_is_refused():
    made, moments, _ = walked(arguments_of("step"))
    state = made.state_dict()
    assert located(state, Counters(epochs=2), moments[3], "x")["last_epoch"] == 3
    assert read_schedule(located(state, Counters(epochs=3), moments[3], "x"), moments[3])[0]
    assert read_schedule({**state, "last_epoch": 3}, moments[3])[0].unit == EPOCH
    with pytest.raises(CheckpointError, match="that fits 7 steps as well as 8"):
        located(state, Counters(epochs=7), moments[7], "x")
    with pytest.raises(CheckpointError, match="epoch 9: that fits none"):
        located(state, Counters(epochs=9), moments[3], "x")
    with pytest.raises(CheckpointError, match="as the script's arguments have it, gives"):
        of_script(arguments_of("step"), Counters(), 12, moments[3], "x")


REFUSED = {
    "timm's schedule 'wsd' has no counterpart": {"sched": "wsd"},
    "adds noise to the learning rates": {"lr_noise": [0.4, 0.9]},
}


def test_what_has_no_counterpart_is_refused():
    arguments = arguments_of("cosine")
    made, moments, _ = walked(arguments)
    for words, change in REFUSED.items():
        with pytest.raises(CheckpointError, match=words):
            of_script({**arguments, **change}, Counters(), 3, moments[3], "x")
    good = {**made.state_dict(), "last_epoch": 3}
    changes = {
        "adds noise": {"noise_range_t": [3, 4]},
        "scales the learning rates": {"base_values": [1.0, 2.0]},
        "has a warm-up by": {"warmup_steps": [1.0, 2.0]},
        "without counterpart here": {"decay_t": 3},
    }
    for words, change in changes.items():
        with pytest.raises(CheckpointError, match=words):
            read_schedule({**good, **change}, moments[3])


@pytest.mark.filterwarnings("ignore")
def test_timms_own_files_of_what_cannot_go_on_say_so(tmp_path):
    """timm's CheckpointSaver, schedulers and ModelEmaV3 write them."""
    import_timm()
    made, utils = (importlib.import_module(f"timm.{name}") for name in ("scheduler", "utils"))
    common = {"epochs": 6, "warmup_epochs": 1, "warmup_lr": 1e-4, "model": "resnet8"}

    def saved(**more):
        run = runs.started(runs.adamw(runs.no_bias_decay), None)
        arguments = SimpleNamespace(**common, **more)
        scheduler, _ = made.create_scheduler(arguments, run.optimizer)
        average = utils.ModelEmaV3(run.model, decay=0.9, use_warmup=True)
        run.epochs(1, after_step=lambda: average.update(run.model, step=run.step))
        scheduler.step(1, 0.5)
        one = argparse.Namespace(**vars(arguments))
        saver = utils.CheckpointSaver(
            run.model, run.optimizer, one, average, checkpoint_dir=str(tmp_path)
        )
        saver.save_checkpoint(0, metric=0.5)
        content = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
        content |= {"lr_scheduler": scheduler.state_dict(), "epoch": 0, "step": run.step}
        torch.save(content, tmp_path / "plain.pth")
        return [load_run(tmp_path / name)[1] for name in ("last.pth.tar", "plain.pth")]

    script, plain = saved(sched="plateau")
    assert "timm does not store what it has counted" in script.problem
    assert "neither its factor nor its patience" in plain.problem
    for run in saved(sched="cosine", lr_noise=[0.1, 0.9]):
        assert "adds noise to the learning rates" in run.problem
    script, plain = saved(
        sched="cosine", model_ema=True, model_ema_decay=0.9, model_ema_warmup=True
    )
    (kept,) = (entry for entry in script.found if entry.name == "state_dict_ema")
    assert (script.problem, kept.status, "ema" in script.settings) == (None, "kept", False)
    assert "their decay warms up by the step (model_ema_warmup)" in kept.use
