"""Files in the documented form of programs that the tests do not install are the same run."""

import argparse
import copy
import copyreg
import json
import math
import sys
import types
import warnings
from collections import OrderedDict
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as distributed

from flax_resblock import AssumptionWarning, CheckpointError, load_run, save, to_torch
from flax_resblock.checkpoint.limits import LIMITS
from flax_resblock.checkpoint.torch_file import plain as plain_of
from flax_resblock.checkpoint.trainer_arguments import trainer_arguments
from flax_resblock.runs.entries import settings_in
from flax_resblock.runs.mmengine_schedules import read_parts
from flax_resblock.runs.scheduler_state import ScheduleState, read_schedule
from flax_resblock.runs.scheduler_writing import write_schedule
from flax_resblock.runs.ticks import BATCH
from flax_resblock.training.checks import warn_of_other_settings
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
    with pytest.raises(CheckpointError, match=r"shards of all .* zero_to_fp32\.py \. merged"):
        load_run(tmp_path / "zero.pt")
    state = trained.optimizer.state_dict()
    torch.save({**yolo(trained), "optimizer": [state, state]}, tmp_path / "two.pt")
    with pytest.raises(CheckpointError, match=r"has 2 optimizers \(optimizer\[0\], optimizer\[1\]"):
        load_run(tmp_path / "two.pt")
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    one = copy.deepcopy((trained.model, trained.optimizer))
    _, flattened = get_state_dict(*one, options=flat)
    torch.save({**fastai(trained), "optimizer": flattened}, tmp_path / "flat.pth")
    with pytest.raises(CheckpointError, match=r"is flattened .* Save it without that option"):
        load_run(tmp_path / "flat.pth")


def _as_fastai(optimizer, rate):
    """The state that fastai's Adam has where torch's has that of ``optimizer``."""
    kept = optimizer.state_dict()["state"].values()
    states = [
        {"grad_avg": one["exp_avg"], "sqr_avg": one["exp_avg_sq"], "step": int(one["step"])}
        for one in kept
    ]
    hypers = {"wd": 0.01, "sqr_mom": 0.999, "lr": rate, "mom": 0.9, "eps": 1e-8}
    return {"state": states, "hypers": [hypers]}


def test_fastais_adam_is_torchs_and_a_computed_rate_had_a_schedule(trained, tmp_path):
    state = _as_fastai(trained.optimizer, 0.004)
    torch.save({**fastai(trained), "opt": state}, tmp_path / "own.pth")
    _, plain = load_run(runs.plain_loop(trained, tmp_path))
    with pytest.warns(AssumptionWarning, match=r"its Adam with decoupled .*optimizer='lamb'"):
        model, run = load_run(tmp_path / "own.pth")
    for suffix in ("pth", "safetensors"):  # which do not have to be told again
        save(
            model,
            tmp_path / f"as.{suffix}",
            run=load_run(tmp_path / "own.pth", optimizer="lamb")[1],
        )
        again = load_run(tmp_path / f"as.{suffix}")[1]
        assert (again.optimizer.kind, again.assumed) == ("timm-lamb", [])
    back = torch.load(tmp_path / "as.pth", weights_only=True)["optimizer"]
    assert same(plain_of({**back, "kind": 0}), plain_of({**state, "kind": 0}))
    assert same(run.optimizer.tensors, plain.optimizer.tensors)
    assert run.problem is None
    one, (options,) = run.optimizer.groups[0].options, [g.options for g in plain.optimizer.groups]
    assert {name: options[name] for name in one if name not in ("lr", "fastai")} == {
        name: value for name, value in one.items() if name not in ("lr", "fastai")
    }
    of_lamb = copy.deepcopy(state)
    of_lamb["hypers"][0]["beta"] = 0.0
    torch.save({**fastai(trained), "opt": of_lamb}, tmp_path / "radam.pth")
    with pytest.raises(CheckpointError, match=r"of which Adam and Lamb have a .*beta"):
        load_run(tmp_path / "radam.pth", optimizer="adamw")
    torch.save(
        {**fastai(trained), "opt": {**state, "count": 3, "slow_weights": []}}, tmp_path / "l"
    )
    with pytest.raises(CheckpointError, match="inside an optimizer that keeps count, slow_weights"):
        load_run(tmp_path / "l")
    state["hypers"][0]["lr"] = np.float64(0.004)  # as fit_one_cycle leaves it
    torch.save({**fastai(trained), "opt": state}, tmp_path / "cycle.pth")
    assert "fit_one_cycle" in load_run(tmp_path / "cycle.pth", optimizer="adamw")[1].problem


