"""Newcomers: what each of them has, and the page of the documentation that they copy from."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from flax_resblock.cli import run
from parity_tests import documents, runs
from torch_ref import ResNet

SMALL = {"block": "bottleneck", "depths": (1, 1), "widths": (4, 8), "stem_width": 8}
"""Stands for a resnet50: its stem, its kind of block, its names."""
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 5, stride=4, padding=2)
        self.norm = nn.BatchNorm2d(6)
        self.gate = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        y = torch.nn.functional.silu(self.norm(self.stem(x)))
        weight = torch.sigmoid(self.gate(y.mean(dim=(2, 3))))
        return self.head((y * weight[:, :, None, None]).mean(dim=(2, 3)))
"""


def _pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 2)):
        for name in ("ant", "bee", "cat"):
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}.png")


def _checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    torch.save(ResNet(**SMALL, num_classes=1000).state_dict(), folder / "resnet50.pth")
    made = f"return ResNet(**{SMALL}, num_classes=1000)"
    (folder / "net.py").write_text(f"from torch_ref import ResNet\n\ndef Net():\n    {made}\n")


def _own_network(folder: Path) -> None:
    _pictures(folder / "pictures")
    (folder / "net.py").write_text(NET)
    scope: dict[str, Any] = {}
    exec(NET, scope)
    state = scope["Net"]().state_dict()
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, folder / "weights.pth")
    runs.plain_loop(_begun(scope["Net"]()), folder).rename(folder / "run.pth")


def _stopped_run(folder: Path) -> None:
    _pictures(folder / "pictures")
    torch.manual_seed(0)
    runs.lightning(_begun(ResNet(**SMALL, num_classes=3)), folder).rename(folder / "last.ckpt")


def _begun(model: torch.nn.Module) -> runs.TorchRun:
    """A run of two epochs of six, of one step each."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    going = runs.TorchRun(
        model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6), True
    )
    for _ in range(2):
        model(torch.randn(24, 3, 32, 32)).square().mean().backward()
        optimizer.step()
        going.scheduler.step()
    going.step = going.epoch = 2
    return going


def _tpu(folder: Path) -> None:
    _checkpoint(folder)
    _pictures(folder / "pictures")


class Newcomer(NamedTuple):
    """Somebody who reads the start page.

    Attributes:
      page: The page that the start page leads them to.
      has: Writes what they have into a folder.
      skipped: What the lines have in common that a test cannot run: they install packages, or
        need a compiler or data that are not here.
      has_torch: Whether PyTorch is installed.
    """

    page: str
    has: Callable[[Path], None]
    skipped: tuple[str, ...] = ("pip install",)
    has_torch: bool = True


NEWCOMERS = {
    "a checkpoint of torchvision": Newcomer("how-to/convert", _checkpoint),
    "a network of their own": Newcomer("port", _own_network),
    "a stopped Lightning run": Newcomer("training-runs", _stopped_run),
    "two implementations that differ": Newcomer("how-to/verify", lambda folder: None),
    "a TPU without PyTorch": Newcomer(
        "how-to/many-devices", _tpu, ("pip install", "aot", "--data imagenet "), has_torch=False
    ),
}


def copied(newcomer: Newcomer) -> list[tuple[str, str]]:
    """What the newcomer copies from the page, in its order: ``bash`` lines and Python blocks."""
    text = (documents.DOCS / f"{newcomer.page}.md").read_text(encoding="utf-8")
    found = []
    for kind, block in re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL):
        for code in block.splitlines() if kind == "bash" else [block]:
            if not any(one in code for one in newcomer.skipped):
                found.append((kind, code))
    return found


def walk(name: str) -> int:
    """Runs in the current folder what the newcomer copies; raises where it does not do what the
    page says. Returns the number of things copied."""
    steps, scope = copied(NEWCOMERS[name]), {"__name__": "__main__"}
    for kind, code in steps:
        if kind == "bash":
            program, *arguments = shlex.split(code, comments=True)
            assert program == "flax-resblock", code
            assert run(arguments) == 0, code
            continue
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(code, "<page>", "exec"), scope)
        said = documents.stated(code)
        assert output.getvalue().splitlines()[: len(said)] == said, output.getvalue()
    return len(steps)
