"""``convert --torch``: a checkpoint is read as the weights of the user's module, which is run."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch

from flax_resblock import load
from flax_resblock.cli import run
from flax_resblock.parity.oracle import relative_l2
from parity_tests.support import output, torch_output

SOURCE = """
import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inside, outside, stride, eps):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside, eps=eps)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside, eps=eps)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside, eps=eps)
            )

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Net(nn.Module):
    def __init__(self, classes=5, act="relu", pool="mean", eps=1e-3, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=eps)
        self.layer1 = nn.Sequential(Block(8, 8, 1, eps))
        self.layer2 = nn.Sequential(Block(8, 12, 2, eps), Block(12, 12, 1, eps))
        self.fc = nn.Linear(12, classes)
        self.act, self.pool = act, pool
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.running_mean, 0, 0.3)
                nn.init.uniform_(layer.running_var, 0.01, 0.3)
                nn.init.uniform_(layer.weight, 0.4, 1.4)

    def forward(self, x):
        x = getattr(F, self.act)(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        x = F.avg_pool2d(x, 4).mean((2, 3)) if self.pool == "fixed" else x.mean((2, 3))
        return self.fc(x)


def fails(classes=5):
    raise OSError("no such dataset")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(SOURCE)
    return tmp_path


def network(**arguments):
    names: dict = {}
    exec(compile(SOURCE, "net.py", "exec"), names)
    return names["Net"](**arguments).eval()


def saved(**arguments):
    module = network(**arguments)
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state}, "net.pth")
    return module


def convert(*more):
    return run(["convert", "net.pth", "out.safetensors", "--torch", "net.py:Net", *more])


@pytest.mark.slow
def test_the_certificate_says_with_what_it_was_compared(folder, capsys):
    """eps 1e-3, which no tensor tells, is the module's."""
    module = saved()
    assert convert() == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "net.py:Net computes the same: float64" in text
    assert "assumed:" not in text
    entry = json.loads((folder / "out.safetensors.parity.json").read_text())["outputs"][
        "out.safetensors"
    ]
    assert entry["verification"]["passed"]
    assert entry["verification"]["compared_with"].startswith("net.py:Net, your own module")
    assert (
        entry["source"]["sha256"] == hashlib.sha256((folder / "net.pth").read_bytes()).hexdigest()
    )
    seen = entry["source"]["module"]
    assert seen["spec"] == "net.py:Net"
    assert seen["sha256"] == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert seen["image_size"] == [32, 32]
    assert 0 < seen["float64"] <= 1e-12
    assert 0 < seen["float32"] <= 1e-5
    images = np.random.default_rng(0).normal(0.2, 1, (3, 19, 22, 3)).astype(np.float32)
    truth = torch_output(module, images)
    assert relative_l2(output(load("out.safetensors"), images), truth) < 1e-5
    assert run(["verify", "--certificate", "out.safetensors.parity.json"]) == 0


def test_what_computes_something_else_is_refused_and_nothing_written(folder, capsys):
    arguments = {"act": "leaky_relu"}
    saved(**arguments)
    assert convert("--kwargs", json.dumps(arguments)) == 2
    assert (
        "does not compute what the Flax network built from it computes" in capsys.readouterr().err
    )
    assert not (folder / "out.safetensors").exists()
    assert not list(folder.glob("*parity.json"))


@pytest.mark.slow
def test_a_pool_of_fixed_size_is_said(folder, capsys):
    """At 16x16 pixels it is the mean over all; at 19x17 one row of pixels is left out."""
    saved(pool="fixed")
    more = ["--kwargs", '{"pool": "fixed"}', "--image-size", "8", "8"]
    assert convert(*more) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "made for images of 8x8: on 11x9 Net computes something else" in text
    saved()
    assert run(["convert", "net.pth", "free.safetensors", "--torch", "net.py:Net"]) == 0
    assert "made for images" not in capsys.readouterr().out  # the control


def test_another_eps_in_the_module_shows_in_float64(folder, capsys):
    """The tensors are loaded into what --torch creates; its eps is what Flax takes."""
    saved(eps=1e-3)
    assert convert("--kwargs", '{"eps": 0.1}') == 0
    capsys.readouterr()
    images = np.ones((1, 9, 9, 3), np.float32)
    assert load("out.safetensors").stem.norm.eps == 0.1
    other = network(eps=0.1)
    truth = other(torch.ones(1, 3, 9, 9)).detach().numpy()
    assert relative_l2(output(load("out.safetensors"), images), truth) < 1e-5


BAD = {
    "code that raises": (["--torch", "net.py:fails"], "calling it raised OSError: no such dataset"),
    "other classes": (
        ["--torch", "net.py:Net", "--kwargs", '{"classes": 7}'],
        "cannot be loaded into Net: size mismatch for fc.bias",
    ),
    "wrong arguments": (["--torch", "net.py:Net", "--kwargs", '{"width": 7}'], "raised TypeError"),
    "no JSON": (["--torch", "net.py:Net", "--kwargs", "{"], "is no JSON"),
    "kwargs alone": (["--kwargs", "{}"], "--kwargs and --image-size go with --torch"),
    "no size": (["--torch", "net.py:Net", "--image-size", "0", "3"], "two positive numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_paragraph_and_leaves_nothing(case, folder, capsys):
    saved()
    flags, words = BAD[case]
    assert run(["convert", "net.pth", "out.safetensors", *flags]) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert sorted(path.name for path in folder.iterdir()) == ["net.pth", "net.py"]


def test_tensors_that_are_not_the_modules_are_listed(folder, capsys):
    state = saved().state_dict()
    del state["layer2.1.bn2.weight"]
    torch.save({**state, "extra.weight": torch.ones(2)}, "net.pth")
    assert convert() == 2
    error = capsys.readouterr().err
    assert "missing     layer2.1.bn2.weight" in error
    assert "unexpected  extra.weight" in error
    assert convert("--ignore", "extra.*") == 2  # still one is missing
    state["layer2.1.bn2.weight"] = torch.ones(12)
    torch.save({**state, "extra.weight": torch.ones(2)}, "net.pth")
    assert convert("--ignore", "extra.*") == 0
    assert "ignored extra.weight" in capsys.readouterr().out