class _Fields:
    """As DeepSpeed's classes, which are pickled by their name."""

    def __init__(self, **fields):
        vars(self).update(fields)


def _shards(trained, folder, monkeypatch):
    """The folder of ZeRO with two processes: the second has the end of the flat vector."""
    module = types.ModuleType("deepspeed.utils.tensor_fragment")
    kind = type("fragment_address", (_Fields,), {"__module__": module.__name__})
    module.fragment_address = kind
    for name in ("deepspeed", "deepspeed.utils", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    named = dict(trained.model.named_parameters())
    kept = dict(zip(named, trained.optimizer.state_dict()["state"].values(), strict=True))
    vectors = {
        key: torch.cat([(kept[n][key] if key else p).detach().flatten() for n, p in named.items()])
        for key in ("", "exp_avg", "exp_avg_sq")
    }
    (group,), cut = trained.optimizer.state_dict()["param_groups"], 100
    model = {**deepspeed(trained), "dp_world_size": 2, "optimizer": None}
    torch.save(
        {**model, "lr_scheduler": trained.scheduler.state_dict()},
        folder / "mp_rank_00_model_states.pt",
    )
    for rank, (first, last) in enumerate([(0, cut), (cut, len(vectors[""]))]):
        places, start = {}, 0
        for name, value in named.items():
            begin, end = max(start, first), min(start + value.numel(), last)
            if begin < end:
                places[name] = kind(numel=end - begin, start=begin - first)
            start += value.numel()
        state = {key: value[first:last].clone() for key, value in vectors.items() if key}
        content = {
            "base_optimizer_state": {
                "state": {0: {"step": torch.tensor(float(trained.step)), **state}},
                "param_groups": [{**group, "params": [0]}],
            },
            "single_partition_of_fp32_groups": [vectors[""][first:last].clone()],
            "param_slice_mappings": [places],
        }
        file = folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": content}, file)


def test_arguments_say_how_averages_are_made_and_gradients_clipped():
    average = {"model_ema": True, "model_ema_decay": 0.99, "model_ema_steps": 1}
    run = {"world_size": 2, "batch_size": 24, "epochs": 96, "lr_warmup_epochs": 3}
    torchvision = {**average, **run, "clip_grad_norm": 0.7}

    def found(epoch=3, name="args", **changes):
        values = argparse.Namespace(**{**torchvision, **changes})
        return settings_in({"epoch": epoch, name: values}, {})

    assert found() == {
        "epochs": 96,
        "batch_size": 24,
        "clip_norm": 0.7,
        "ema": pytest.approx(1 - 0.01 * 2 * 24 / 96, rel=1e-15),
    }
    for other in (found(2), found(model_ema_steps=32), found(model_ema=False)):
        assert "ema" not in other
    entries = {}
    by_value = argparse.Namespace(epochs=96, clip_grad=0.2, clip_mode="value")
    assert settings_in({"args": by_value}, entries) == {"epochs": 96}
    assert "clipping by value has no counterpart" in entries["args"].use
    engine = {"train_batch_size": 48, "gradient_clipping": 1.0}
    assert settings_in({"ds_config": engine}, {}) == {"batch_size": 48, "clip_norm": 1.0}
    silent = {"ds_config": {"train_batch_size": 48}}  # of which the version has its own default
    assert "clip_norm" not in settings_in({**silent, "ds_version": "0.16.4"}, {})
    assert settings_in({**silent, "ds_version": "0.19.8"}, {})["clip_norm"] == 1.0


def test_mmengines_configuration_says_how_gradients_are_clipped():
    """It is parsed, and not executed."""
    text = "model = dict(type='A')\noptim_wrapper = dict(\n    clip_grad={},\n    type='W')\n{}"

    def found(clip, more=""):
        entries = {}
        meta = {"cfg": text.format(clip, more), "epoch": 3, "iter": 9, "mmengine_version": "0.10"}
        return settings_in({"meta": meta}, entries), entries

    for clip in ("dict(max_norm=35, norm_type=2)", "{'max_norm': 35}"):
        assert found(clip) == ({"clip_norm": 35}, {"meta": ANY})
    for clip in ("dict(max_norm=35, norm_type=1)", "dict(type='value', clip_value=0.2)"):
        settings, entries = found(clip)
        assert settings == {}
        assert "has no counterpart, and ends here" in entries["meta"].use
    for clip in ("None", "dict(max_norm=35", "dict(max_norm=open('x'))"):
        assert found(clip) == ({}, {})
    assert found("dict(max_norm=35)", "optim_wrapper = dict(type='W')")[0] == {}


class Arguments:
    """In place of transformers' TrainingArguments, which are of a class of the program's too."""

    def __reduce__(self):
        return copyreg.__newobj__, (Arguments,), self.__dict__


def test_a_trainers_arguments_say_how_gradients_are_clipped_and_accumulated(tmp_path):
    """None of the file is executed: its class cannot even be found under its name."""
    names = frozenset({"max_grad_norm", "label_smoothing_factor", "gradient_accumulation_steps"})

    def found(change=lambda data: data, **values):
        arguments = Arguments()
        vars(arguments).update(seed=3, **values)
        torch.save(arguments, tmp_path / "saved.bin")
        data = (tmp_path / "saved.bin").read_bytes()
        (tmp_path / "training_args.bin").write_bytes(change(data))
        return trainer_arguments(tmp_path / "training_args.bin", names, LIMITS)

    said = {"max_grad_norm": 0.7, "gradient_accumulation_steps": 4, "label_smoothing_factor": 0.0}
    arguments = found(**said)
    assert arguments == said
    state = {"trainer_state": {"num_train_epochs": 9, "train_batch_size": 8}}
    entries = {}
    whole = settings_in({**state, "training_args.bin": arguments}, entries)
    smooth = {"label_smoothing": 0.0}
    assert whole == {"epochs": 9, "batch_size": 32, "clip_norm": 0.7, **smooth}
    assert entries["training_args.bin"].status == "used"
    assert "batch_size 32" in entries["training_args.bin"].use
    unclipped = {**state, "training_args.bin": found(max_grad_norm=0.0)}
    assert settings_in(unclipped, {}) == {"epochs": 9, "batch_size": 8}
    assert found(max_grad_norm=None) == {}
    again = "".join(("max_", "grad_norm"))  # which of two counts is not known
    assert found(max_grad_norm=0.7, more={again: 0.1}) == {}
    for damage in (lambda data: data[:200], lambda data: b"\x80\x02never opened"):
        assert found(damage, max_grad_norm=0.7) is None


def test_accelerates_folders_of_fsdp_are_the_run_of_a_plain_loop(trained, tmp_path):
    _, plain = load_run(runs.plain_loop(trained, tmp_path))
    from torch.distributed.checkpoint.state_dict import get_state_dict  # slow to import

    model, optimizer = get_state_dict(*copy.deepcopy((trained.model, trained.optimizer)))
    shards, whole = tmp_path / "shards", tmp_path / "whole"
    for folder in (shards, whole):
        folder.mkdir()
        torch.save(trained.scheduler.state_dict(), folder / "scheduler.bin")
        torch.save({}, folder / "random_states_0.pkl")
    distributed.save({"model": model}, checkpoint_id=shards / "pytorch_model_fsdp_0")
    distributed.save({"optimizer": optimizer}, checkpoint_id=shards / "optimizer_0")
    torch.save(model, whole / "pytorch_model_fsdp.bin")
    torch.save(optimizer, whole / "optimizer.bin")
    for folder in (shards, whole):
        found, run = load_run(folder)
        assert same(to_torch(found), {k: v.numpy() for k, v in trained.model.state_dict().items()})
        assert same(run.optimizer.tensors, plain.optimizer.tensors)
        assert run.schedule == plain.schedule
        names = {entry.name: entry.status for entry in run.found}
        assert names == {"optimizer": "used", "scheduler": "used", "random_states_0.pkl": "ignored"}
    (shards / "optimizer_0" / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"holds no optimizer that could go on.*optimizer_0"):
        load_run(shards)


def test_the_shards_of_zero_are_the_optimizer_of_one_process(trained, tmp_path, monkeypatch):
    _shards(trained, tmp_path, monkeypatch)
    file, second = (
        tmp_path / f"{name}.pt"
        for name in ("mp_rank_00_model_states", "zero_pp_rank_1_mp_rank_00_optim_states")
    )
    plain, expected = load_run(runs.plain_loop(trained, tmp_path))
    model, run = load_run(file)
    assert same(to_torch(model), to_torch(plain))
    assert same(run.optimizer.tensors, expected.optimizer.tensors)
    assert run.optimizer.steps == expected.optimizer.steps
    assert run.schedule == expected.schedule
    for name in ("run.pth", "run.pth.json"):
        (tmp_path / name).unlink(missing_ok=True)
    assert load_run(tmp_path)[1].found == run.found
    (tmp_path / "back").mkdir()
    save(model, tmp_path / "back" / file.name, run=run)
    assert same(load_run(tmp_path / "back")[1].optimizer.tensors, run.optimizer.tensors)
    for name in (second.name, second.name.replace("_1_", "_0_", 1)):
        states = [
            torch.load(folder / name, weights_only=False)["optimizer_state_dict"]
            for folder in (tmp_path, tmp_path / "back")
        ]
        ours, theirs = (one["base_optimizer_state"]["state"] for one in states)
        assert same(plain_of(ours), plain_of(theirs))
    whole = second.read_bytes()
    shard = torch.load(second, weights_only=False)
    shard["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][3] += 1e-3
    torch.save(shard, second)
    with pytest.raises(CheckpointError, match=r"hold other weights of .* written at another step"):
        load_run(file)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"of the processes 0, where .* trained by 2"):
        load_run(file)
    second.write_bytes(whole)
    places = torch.load(second, weights_only=False)
    next(iter(places["optimizer_state_dict"]["param_slice_mappings"][0].values())).numel += 10**6
    torch.save(places, second)
    with pytest.raises(CheckpointError, match="reaches beyond its vector"):
        load_run(file)


def test_a_program_that_stores_no_names_and_an_unusual_order_is_refused_for_that(trained, tmp_path):
    state = copy.deepcopy(trained.optimizer.state_dict())
    count = len(state["param_groups"][0]["params"])
    turned = {n: state["state"][count - 1 - n] for n in range(count)}
    torch.save({**yolo(trained), "optimizer": {**state, "state": turned}}, tmp_path / "turned.pt")
    with pytest.raises(CheckpointError, match="does not say in which order it has its parameters"):
        load_run(tmp_path / "turned.pt")


def test_going_on_with_other_settings_than_the_run_had_is_said():
    settings = {"clip_norm": 0.7, "label_smoothing": 0.0, "epochs": 9}
    run = types.SimpleNamespace(settings=settings)
    with pytest.warns(UserWarning, match=r"with clip_norm=0.7, and goes on with clip_norm=None"):
        warn_of_other_settings(run, runs.config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_settings(run, runs.config(clip_norm=0.7))


def test_an_optimizer_and_a_schedule_are_found_by_their_form_and_several_are_refused(
    trained, tmp_path
):
    _, plain = load_run(runs.plain_loop(trained, tmp_path))
    scheduler = trained.scheduler.state_dict()
    content = {"my_weights": trained.model.state_dict(), "opt_dict": trained.optimizer.state_dict()}
    content |= {"lr_state": scheduler, "global_step": trained.step}
    torch.save(content, tmp_path / "odd.pth")
    _, run = load_run(tmp_path / "odd.pth")
    assert same(run.optimizer.tensors, plain.optimizer.tensors)
    assert run.schedule == plain.schedule
    average = torch.optim.swa_utils.SWALR(copy.deepcopy(trained.optimizer), swa_lr=0.01)
    torch.save({**content, "swa_scheduler": average.state_dict()}, tmp_path / "two.pth")
    assert "(lr_state, swa_scheduler)" in load_run(tmp_path / "two.pth")[1].problem
