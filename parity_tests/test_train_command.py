"""``flax-resblock train`` and ``convert --with-optimizer`` as a person meets them."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import flax_resblock
from flax_resblock import checkpoint, load_run
from flax_resblock.cli import run as run_command
from parity_tests import preemption, runs
from parity_tests.support import fast_only, json_lines, python, with_trained_norms, worst
from parity_tests.test_without_torch import BLOCK_TORCH
from torch_ref import ResNet


def command(line):
    """The exit status of a command line."""
    return run_command(line.split())


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A data set of a few images, so that a run takes a second; and jax's mode as it was."""
    import jax

    from flax_resblock.training.data import Splits

    data = runs.few_digits()
    monkeypatch.setattr("flax_resblock.training.data.opening.digits", lambda: Splits(data, data))
    wide = jax.config.read("jax_enable_x64")
    yield
    jax.config.update("jax_enable_x64", wide)


@pytest.mark.slow
def test_a_loop_without_settings_resumes_with_no_flags_and_a_note(folder, capsys):
    _, path = runs.saved("a plain loop with GradScaler and EMA", folder)
    assert command(f"train --data digits --resume {path}") == 0
    text = capsys.readouterr().out
    assert "the run took 10 steps in 2 epochs, and here an epoch has 1" in text
    assert "kept    scaler: loss scaling, for the way back" in text
    assert "kept    ema: averaged weights, for the way back" in text


@pytest.mark.parametrize(
    "spelling",
    fast_only(["timm"], runs.SPELLINGS),
)
def test_a_checkpoint_resumes_where_it_stopped(spelling, folder, capsys):
    torch_run, path = runs.saved(spelling, folder)
    size = f"--batch-size {runs.BATCH}" if "plain" in spelling else ""  # has no settings in it
    assert command(f"train --data digits --resume {path} {size}") == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    _, after = load_run("runs/digits-resnet8")
    there = torch_run.epochs(runs.EPOCHS - runs.DONE)
    assert after.steps == there.step
    assert (
        f"goes on at step {runs.DONE * runs.STEPS}, epoch {runs.DONE + 1} of {runs.EPOCHS}, "
        f"{runs.STEPS} steps per epoch" in text
    )
    assert command("convert runs/digits-resnet8 back.pth --with-optimizer --no-certificate") == 0
    back = torch.load("back.pth", weights_only=True)
    truth = there.state()
    ours = {key: value.numpy() for key, value in back["model"].items()}
    assert worst(ours, truth) <= 1e-10
    again = runs.SPELLINGS[spelling][0]()
    again.optimizer.load_state_dict(back["optimizer"])
    if again.scheduler is not None:
        again.scheduler.load_state_dict(back["lr_scheduler"])
        assert again.scheduler.last_epoch == there.scheduler.last_epoch
    lines = json_lines("runs/digits-resnet8/metrics.jsonl")
    assert [line["step"] for line in lines] == list(
        range(runs.DONE * runs.STEPS, runs.EPOCHS * runs.STEPS)
    )
    found = json.loads(Path("runs/digits-resnet8/summary.json").read_text())["last_step"]
    assert found == runs.EPOCHS * runs.STEPS - 1


@pytest.mark.slow
def test_a_finished_run_goes_on_at_another_rate(folder):
    assert command(f"train --batch-size {runs.BATCH} --epochs 2 --out first") == 0
    arguments = (
        "train --resume first --epochs 3 --schedule warmup-cosine --learning-rate 0.01 --out on"
    )
    assert command(arguments) == 0
    _, run = load_run("on")
    assert (run.steps, run.epochs) == (3 * runs.STEPS, 3)
    rates = [line["learning_rate"] for line in json_lines("on/metrics.jsonl")]
    assert len(rates) == runs.STEPS
    assert 0 < rates[-1] < rates[0] < 0.01


