"""Runs that real training programs have saved go on without flags, come back, and are resumed."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import flax_resblock
from flax_resblock import load_run, training
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT
from flax_resblock.runs.ticks import BATCH, EPOCH, Unit
from parity_tests import runs
from parity_tests.programs import BACK, ON
from parity_tests.support import installed_apart, worst

ENGINE = f"saved/global_step{runs.DONE * runs.STEPS}/mp_rank_00_model_states.pt"
PROGRAMS: dict[str, tuple[str, Unit | None]] = {
    "distributed": ("saved", BATCH),
    "fsdp": ("saved.pt", BATCH),
    "accelerate": ("saved", Unit(2)),
    "transformers": (f"checkpoint-{runs.DONE * runs.STEPS}", BATCH),
    "timm": ("saved.pth.tar", EPOCH),
    "mmengine": (f"epoch_{runs.DONE}.pth", EPOCH),
    "lightning": ("saved.ckpt", BATCH),
    "ignite": ("saved.pt", BATCH),
    "torchvision": ("checkpoint.pth", EPOCH),
    "fastai": ("saved.pth", None),
    "fastai's Adam": ("saved.pth", None),
    "fastai's Lamb": ("saved.pth", None),
    "deepspeed": (ENGINE, BATCH),
    "zero": (ENGINE, BATCH),
}
"""What each saves, and how often it steps the scheduler; None for a constant rate."""
SEVERAL = ("accelerate", "distributed", "fsdp", "deepspeed", "zero")
"""Those that run in two processes."""
SAID: dict[str, dict[str, Any]] = {"fastai's Lamb": {"optimizer": "lamb"}}
"""What a file does not tell."""
PACKAGES = (
    *("accelerate==1.15.0", "psutil", "pytorch-lightning==2.6.6", "lightning-utilities"),
    *("torchmetrics", "pytorch-ignite==0.5.5"),
    *("mmengine==0.10.7", "addict", "yapf", "termcolor", "opencv-python-headless"),
    *("fastai==2.8.12", "fastcore", "fastprogress<1.1", "fasttransform", "fastdownload"),
    *("plum-dispatch<2.10", "beartype", "pandas", "cloudpickle"),
    *("deepspeed==0.19.8", "hjson", "py-cpuinfo", "einops", "ninja", "msgpack"),
)
"""Without what they depend on and this library has."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return installed_apart(tmp_path_factory.mktemp("packages"), PACKAGES)


PAGE = Path(__file__).parents[1] / "docs" / "training-runs.md"


ROWS = (
    *("distributed", "fsdp", "accelerate", "transformers", "timm", "mmengine", "lightning"),
    *("ignite", "torchvision", "fastai", "fastai's Adam", "fastai's Lamb"),
    *("deepspeed", "zero"),
)
"""The programs in the order of the page."""


def _row(program: str) -> str:
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("| program | version | processes |")[1].split("\n\n")[0]
    return dict(zip(ROWS, table.strip().splitlines()[2:], strict=True))[program]


def test_every_program_is_documented_with_its_version():
    assert set(ROWS) == PROGRAMS.keys()
    table = "\n".join(map(_row, PROGRAMS))
    for name in ("accelerate", "lightning", "ignite", "mmengine", "fastai", "deepspeed"):
        (pinned,) = (one for one in PACKAGES if name in one and "==" in one)
        version = pinned.partition("==")[2].rpartition(".")[0]
        assert re.search(rf"^\| {name}.* \| {version} \| ", table, re.M | re.I), pinned


def run_program(program: str, task: str, folder: Path, packages: Path) -> None:
    """Runs a program."""
    command = [sys.executable, "-m", "parity_tests.programs", program, task, str(folder)]
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    ranks = range(2) if program in SEVERAL else range(1)
    running = []
    for rank in ranks:
        own = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if len(ranks) > 1 else {}
        running.append(
            subprocess.Popen(
                command,
                cwd=Path(__file__).parents[1],
                env={
                    **os.environ,
                    **own,
                    "PYTHONPATH": str(packages),
                    "ACCELERATE_USE_CPU": "1",
                    "OMP_NUM_THREADS": "1",
                },
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        for process in running:
            said, _ = process.communicate(timeout=300)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in running:
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.filterwarnings("ignore")
def test_a_run_of_the_program_goes_on_here_and_there_again(program, packages, tmp_path):
    saved, unit = PROGRAMS[program]
    run_program(program, "begin", tmp_path, packages)
    stayed = dict(np.load(tmp_path / "stayed.npz"))
    rates = stayed.pop("rates")
    with jax.enable_x64(True):
        said = SAID.get(program, {})
        model, run = load_run(tmp_path / saved, **said)
        assert run.problem is None
        assert (run.schedule.unit if run.schedule else None) == unit
        assert all(entry.use for entry in run.found)
        decay = run.settings.get("ema", 0.0)
        more = {"ema": decay, "clip_norm": run.settings.get("clip_norm")}
        config = runs.config(epochs=runs.DONE + ON, **more)
        data = runs.few_digits()
        history = training.fit(model, data, config, run=run, progress=False)
        assert len(history.steps) == ON * runs.STEPS
        ours = flax_resblock.to_torch(model)
        if decay:
            flax_resblock.save(model, tmp_path / "whole.pth", run=history.run)
            whole = torch.load(tmp_path / "whole.pth", weights_only=True)[run.average.name]
            theirs = torch.load(tmp_path / "average.pth", weights_only=True)
            averages = {k.removeprefix(run.average.prefix): v for k, v in whole.items()}
            floats = [k for k, v in theirs.items() if v.is_floating_point()]
            pair = ({k: one[k].numpy() for k in floats} for one in (averages, theirs))
            assert worst(*pair) <= TRAJECTORY_LIMIT
        again, _ = load_run(tmp_path / saved, **said)
        config = runs.config(epochs=runs.DONE + ON - BACK, **more)
        half = training.fit(again, data, config, run=run, progress=False)
        back = tmp_path / ("back.pth" if saved != ENGINE else "back/it/mp_rank_00_model_states.pt")
        back.parent.mkdir(parents=True, exist_ok=True)
        flax_resblock.save(again, back, run=half.run)
    # ZeRO is in float32: a loop that has the same went on in float64 and says how exact it is
    exact = dict(np.load(tmp_path / "exact.npz")) if program == "zero" else stayed
    limit = 4 * worst(stayed, exact) if program == "zero" else TRAJECTORY_LIMIT
    assert worst(ours, exact) <= limit
    found = [step.learning_rate for step in history.steps[:: runs.STEPS]]
    np.testing.assert_allclose(found, rates, rtol=1e-12)
    error, (*_, documented) = worst(ours, exact), _row(program).strip(" |").split(" | ")
    assert error / 10 <= float(documented) <= 10 * error, f"{error:.0e}"
    run_program(program, "resume", tmp_path, packages)
    resumed = dict(np.load(tmp_path / "resumed.npz"))
    np.testing.assert_allclose(resumed.pop("rates"), rates[-BACK:], rtol=1e-12)
    assert worst(resumed, exact) <= limit
