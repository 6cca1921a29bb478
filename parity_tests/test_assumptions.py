"""What no tensor tells is announced: every assumption, with what changes it, once per load."""

from __future__ import annotations

import json
import re
import warnings

import numpy as np
import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import AssumptionWarning, from_torch, load, load_run
from flax_resblock.cli import run
from flax_resblock.cli.wording import in_flags
from flax_resblock.parity.certificate import certificate_of
from flax_resblock.parity.oracle import relative_l2
from parity_tests.support import output, torch_output
from torch_ref import ResNet

SMALL = {"depths": (1, 1), "widths": (6, 10), "stem_width": 4, "num_classes": 3}
F = torch.nn.functional


class Own(ResNet):
    """A 3x3 stem, option A and torchvision's names; what a forward pass may do besides."""

    def __init__(self, *, projection=False, eps=1e-5, **choices):
        super().__init__(**SMALL, stem="cifar", shortcut="projection" if projection else "zero_pad")
        self.projection, self.choices = projection, choices
        for layer in self.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eps = eps
                torch.nn.init.normal_(layer.running_mean, 0, 0.3)
                torch.nn.init.uniform_(layer.running_var, 0.1, 0.3)
        self.eval()

    def forward(self, x):
        said = self.choices.get
        act, skipped = said("act", F.relu), said("skipped", ())
        x = self.bn1(self.conv1(x))
        x = x if "stem" in skipped else act(x)
        if said("stem_pool"):
            x = F.max_pool2d(x, 3, 2, 1)
        for block in (*self.layer1, *self.layer2):
            y = block.bn1(block.conv1(x))
            y = block.bn2(block.conv2(y if "block" in skipped else act(y)))
            x = act(said("scale", 1.0) * y + self.shortcut(block, x, y))
        x = self.fc(x.amax((2, 3)) if said("maximum") else x.mean((2, 3)))
        return x.softmax(-1) if said("softmax") else x

    def shortcut(self, block, x, y):
        more, step = y.shape[1] - x.shape[1], x.shape[2] // y.shape[2]
        if self.projection:
            if block.downsample is None:
                return x
            pooled = F.max_pool2d(x, 3, 1, 1) if self.choices.get("pooled_shortcut") else x
            return block.downsample(pooled)
        padding = (0, more) if self.choices.get("behind") else (more // 2, more - more // 2)
        return F.pad(x[:, :, ::step, ::step], (0, 0, 0, 0, *padding))


UNTOLD = {
    "stem_pool": (True, "no pooling follows the stem (`stem_pool='3x3'|'3x3_zeros'|'2x2'` if not)"),
    "act": (F.silu, "the activation is ReLU (`activation='leaky_relu'|'gelu'|'silu'` if not)"),
    "eps": (0.1, "eps is 1e-5 and momentum 0.1 in every norm (`eps=...` if not)"),
    "behind": (True, "half of them in front of the old channels and half behind"),
    "maximum": (True, "the head takes the mean over all pixels"),
}
UNTOLD_ALONE = {
    "pooled_shortcut": (True, "has the stride of its block, and no pooling is beside it"),
    "skipped": (
        ("block",),
        "the activation follows every norm but that of a shortcut and the last",
    ),
    "scale": (0.3, "each block adds its input to what it computes, both as they are"),
    "softmax": (True, "nothing follows the head"),
}
"""The same of what the command's test does not repeat."""


def warnings_of(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(one.message) for one in caught if one.category is AssumptionWarning]


def outputs(module, model):
    images = np.random.default_rng(0).normal(0.3, 1, (4, 12, 14, 3)).astype(np.float32)
    truth = torch_output(module, images)
    return output(model, images), truth


def test_the_network_of_these_tests_is_what_is_assumed():
    """The control of the test below."""
    torch.manual_seed(0)
    for projection in (False, True):
        module = Own(projection=projection)
        assert relative_l2(*outputs(module, from_torch(module.state_dict(), assume="known"))) < 1e-5


@pytest.mark.parametrize("what", UNTOLD | UNTOLD_ALONE)
def test_what_makes_a_network_wrong_was_announced(what):
    """Read from weights alone the network is another one, and the warning has the line."""
    value, line = (UNTOLD | UNTOLD_ALONE)[what]
    torch.manual_seed(0)
    module = Own(**{what: value}, projection=what == "pooled_shortcut")
    found = []
    (text,) = warnings_of(lambda: found.append(from_torch(module.state_dict())))
    assert line in text
    assert relative_l2(*outputs(module, found[0])) > 1e-3


def test_saying_it_removes_its_line_and_is_done():
    torch.manual_seed(0)
    module = Own(act=F.silu, eps=0.1, stem_pool=True)
    found = []

    def told():
        said = {"activation": "silu", "stem_pool": "3x3"}
        found.append(from_torch(module.state_dict(), assumptions=said, eps=0.1))

    (text,) = warnings_of(told)
    for flag in ("--activation", "--stem-pool", "--eps"):
        assert flag not in text
    assert relative_l2(*outputs(module, found[0])) < 1e-5


@pytest.mark.parametrize("reads", [load, load_run, from_torch])
def test_assume_known_silences_it(reads, tmp_path):
    module = Own()
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.zeros(1, 3, 8, 8)).sum().backward()
    optimizer.step()
    path = tmp_path / "run.pth"
    torch.save({"model": module.state_dict(), "optimizer": optimizer.state_dict()}, path)
    assert len(warnings_of(lambda: reads(path))) == 1
    assert warnings_of(lambda: reads(path, assume="known")) == []


