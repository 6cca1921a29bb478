"""Training checkpoints of the usual programs go on in JAX without flags, and come back to torch."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import flax_resblock
from flax_resblock import CheckpointError, InputError, load_run, training
from flax_resblock.checkpoint.record import METADATA_DIGEST
from flax_resblock.cli.common import RunFlags
from flax_resblock.convert.opening import open_checkpoint
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT
from flax_resblock.runs.ticks import BATCH, unit_of
from parity_tests import runs
from parity_tests.runs import DONE, EPOCHS, SPELLINGS, STEPS
from parity_tests.support import fast_only, worst


def goes_on(path, *, epochs=EPOCHS, change=lambda run: run, **arguments):
    """Weights and run after the rest of the run in JAX."""
    with jax.enable_x64(True):
        model, run = load_run(path, **arguments)
        history = training.fit(
            model, runs.few_digits(), runs.config(epochs=epochs), run=change(run), progress=False
        )
        return flax_resblock.to_torch(model), model, history.run


@pytest.mark.parametrize("spelling", fast_only(["torchvision's reference"], SPELLINGS))
def test_a_run_goes_on_in_jax_and_comes_back(spelling, tmp_path):
    run, path = runs.saved(spelling, tmp_path)
    there = runs.twin(run).epochs(2)
    ours, model, carried = goes_on(path, epochs=DONE + 2)
    assert worst(ours, there.state()) <= TRAJECTORY_LIMIT
    flax_resblock.save(model, tmp_path / "back.pth", run=carried)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    again = SPELLINGS[spelling][0]()
    again.model.load_state_dict(back["model"], strict=True)
    again.optimizer.load_state_dict(back["optimizer"])
    if again.scheduler is not None:
        again.scheduler.load_state_dict(back["lr_scheduler"])
    assert (back["epoch"], back["step"]) == (there.epoch - 1, there.step)
    again.epoch = back["epoch"] + 1
    assert worst(again.epochs(2).state(), there.epochs(2).state()) <= TRAJECTORY_LIMIT


def _without_buffers(run):
    tensors = {name: {} for name in run.optimizer.tensors}
    return replace(run, optimizer=replace(run.optimizer, tensors=tensors))


def _one_step_late(run):
    return replace(run, schedule=replace(run.schedule, position=run.schedule.position + 1))


@pytest.mark.slow
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_momentum_and_schedule_matter(spelling, tmp_path):
    """As test_optimizer_steps.py shows of single optimizers."""
    run, path = runs.saved(spelling, tmp_path)
    truth = run.epochs(1).state()
    for change in (_without_buffers, *([_one_step_late] if run.scheduler is not None else [])):
        ours, *_ = goes_on(path, epochs=DONE + 1, change=change)
        assert worst(ours, truth) >= 1000 * TRAJECTORY_LIMIT


EXPECTED = {
    "a plain loop with GradScaler and EMA": (
        {"optimizer_state_dict", "global_step", "epoch", "scheduler_state_dict"},
        {"scaler", "ema"},
        {"rng", "best_acc"},
    ),
    "torchvision's reference": (
        {"optimizer", "lr_scheduler", "epoch", "args"},
        {"model_ema", "scaler"},
        set(),
    ),
    "Lightning": (
        {"optimizer_states", "lr_schedulers", "epoch", "global_step", "hyper_parameters"},
        {"MixedPrecision"},
        {"loops", "callbacks", "hparams_name", "pytorch-lightning_version"},
    ),
    "timm": (
        {"optimizer", "epoch", "args"},
        {"amp_scaler", "state_dict_ema"},
        {"metric", "version", "arch"},
    ),
    "Hugging Face Trainer": (
        {"optimizer", "scheduler", "epoch", "global_step", "trainer_state"},
        set(),
        {"rng_state.pth", "training_args.bin"},
    ),
}
"""The entries that are used, kept and ignored."""


@pytest.mark.parametrize(
    ("spelling", "suffix"), list(zip(SPELLINGS, [".pth", ".safetensors", ""] * 2, strict=True))
)
def test_every_entry_is_listed_and_every_format_holds_the_same_run(spelling, suffix, tmp_path):
    _, path = runs.saved(spelling, tmp_path)
    model, run = load_run(path)
    assert run.problem is None
    assert (run.steps if run.steps is not None else run.epochs * STEPS) == DONE * STEPS
    if spelling in EXPECTED:
        listed = [
            {entry.name for entry in run.found if entry.status == status}
            for status in ("used", "kept", "ignored")
        ]
        assert tuple(listed) == EXPECTED[spelling]
    flax_resblock.save(model, tmp_path / f"copy{suffix}", run=run)
    again, copied = load_run(tmp_path / f"copy{suffix}")
    assert worst(flax_resblock.to_torch(again), flax_resblock.to_torch(model)) == 0
    assert copied.schedule == run.schedule
    assert (copied.epochs, copied.settings) == (run.epochs, run.settings)
    ours, theirs = copied.optimizer, run.optimizer
    assert ours.kind == theirs.kind
    assert [g.paths for g in ours.groups] == [g.paths for g in theirs.groups]
    assert [dict(g.options) for g in ours.groups] == [dict(g.options) for g in theirs.groups]
    for name, tensors in (*theirs.tensors.items(), ("steps", theirs.steps)):
        there = ours.steps if name == "steps" else ours.tensors[name]
        assert there.keys() == tensors.keys()
        for key, value in tensors.items():
            np.testing.assert_array_equal(there[key], value)


@pytest.mark.filterwarnings("ignore")
def test_the_scaler_and_the_averages_go_back_as_they_came(tmp_path):
    for spelling, name, scaler in (
        ("a plain loop with GradScaler and EMA", "ema", "scaler"),
        ("timm", "state_dict_ema", "amp_scaler"),
    ):
        original, path = runs.saved(spelling, tmp_path)
        there = torch.load(path, weights_only=False)
        model, run = load_run(path)
        assert run.ema
        flax_resblock.save(model, tmp_path / f"{name}.safetensors", run=run)
        again, carried = load_run(tmp_path / f"{name}.safetensors")
        flax_resblock.save(again, tmp_path / f"{name}.pth", run=carried)
        back = torch.load(tmp_path / f"{name}.pth", weights_only=True)
        assert back[scaler] == there[scaler]
        assert list(back[name]) == list(there[name])
        for key, value in there[name].items():
            assert torch.equal(back[name][key], value), key
            assert back[name][key].dtype == value.dtype, key
        if name == "ema":
            averaged = torch.optim.swa_utils.AveragedModel(original.model)
            averaged.load_state_dict(back[name], strict=True)
    other = {**there[name], "fc.bias": torch.zeros(3)}
    _, found = load_run(runs.rewritten(path, lambda content: content.update({name: other})))
    assert not found.ema
    (entry,) = (one for one in found.found if one.name == name)
    assert (entry.status, "`entry=state_dict_ema`" in entry.use) == ("ignored", True)


def test_a_gradscaler_that_skipped_steps_leaves_the_schedule_ahead_of_adam(tmp_path):
    run, path = runs.saved("Lightning", tmp_path)
    skipped = 3

    def change(content):
        del content["global_step"]
        content["epoch"] = 40  # of a longer run: not the scheduler's count
        for state in content["optimizer_states"][0]["state"].values():
            state["step"] -= skipped

    _, found = load_run(runs.rewritten(path, change))
    assert found.schedule is not None
    assert (found.schedule.position, found.schedule.unit) == (run.step, BATCH)
    assert float(next(iter(found.optimizer.steps.values()))) == run.step - skipped


def test_what_a_scheduler_counted_can_be_said(tmp_path):
    _, path = runs.saved("torchvision's reference", tmp_path)
    runs.rewritten(path, lambda content: content.update(epoch=90, global_step=4711))
    _, run = load_run(path)
    assert run.schedule is None
    words = (
        "stepped 2 times, and the file has 4711 steps by the program's own count, 10 batches seen"
    )
    assert words in (run.problem or "")
    assert "schedule_unit=" in (run.problem or "")
    for unit in ("epoch", "batch", 4):
        _, run = load_run(path, schedule_unit=unit)
        assert run.schedule is not None
        assert run.schedule.unit == unit_of(unit)


def test_a_schedule_without_counterpart_leaves_the_optimizer_usable(tmp_path):
    def build():
        return runs.started(
            runs.momentum_sgd(runs.by_kind),
            lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5),
        )

    run = build().epochs(1)
    path = runs.plain_loop(run, tmp_path)
    _, found = load_run(path)
    assert found.schedule is None
    assert "keeps its function in the program" in (found.problem or "")
    for name in ("again.safetensors", "again.pth"):  # which does not lose the reason
        flax_resblock.save(load_run(path)[0], tmp_path / name, run=found)
        assert load_run(tmp_path / name)[1].problem
    (tmp_path / "half.py").write_text("def half(step):\n    return 0.5\n")
    _, direct = load_run(path, lr_lambda=lambda step: 0.5, schedule_unit="batch")
    assert direct.schedule is not None, direct.problem
    named = RunFlags(lr_lambda=(f"{tmp_path}/half.py:half",), schedule_unit="batch")
    found = named.of(open_checkpoint(path, run=True))
    assert found.problem is None
    assert found.schedule is not None
    assert (found.schedule.position, found.schedule.unit) == (STEPS, BATCH)
    with pytest.raises(InputError, match=r"in the file\. .* pass run=dataclasses\.replace"):
        goes_on(path, epochs=2)
    # that function happens to be constant
    ours, *_ = goes_on(path, epochs=2, change=lambda run: replace(run, problem=None))
    assert worst(ours, run.epochs(1).state()) <= TRAJECTORY_LIMIT


def test_a_schedule_that_the_file_does_not_hold_is_missed(tmp_path):
    _, path = runs.saved("a plain loop with GradScaler and EMA", tmp_path)
    runs.rewritten(path, lambda content: content.pop("scheduler_state_dict"))
    _, run = load_run(path)
    assert "holds no learning-rate scheduler, but the run had one" in (run.problem or "")
    runs.rewritten(path, lambda content: content.update(scheduler=None))
    assert load_run(path)[1].problem is None


@pytest.mark.slow
def test_a_first_step_without_gradient_in_places_is_carried_on(tmp_path):
    """As with zero-init-residual some first gradients are exactly 0; torch keeps their buffers."""
    config = runs.config(
        epochs=1, batch_size=runs.STEPS * runs.BATCH, warmup_epochs=0, dtype="float32"
    )
    model = training.new_model(config)
    for block in (*model.stage1, *model.stage2):
        block.norm2.scale.set_value(np.zeros_like(block.norm2.scale[...]))
    history = training.fit(model, runs.few_digits(), config, progress=False)
    flax_resblock.save(model, tmp_path / "run", run=history.run)
    _, run = load_run(tmp_path / "run")
    assert any(not np.any(value) for value in run.optimizer.tensors["momentum_buffer"].values())
    assert len(run.optimizer.tensors["momentum_buffer"]) == 20


def _frozen(content):
    for number in list(content["optimizer_state_dict"]["state"])[:3]:
        del content["optimizer_state_dict"]["state"][number]


def _two_optimizers(content):
    content["optimizer_states"] = [content.pop("optimizer_state_dict")] * 2


BAD = {
    "no optimizer": (
        lambda content: content.pop("optimizer_state_dict"),
        r"holds no optimizer that could go on; .* it has: epoch, global_step",
    ),
    "two optimizers": (_two_optimizers, "holds no optimizer that could go on"),
    "no buffers after many steps": (
        lambda content: content["optimizer_state_dict"].update(state={}),
        r"took 10 steps, but .* keeps none of the buffers \(momentum_buffer\)|fits 2 of the "
        r"usual ways",
    ),
    "some buffers missing": (
        _frozen,
        r"lacks momentum_buffer of 3 of 20 parameters: conv1\.weight, .*frozen",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_an_optimizer_that_cannot_go_on_is_refused_and_the_weights_are_offered(case, tmp_path):
    change, words = BAD[case]
    _, path = runs.saved("a plain loop with GradScaler and EMA", tmp_path)
    runs.rewritten(path, change)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_run(path)
    assert "`flax_resblock.load`" in str(caught.value)
    flax_resblock.load(path)


def test_damage_in_the_stored_run_is_found(tmp_path):
    _, path = runs.saved("Lightning", tmp_path)
    model, run = load_run(path)
    copy, bad = tmp_path / "copy.safetensors", tmp_path / "bad.safetensors"
    flax_resblock.save(model, copy, run=run)
    tensors = load_file(copy)
    with safe_open(copy, framework="numpy") as file:
        metadata = dict(file.metadata())
    unsigned = {key: value for key, value in metadata.items() if key != METADATA_DIGEST}
    for changed in (metadata["run"][:-40], "{}", "[]"):
        for written, words in (
            (metadata, "what it says beside its tensors differs from the SHA-256"),
            (unsigned, "record of the training run is damaged"),
        ):
            save_file(tensors, bad, metadata={**written, "run": changed})
            with pytest.raises(CheckpointError, match=words):
                load_run(bad)
    key = next(key for key in tensors if key.startswith("optimizer.exp_avg."))
    save_file({**tensors, key: tensors[key] + 1}, bad, metadata=metadata)
    with pytest.raises(CheckpointError, match=r"optimizer\.exp_avg\..* differs from the SHA-256"):
        load_run(bad)
