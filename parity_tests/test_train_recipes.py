"""The programs and launch files in ``train/`` run, and use what a user can use."""

from __future__ import annotations

import functools
import os
import runpy
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import flax_resblock
from flax_resblock.cli import run as command
from flax_resblock.training.data import digits
from parity_tests.support import REPOSITORY
from torch_ref import ResNet, training

RECIPES = REPOSITORY / "train"
PROGRAMS = sorted(path.name for path in RECIPES.glob("*.py"))
NETWORK: dict[str, Any] = {
    "depths": (1, 1),
    "widths": (4, 6),
    "stem": "cifar",
    "stem_width": 4,
    "in_channels": 1,
}


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs a program in an empty folder and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> str:
        monkeypatch.setattr("sys.argv", [name, *arguments])
        runpy.run_path(str(RECIPES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def torch_run(path: Path, classes: int = 10) -> ResNet:
    """Two steps of a PyTorch run, saved."""
    torch.manual_seed(0)
    module = ResNet(**NETWORK, num_classes=classes)
    optimizer = training.sgd(module, 0.05)
    scheduler = training.warmup_cosine(optimizer, warmup_steps=2, total_steps=5)
    images = torch.from_numpy(digits().train.normalised(slice(32))).permute(0, 3, 1, 2)
    labels = torch.arange(32) % classes
    training.train(module, [(images, labels)] * 2, optimizer, scheduler)
    training.save_checkpoint(path, module, optimizer, scheduler, epoch=0, step=2)
    return module


def test_there_are_few_short_programs_and_no_package():
    assert PROGRAMS == ["all_devices.py", "continue_run.py", "fine_tune.py", "plain_optax.py"]
    assert all(len((RECIPES / name).read_text().splitlines()) < 100 for name in PROGRAMS)


@pytest.mark.slow
def test_a_plain_optax_loop_learns_and_its_file_loads_in_pytorch(program):
    text = program("plain_optax.py", "--epochs", "3", "--batch-size", "128", "--out", "net.pth")
    accuracy = float(text.split("test accuracy ")[-1].split("%")[0])
    assert accuracy > 80
    module = ResNet(
        depths=(1, 1, 1),
        widths=(16, 32, 64),
        stem="cifar",
        stem_width=16,
        in_channels=1,
        num_classes=10,
    )
    module.load_state_dict(torch.load("net.pth", weights_only=True), strict=True)
    assert int(module.bn1.num_batches_tracked) == 3 * 11


@pytest.mark.slow
def test_fine_tuning_makes_a_new_head_and_keeps_frozen_parts(program, tmp_path):
    before = torch_run(tmp_path / "seven.pth", classes=7).state_dict()
    text = program(
        *shlex.split(
            "fine_tune.py seven.pth --data digits --freeze stem --epochs 1 --batch-size 359"
        )
    )
    assert "epoch 1: test accuracy" in text
    after = torch.load("tuned.pth", weights_only=True)
    assert after["fc.weight"].shape == (10, 6)
    same = {key for key in before if torch.equal(after[key], before[key])} - {"fc.bias"}
    assert same == {key for key in before if key.startswith(("conv1", "bn1"))}


def test_a_pytorch_run_continues_and_comes_back(program, tmp_path):
    module = torch_run(tmp_path / "run.pth")
    line = "continue_run.py run.pth --data digits --epochs 1 --batch-size 287 --out on.pth"
    text = program(*shlex.split(line))
    assert "used: optimizer" in text
    assert "step 4: test accuracy" in text
    back = torch.load("on.pth", weights_only=True)
    module.load_state_dict(back["model"], strict=True)
    optimizer = training.sgd(module, 0.05)
    optimizer.load_state_dict(back["optimizer"])
    scheduler = training.warmup_cosine(optimizer, warmup_steps=2, total_steps=5)
    scheduler.load_state_dict(back["lr_scheduler"])
    assert (back["step"], scheduler.last_epoch) == (5, 5)


@pytest.mark.slow
def test_training_on_all_devices_leaves_a_run_that_can_continue(program):
    text = program(*shlex.split("all_devices.py --epochs 1 --batch-size 356 --out out"))
    assert "4 devices in 1 processes" in text
    assert flax_resblock.load("out/model.safetensors").config.num_classes == 10
    _, run = flax_resblock.load_run("out")
    assert (run.steps, Path("out/best").exists()) == (4, True)


@pytest.fixture
def parsed(monkeypatch):
    """Parses a ``flax-resblock train`` command line as the command does, and returns its flags."""
    from flax_resblock.cli import train as module

    seen: dict[str, Any] = {}

    @functools.wraps(module.train)
    def train(*arguments: Any, **flags: Any) -> int:
        seen.update(flags)
        return 0

    monkeypatch.setattr(module, "train", train)

    def parse(arguments: list[str]) -> dict[str, Any]:
        assert arguments[:2] == ["flax-resblock", "train"]
        assert command(arguments[1:]) == 0
        return seen

    return parse


def test_the_slurm_file_starts_a_command_that_parses(parsed, tmp_path):
    script = RECIPES / "slurm.sbatch"
    subprocess.run(["bash", "-n", str(script)], check=True)
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DATA": "/a b/c"}
    done = subprocess.run(
        ["bash", str(script)], env=environment, capture_output=True, text=True, check=True
    )
    flags = parsed(done.stdout.splitlines())
    assert (flags["settings"].data, flags["resume"]) == ("/a b/c", Path("auto"))


def test_the_kubernetes_file_starts_a_command_that_parses(parsed):
    service, job = yaml.safe_load_all((RECIPES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = [argument.replace("$(JOB_COMPLETION_INDEX)", "1") for argument in container["args"]]
    processes = parsed([*container["command"], *arguments])["processes"]
    host, _, port = processes.coordinator.partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert (port.isdigit(), processes.process_id) == (True, 1)
    assert processes.num_processes == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert pod["subdomain"] == service["metadata"]["name"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
def test_the_wheel_installs_the_library_and_the_reference_alone(tmp_path):
    """From a copy, so that no build folder is left in the tree."""
    import shutil
    import sys
    import zipfile

    source = tmp_path / "source"
    source.mkdir()
    for name in ("flax_resblock", "torch_ref", "train", "parity_tests", "benchmarks"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    build = ["wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", "dist", "-q"]
    subprocess.run([sys.executable, "-m", "pip", *build], cwd=source, check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"flax_resblock", "torch_ref"}
    assert {"flax_resblock/py.typed", "flax_resblock/training/loop.py"} <= set(names)