def test_a_published_network_gets_one_line():
    state = ResNet().state_dict()  # torchvision's resnet18
    (text,) = warnings_of(lambda: from_torch(state))
    lines = [line for line in text.splitlines() if "assumed:" in line]
    assert lines == [
        "  assumed: it computes what the published resnet18 does, with its activation, strides, "
        "pooling and eps"
    ]
    own = ResNet(depths=(2, 2, 2, 1)).state_dict()
    (text,) = warnings_of(lambda: from_torch(own))
    assert len([line for line in text.splitlines() if "assumed:" in line]) >= 6


def test_a_module_and_a_file_of_this_library_leave_nothing_to_assume(tmp_path):
    module = ResNet(**SMALL, stem="cifar", shortcut="zero_pad").eval()
    models = []
    assert warnings_of(lambda: models.append(from_torch(module))) == []
    for name in ("net.pth", "net.safetensors", "net"):
        flax_resblock.save(models[0], tmp_path / name)
        assert warnings_of(lambda name=name: load(tmp_path / name)) == []
    (tmp_path / "net.pth.sha256.json").unlink()
    assert len(warnings_of(lambda: load(tmp_path / "net.pth"))) == 1


def test_the_command_and_the_certificate_say_each_and_the_flags_are_taken(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(Own().state_dict(), tmp_path / "net.pth")
    out = tmp_path / "out.safetensors"
    assert run(["convert", str(tmp_path / "net.pth"), str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    notes = json.loads(certificate_of(out).read_text())["outputs"][out.name]["notes"]
    for _, line in UNTOLD.values():
        assert in_flags(line) in text
        assert any(in_flags(line) in note for note in notes)
    flags = set(re.findall(r"\((--[a-z-]+)", text))
    assert {"--activation", "--eps", "--dilated-stages", "--antialias"} <= flags
    values = {"--activation": ["silu"], "--eps": ["0.1"], "--antialias": ["none"]}
    values |= {"--dilated-stages": ["2"], "--first-stride": ["1"]}
    values |= {"--stem-stride": ["2"], "--stem-pool": ["2x2"], "--shortcut": ["none"]}
    values |= {"--branch-activation": ["True"]}
    values |= {"--last-activation": ["False"], "--head-pool": ["max"], "--padding": ["same"]}
    for flag in flags:
        assert run(["inspect", str(tmp_path / "net.pth"), flag, *values[flag]]) == 0, flag
        said = " ".join(capsys.readouterr().out.split())
        assert f"({flag}" not in said
    assert run(["inspect", str(tmp_path / "net.pth"), "--assume", "known"]) == 0
    assert "assumed" not in capsys.readouterr().out


def test_eps_that_was_said_is_computed_with_and_written(tmp_path):
    torch.manual_seed(0)
    module = Own(eps=0.1)
    torch.save(module.state_dict(), tmp_path / "net.pth")
    out = tmp_path / "out.pth"
    assert run(["convert", str(tmp_path / "net.pth"), str(out), "--eps", "0.1"]) == 0
    assert relative_l2(*outputs(module, load(out))) < 1e-5


def test_what_was_left_out_is_said_where_the_state_dict_is_given_back():
    network = ResNet(**SMALL, stem="cifar", shortcut="zero_pad")
    state = network.state_dict()
    with pytest.warns(UserWarning, match="ignored fc"):
        model = from_torch(state, ignore=["fc.*"], assume="known")
    for one in (model, nnx.merge(*nnx.split(model))):
        with pytest.warns(UserWarning, match=r"2 tensors .* left out .*: fc\.weight, fc\.bias"):
            flax_resblock.to_torch(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flax_resblock.to_torch(from_torch(state, assume="known"))  # the control
