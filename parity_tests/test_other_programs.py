"""Files in the documented form of programs that the tests do not install are the same run."""

import copy
import json
import math
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from flax_resblock import CheckpointError, load_run
from flax_resblock.runs.mmengine_schedules import read_parts
from flax_resblock.runs.scheduler_state import ScheduleState, read_schedule
from flax_resblock.runs.scheduler_writing import write_schedule
from flax_resblock.runs.ticks import BATCH
from parity_tests import runs
from parity_tests.support import same

pytestmark = pytest.mark.filterwarnings("ignore")


def halved(state):
    return {k: v * 0.5 if v.is_floating_point() else v for k, v in state.items()}


def yolo(run):
    """Ultralytics' trainers, with state dicts: ``updates`` counts those of the average."""
    state = run.model.state_dict()
    rest = {"ema": halved(state), "updates": run.step, "best_fitness": 0.3, "date": "2026"}
    return {"epoch": run.epoch - 1, "model": state, **rest}


def deepspeed(run):
    """``mp_rank_00_model_states.pt`` of DeepSpeed without ZeRO, with a client state."""
    parameters = dict(run.model.named_parameters())
    shapes = OrderedDict((name, value.shape) for name, value in parameters.items())
    return {
        "module": run.model.state_dict(),
        "buffer_names": [name for name, _ in run.model.named_buffers()],
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "shared_params": {},
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": run.step,
        "global_samples": run.step * runs.BATCH,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {"train_batch_size": runs.BATCH, "zero_optimization": {"stage": 0}},
        "ds_version": "0.18.2",
        "epoch": run.epoch,
    }


def fastai(run):
    """``learner.save`` with an OptimWrapper."""
    return {"model": run.model.state_dict()}


FORMS = {
    "YOLO": (yolo, "optimizer", "scheduler"),
    "DeepSpeed": (deepspeed, "optimizer", "lr_scheduler"),
    "fastai": (fastai, "opt", "sched"),
}


@pytest.fixture(scope="module")
def trained():
    optimizer = runs.adamw(lambda model: model.parameters())
    return runs.started(optimizer, runs.per_batch).epochs(runs.DONE)


@pytest.mark.parametrize("form", FORMS)
def test_the_run_is_that_of_a_plain_loop(form, trained, tmp_path):
    write, optimizer, scheduler = FORMS[form]
    _, plain = load_run(runs.plain_loop(trained, tmp_path))
    states = {optimizer: trained.optimizer.state_dict()}
    states[scheduler] = trained.scheduler.state_dict()
    torch.save({**write(trained), **states}, tmp_path / "other.pt")
    model, run = load_run(tmp_path / "other.pt")
    assert run.schedule == plain.schedule
    assert run.schedule.unit == BATCH
    assert run.steps == trained.step
    for name in ("groups", "tensors", "steps"):
        assert same(vars(run.optimizer)[name], vars(plain.optimizer)[name]), name
    assert model is not None
    assert all(entry.use for entry in run.found)
    names = {entry.name for entry in run.found}
    assert names == ({*write(trained), *states} - {"model", "module"})
    if form == "YOLO":
        assert np.any([np.any(value) for value in run.ema.values()])
        assert next(one for one in run.found if one.name == "ema").status == "kept"


def _mmengine(**changes):
    """The state of one of MMEngine's schedulers at step 4, from step 1 to before step 3."""
    common = {"param_name": "lr", "begin": 1, "end": 3, "by_epoch": True, "base_values": [0.1, 0.1]}
    counts = {"last_step": 1, "_global_step": 4, "verbose": False, "_last_value": [0.05, 0.05]}
    return {"step_size": 1, "gamma": 0.5, **common, **counts, **changes}


def test_mmengines_schedules_multiply_and_end():
    groups = [{"lr": 0.05, "initial_lr": 0.1}] * 2
    cosine = _mmengine(begin=2, end=9, last_step=2, T_max=7, eta_min=0.0)
    del cosine["step_size"], cosine["gamma"]
    halves, both = [_mmengine()], [_mmengine(), cosine]
    schedule, position = read_parts(halves, groups, "x")
    rates = [schedule.rate(step, groups[0]) for step in range(6)]
    assert (position, rates) == (4, [0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    product, _ = read_parts(both, groups, "x")
    down = [1, 1, *((1 + math.cos(math.pi * n / 7)) / 2 for n in (0, 1, 2, 3, 4, 5, 6, 6))]
    found = [product.rate(step, groups[0]) for step in range(10)]
    np.testing.assert_allclose(found, [0.1, 0.1, *(0.05 * n for n in down[2:])], rtol=1e-14)
    state = json.loads(json.dumps(write_schedule(ScheduleState(schedule, 4), groups)))
    assert state["param_schedulers"] == halves
    assert read_schedule(state, groups) == (schedule, 4)
    refused = {
        "count epochs and others that count iterations": [_mmengine(), _mmengine(by_epoch=False)],
        r"schedulers at the steps \[4, 5\]": [_mmengine(), _mmengine(_global_step=5)],
        "at its step 2 with the base rates": [_mmengine(last_step=2)],
        "a scheduler of the momentum": [_mmengine(param_name="momentum")],
        "or one with a lowest rate": [{**cosine, "eta_min": 0.01}],
        "of several optimizers": {"one": halves},
    }
    for words, states in refused.items():
        with pytest.raises(CheckpointError, match=words):
            read_parts(states, groups, "x")


def test_an_optimizer_that_only_its_program_puts_together_is_named(trained, tmp_path):
    zero = {**deepspeed(trained), "optimizer": None, "lr_scheduler": None}
    torch.save(zero, tmp_path / "zero.pt")
    with pytest.raises(CheckpointError, match=r"alone puts together.* zero_to_fp32\.py \. merged"):
        load_run(tmp_path / "zero.pt")
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    one = copy.deepcopy((trained.model, trained.optimizer))
    _, flattened = get_state_dict(*one, options=flat)
    torch.save({**fastai(trained), "optimizer": flattened}, tmp_path / "flat.pth")
    with pytest.raises(CheckpointError, match=r"is flattened .* Save it without that option"):
        load_run(tmp_path / "flat.pth")
    own = {"state": [{"grad_avg": torch.ones(2)}], "hypers": [{"lr": 0.1, "mom": 0.9}]}
    torch.save({**fastai(trained), "opt": own}, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match=r"one of fastai's own, .*OptimWrapper"):
        load_run(tmp_path / "own.pth")


def test_a_program_that_stores_no_names_and_an_unusual_order_is_refused_for_that(trained, tmp_path):
    state = copy.deepcopy(trained.optimizer.state_dict())
    count = len(state["param_groups"][0]["params"])
    turned = {n: state["state"][count - 1 - n] for n in range(count)}
    torch.save({**yolo(trained), "optimizer": {**state, "state": turned}}, tmp_path / "turned.pt")
    with pytest.raises(CheckpointError, match="does not say in which order it has its parameters"):
        load_run(tmp_path / "turned.pt")