@pytest.mark.slow
def test_a_run_goes_on_in_its_own_folder_and_is_not_overwritten(folder, capsys):
    flags = f"train --batch-size {runs.BATCH} --out on"
    assert command(f"{flags} --epochs 2 --resume auto") == 0
    assert command(f"{flags} --epochs 2") == 2
    assert (
        "on exists. A run is never overwritten: go on with it (--resume auto)"
        in capsys.readouterr().err
    )
    assert command(f"{flags} --resume auto") == 0
    assert "the run in on is complete" in capsys.readouterr().out
    assert command(f"{flags} --resume on --epochs 3 --schedule constant --keep 2") == 0
    expected = ["step-00000010", "step-00000015"]
    assert sorted(path.name for path in Path("on/checkpoints").iterdir()) == expected
    lines = json_lines("on/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(3 * runs.STEPS))
    assert json.loads(Path("on/config.json").read_text())["epochs"] == 3


@pytest.mark.slow
def test_a_network_of_a_thousand_classes_learns_ten_with_its_first_parts_frozen(folder, capsys):
    torch.manual_seed(0)
    module = with_trained_norms(
        ResNet(depths=(1, 1, 1), widths=(4, 6, 8), stem_width=4, num_classes=1000)
    )
    torch.save(module.state_dict(), "imagenet.pth")
    flags = f"--data digits --epochs 1 --batch-size {runs.BATCH} --out tuned"
    assert command(f"train --init imagenet.pth --num-classes 10 --freeze stem,stage1 {flags}") == 0
    text = capsys.readouterr().out
    assert "imagenet.pth has 1000 classes: the head is new, for 10 classes" in text
    assert "grey images, repeated for the network's 3 channels" in text
    after = flax_resblock.to_torch(flax_resblock.load("tuned"))
    before = {key: value.numpy() for key, value in module.state_dict().items()}
    same = {
        key
        for key in before
        if after[key].shape == before[key].shape and after[key].tobytes() == before[key].tobytes()
    }
    assert same == {key for key in before if key.startswith(("conv1", "bn1", "layer1"))}
    assert after["fc.weight"].shape == (10, 8)
    assert command(f"train --init imagenet.pth --num-classes 5 {flags}_five") == 2
    assert "--num-classes 5 is less than the 10 classes" in capsys.readouterr().err
    assert command("train --freeze stage9 --out other") == 2
    assert (
        "--freeze stage9 must be some of stem, stage1, stage2, stage3, head, but not all"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_data_of_ones_own_train_and_their_settings_come_back(folder, capsys):
    rng = np.random.default_rng(0)
    arrays = {
        f"{name}_{part}": values
        for part in ("train", "test")
        for name, values in (
            ("x", rng.integers(0, 256, (40, 9, 8, 1), np.uint8)),
            ("y", np.arange(40) % 10),
        )
    }
    np.savez("own.npz", **arrays)
    assert command("train --data own.npz --batch-size 20 --epochs 2 --seed 3 --out own") == 0
    assert command("train --resume own --epochs 3 --schedule constant --out on") == 0
    stored = json.loads(Path("on/config.json").read_text())
    assert (stored["data"], stored["seed"], stored["batch_size"]) == ("own.npz", 3, 20)
    assert command("train --data nothing --out none") == 2
    assert "nothing does not exist. Data are 'digits'" in capsys.readouterr().err


def test_convert_without_the_flag_says_what_stays_behind(folder, capsys):
    _, path = runs.saved("torchvision's reference", folder)
    assert command(f"convert {path} weights.safetensors --no-certificate") == 0
    assert (
        "its optimizer, entry 'optimizer', stays behind (--with-optimizer carries the run)"
        in capsys.readouterr().out
    )
    assert command(f"convert {path} run.safetensors --with-optimizer --no-certificate") == 0
    text = capsys.readouterr().out
    assert "used    lr_scheduler: SequentialLR at step 2, one per epoch" in text
    assert "kept    scaler: loss scaling, for the way back" in text
    assert "kept    model_ema: averaged weights, for the way back" in text
    assert command("convert run.safetensors again.pth --no-certificate") == 0
    assert "its optimizer stays behind" in capsys.readouterr().out
    assert command("train --data digits --resume weights.safetensors") == 2
    assert "holds no optimizer that could go on" in capsys.readouterr().err


def test_a_certificate_covers_the_run(folder, capsys):
    _, path = runs.saved("Lightning", folder)
    assert command(f"convert {path} run --with-optimizer") == 0
    assert command("verify --certificate run/parity.json") == 0
    key = next(
        key for key in checkpoint.read("run").tensors if key.startswith("optimizer.exp_avg.")
    )
    assert key in json.loads(Path("run/parity.json").read_text())["outputs"]["."]["tensors"]


def _no_buffers(content):
    content["optimizer"]["state"] = {
        number: value for number, value in content["optimizer"]["state"].items() if number > 4
    }


BAD = {
    "missing buffers": (_no_buffers, "lacks momentum_buffer of 5 of 20 parameters"),
    "an unknown option": (
        lambda content: content["optimizer"]["param_groups"][0].update(trust=0.1),
        "is no optimizer with a counterpart here",
    ),
}


@pytest.mark.parametrize("case", fast_only(["an unknown option"], BAD))
def test_what_cannot_go_on_is_one_paragraph_with_status_2(case, folder, capsys):
    change, words = BAD[case]
    _, path = runs.saved("torchvision's reference", folder)
    runs.rewritten(path, change)
    before = sorted(folder.rglob("*"))
    for arguments in (
        f"train --data digits --resume {path}",
        f"convert {path} out --with-optimizer",
    ):
        assert command(arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert "--weights-only" in error
        assert error.count("\n") == 1
    assert sorted(folder.rglob("*")) == before
    assert command(f"convert {path} out --with-optimizer --weights-only --no-certificate") == 0
    if case == "missing buffers":  # the advice is tried once
        more = f"--weights-only --epochs 1 --batch-size {runs.BATCH}"
        assert command(f"train --data digits --resume {path} {more}") == 0


@pytest.mark.slow
def test_a_schedule_without_counterpart_needs_a_word(folder, capsys):
    run = runs.started(
        runs.momentum_sgd(runs.by_kind),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5),
    )
    path = runs.plain_loop(run.epochs(1), folder)
    size = f"--batch-size {runs.BATCH} --epochs 2"
    assert command(f"train --data digits --resume {path} {size}") == 2
    error = capsys.readouterr().err
    assert "--lr-lambda" in error
    assert "Say --schedule constant to go on at the rate that the optimizer has" in error
    line = f"train --data digits --resume {path}"
    for schedule in ("constant", "warmup-cosine"):
        assert command(f"{line} --schedule {schedule} --out {schedule} {size}") == 0
    assert "0.025, 0.025, constant" in capsys.readouterr().out
    constant, rates = (
        [line["learning_rate"] for line in json_lines(f"{name}/metrics.jsonl")]
        for name in ("constant", "warmup-cosine")
    )
    assert constant == [0.025] * runs.STEPS
    assert rates[0] == pytest.approx(0.05)
    assert rates == sorted(rates, reverse=True)


OTHER = {
    "an unknown preset": (
        "train --preset nonesuch",
        "preset 'nonesuch' is unknown; known: digits-resnet8",
    ),
    "a folder that exists": ("train --out full", "full exists. A run is never overwritten"),
    "no such checkpoint": ("train --resume nowhere.pth", "nowhere.pth does not exist"),
    "a bad setting": ("train --epochs 0", "--epochs 0 must be a positive integer"),
    "more images than there are": (
        "train --batch-size 999",
        "--batch-size 999 must be from 1 to the 120 images",
    ),
    "a rate for a run that has one": (
        "train --data digits --resume run.pth --learning-rate 0.1",
        "--learning-rate has no place in a run that goes on",
    ),
    "a run that is over": (
        "train --data digits --resume run.pth --epochs 2",
        "the run is over: it is at step 10, and its 2 epochs of 5 steps end at 10",
    ),
}


def test_bad_arguments_are_one_paragraph_with_status_2(folder, capsys):
    _, path = runs.saved("a plain loop with GradScaler and EMA", folder)
    (folder / "full").mkdir()
    (folder / "full" / "file").touch()
    assert path.name == "run.pth"
    for arguments, words in OTHER.values():
        size = "" if "--batch-size" in arguments else f"--batch-size {runs.BATCH}"
        assert command(f"{arguments} {size}") == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert sorted(path.name for path in folder.iterdir()) == ["full", "run.pth"]


@pytest.mark.slow
def test_a_run_that_is_killed_ends_bit_for_bit_where_it_would_have(folder):
    """The short form of ``python -m parity_tests.preemption``."""
    preemption.finished(folder / "whole")
    truth = preemption.state(folder / "whole")
    found = preemption.interrupted(folder / "killed", random.Random(1), int(signal.SIGKILL), most=1)
    assert found == 1
    assert preemption.differences(preemption.state(folder / "killed"), truth) == []
    assert preemption.differences((truth[0], truth[1], truth[2][:-1]), truth) == ["number of steps"]


@pytest.mark.slow
def test_an_interrupt_saves_and_says_how_to_go_on(folder):
    code = "from flax_resblock.cli import main; main()"
    flags = "train --epochs 400 --batch-size 256 --out out"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not Path("out/metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    step = int(
        re.search(
            r"stopped after step (\d+); out/checkpoints/step-\d+ is written. Go on with "
            r"--resume auto --out out",
            error,
        )[1]
    )
    _, run = load_run("out")
    assert (run.steps, len(json_lines("out/metrics.jsonl"))) == (step, step)


@pytest.mark.slow
def test_a_host_without_torch_goes_on_with_a_run_in_safetensors(folder):
    _, path = runs.saved("a plain loop with GradScaler and EMA", folder)
    assert command(f"convert {path} run.safetensors --with-optimizer --no-certificate") == 0
    code = (
        BLOCK_TORCH
        + """
from flax_resblock.cli import run
assert run("train --data digits --resume run.safetensors --batch-size 256 --epochs 3".split()) == 0
assert run(["convert", "runs/digits-resnet8", "back.safetensors", "--with-optimizer"]) == 0
assert "torch" not in sys.modules
"""
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    _, run = load_run("back.safetensors")
    assert run.optimizer.kind == "sgd"
    assert len(run.optimizer.tensors["momentum_buffer"]) == 20
