"""Squeeze-and-excitation as well-known repositories spell it: read with no flags, and written back
bit for bit."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flax_resblock import AssumptionWarning, BlockConfig, from_torch, to_torch
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.checkpoint.unwrap import record_of
from flax_resblock.convert.opening import interpret
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.reference import ReferencePair
from parity_tests.families import randomise
from parity_tests.support import assert_same_bits, fast_only, output, torch_output


class Matrices(nn.Module):
    """Two linear layers without biases, as moskomule's."""

    def __init__(self, channels: int, bias: bool = False) -> None:
        super().__init__()
        ends = channels, channels // 16
        layers = nn.Linear(*ends, bias=bias), nn.ReLU(), nn.Linear(*ends[::-1], bias=bias)
        self.fc = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class Pixels(nn.Module):
    """Two convolutions with biases, as EfficientNets have them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels // 4, 1)
        self.conv_expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(self.conv_reduce(means).relu()).sigmoid()


class Block(nn.Module):
    """A basic block whose channels are weighed by a module of its own, usually before the
    addition."""

    def __init__(self, inputs: int, outputs: int, stride: int, squeeze, place: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.se = squeeze(outputs)
        self.place = place
        if stride > 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = self.downsample(x) if hasattr(self, "downsample") else x
        if self.place == "output":
            return self.se(F.relu(y + skip))
        return F.relu(self.se(y + skip) if self.place == "sum" else self.se(y) + skip)


class PreActivationBlock(nn.Module):
    """A block in pre-activation order with both convolutions of the squeeze in it, as
    kuangliu's."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
        self.fc1 = nn.Conv2d(outputs, outputs // 16, 1)
        self.fc2 = nn.Conv2d(outputs // 16, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.bn1(x))
        skip = self.shortcut(y) if hasattr(self, "shortcut") else x
        y = self.conv2(F.relu(self.bn2(self.conv1(y))))
        weights = F.avg_pool2d(y, y.shape[2:])
        return y * self.fc2(F.relu(self.fc1(weights))).sigmoid() + skip


class Network(nn.Module):
    """A network of CIFAR's size."""

    def __init__(self, block, head: str, *options) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = nn.Sequential(block(24, 24, 1, *options), block(24, 24, 1, *options))
        self.layer2 = nn.Sequential(block(24, 40, 2, *options))
        self.add_module(head, nn.Linear(40, 5))
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.get_submodule(self.head)(x.mean((2, 3)))


NETWORKS = {
    "senet": (Block, "fc", Matrices, "branch"),
    "conv_reduce": (Block, "fc", Pixels, "branch"),
    "kuangliu": (PreActivationBlock, "linear"),
}
INNER = {
    "senet": (1 / 16, 1, False),
    "conv_reduce": (1 / 4, 1, True),
    "kuangliu": (1 / 16, 1, True),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Network(*NETWORKS[name]))


def outputs(module: nn.Module, model) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(1).normal(0.2, 1, (3, 17, 14, 3))
    theirs = torch_output(module, images)
    return output(model, images), theirs


@pytest.mark.parametrize("name", fast_only(["kuangliu"], NETWORKS))
def test_a_repositorys_squeeze_is_read_with_no_flags_and_goes_back(name):
    module = network(name)
    state = state_to_numpy(module.state_dict())
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = from_torch(module.state_dict())
        assert relative_l2(*outputs(module, model)) <= FLOAT64_LIMIT
        naming = interpret(record_of(module.state_dict(), "it")).state_map.naming
        assert naming.name == name
        config = model.config
        told = config.attention_ratio, config.attention_multiple, config.attention_bias
        assert (config.attention, told) == ("se", INNER[name])
        assert_same_bits(to_torch(model, naming), state)
        images = np.random.default_rng(2).normal(0.2, 1, (3, 17, 14, 3))
        pair = ReferencePair(config, state, {}, naming=naming, module=module)
        found = compare_pair(pair, images, Plan(gradients=True, precisions=("float64",)))
        assert found.passed, [row for row in found.measurements if not row.verdict.passed][:3]
        stated = {row.quantity for row in found.measurements}
        assert {"train forward", "running statistics", "parameter gradient"} <= stated


@pytest.mark.parametrize("place", fast_only(["output"], ["sum", "output"]))
def test_a_squeeze_after_the_addition_is_another_network_and_a_module_says_so(place):
    """Its tensors are those of the usual place, which is announced; the module is found out."""
    torch.manual_seed(0)
    module = randomise(Network(Block, "fc", Matrices, place))
    state = state_to_numpy(module.state_dict())
    with jax.enable_x64(True):
        with pytest.warns(AssumptionWarning, match="attention_place='sum'"):
            assert from_torch(module.state_dict()).config.attention_place == "branch"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = from_torch(module)
        assert model.config.attention_place == place
        assert relative_l2(*outputs(module, model)) <= FLOAT64_LIMIT
        assert_same_bits(to_torch(model, "senet"), state)
        for other in ("branch", "sum", "output"):  # the others are the negative controls
            told = from_torch(state, assumptions={"attention_place": other}, assume="known")
            assert (told.config == model.config) == (other == place)
            assert other == place or relative_l2(*outputs(module, told)) > 100 * FLOAT64_LIMIT


def test_a_place_of_attention_that_changes_nothing_is_the_usual_one():
    sizes = {"in_channels": 4, "out_channels": 4}
    assert BlockConfig(**sizes, attention_place="sum") == BlockConfig(**sizes)
    for options in ({"last_activation": False}, {"order": "pre_activation"}):
        behind = [
            BlockConfig(**sizes, **options, attention="se", attention_place=place)
            for place in ("sum", "output")
        ]
        assert behind[0] == behind[1]
        assert behind[0] != replace(behind[0], attention_place="branch")
