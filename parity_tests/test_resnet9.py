"""ResNet-9 as PyTorch tutorials spell it: read with no flags, by name and from a module, and
written back bit for bit."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import flax_resblock
from flax_resblock import AssumptionWarning, InputError, ResNetConfig, from_torch, to_torch
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import name_of, walk
from flax_resblock.convert import NAMINGS
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.reference import ReferencePair
from parity_tests.families import randomise
from parity_tests.support import assert_same_bits, output, torch_output

SMALL = (6, 8, 10, 12)


def unit(inputs: int, outputs: int, bias: bool, *more: nn.Module) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), *more)


class ResNet9(nn.Module):
    """The tutorial's network; with ``after`` its branches end without an activation, and that
    function is applied to each sum."""

    def __init__(self, widths=SMALL, bias=True, dropout=0.2, after=None) -> None:
        super().__init__()
        first, second, third, fourth = widths
        self.conv1 = unit(3, first, bias)
        self.conv2 = unit(first, second, bias, nn.MaxPool2d(2))
        self.res1 = nn.Sequential(unit(second, second, bias), unit(second, second, bias))
        self.conv3 = unit(second, third, bias, nn.MaxPool2d(2))
        self.conv4 = unit(third, fourth, bias, nn.MaxPool2d(2))
        self.res2 = nn.Sequential(unit(fourth, fourth, bias), unit(fourth, fourth, bias))
        layers = [nn.MaxPool2d(4), nn.Flatten(), nn.Dropout(dropout), nn.Linear(fourth, 10)]
        self.classifier = nn.Sequential(*(one for one in layers if getattr(one, "p", 1)))
        self.after = after or (lambda x: x)
        for branch in (self.res1, self.res2) if after else ():
            branch[1] = branch[1][:2]

    def forward(self, x):
        x = self.conv2(self.conv1(x))
        x = self.conv4(self.conv3(self.after(self.res1(x) + x)))
        return self.classifier(self.after(self.res2(x) + x))


def network(**options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(ResNet9(**options))


def outputs(module: nn.Module, model) -> tuple[np.ndarray, np.ndarray]:
    images = np.random.default_rng(1).normal(0.2, 1, (3, 37, 33, 3))
    theirs = torch_output(module, images)
    return output(model, images), theirs


def test_the_tutorials_network_is_read_with_no_flags_equals_it_and_goes_back():
    module = network()
    state = state_to_numpy(module.state_dict())
    with jax.enable_x64(True):
        with pytest.warns(AssumptionWarning, match="the ResNet9 of PyTorch tutorials"):
            model = from_torch(module.state_dict())
        assert relative_l2(*outputs(module, model)) <= FLOAT64_LIMIT
        assert_same_bits(to_torch(model, "resnet9"), state)
        assert list(to_torch(model, "resnet9")) == list(state)
        config = model.config
        wrong = {"branch_activation": False, "head_pool": "mean", "first_stride": 1}
        for name, value in wrong.items():  # the negative controls
            other = from_torch(state, assumptions={name: value}, assume="known")
            assert relative_l2(*outputs(module, other)) > 100 * FLOAT64_LIMIT, name
        module.classifier[2] = nn.Identity()  # random numbers are no part of the comparison
        images = np.random.default_rng(2).normal(0.2, 1, (3, 37, 33, 3))
        pair = ReferencePair(config, state, {}, naming=NAMINGS["resnet9"], module=module)
        found = compare_pair(pair, images, Plan(gradients=True, precisions=("float64",)))
    assert found.passed, [row for row in found.measurements if not row.verdict.passed][:3]
    stated = {row.quantity for row in found.measurements}
    assert {"train forward", "running statistics", "parameter gradient"} <= stated
    assert {"transition2.pool", "stage1.0.norm2"} <= {row.slot for row in found.measurements}


def test_its_dropout_is_said_to_be_left_out():
    with pytest.warns(UserWarning, match="dropout in front of its head.* is left out"):
        from_torch(network().state_dict(), assume="known")
    plain = network(dropout=0, bias=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the control, without biases
        model = from_torch(plain.state_dict(), assume="known")
    assert (model.config.conv_bias, model.config.stem_bias) == (False, False)
    assert_same_bits(to_torch(model, "resnet9_plain"), state_to_numpy(plain.state_dict()))


@pytest.mark.parametrize("after", [None, torch.relu, nn.Identity()])
def test_a_module_tells_where_its_activations_are(after):
    module = network(dropout=0, after=after)
    with jax.enable_x64(True):
        model = from_torch(module)
        assert relative_l2(*outputs(module, model)) <= FLOAT64_LIMIT
    assert model.config.branch_activation == (after is None)
    assert model.config.last_activation == (after is torch.relu)


def test_logits_that_are_scaled_are_refused_as_another_network():
    module = network(dropout=0)
    module.classifier.append(nn.Hardtanh())
    with pytest.raises(InputError, match="computes something else"):
        from_torch(module, image_size=(32, 32))


def test_resnet9_is_a_named_network():
    model = flax_resblock.create("resnet9", rngs=nnx.Rngs(0))
    assert name_of(replace(model.config, num_classes=3)) == "resnet9"
    assert sum(slot.parameters for slot in walk(model.config)) == 6_575_370
    module = ResNet9((64, 128, 256, 512))
    assert sum(one.numel() for one in module.parameters()) == 6_575_370
    state = module.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert from_torch(state, architecture="resnet9").config == model.config
        assert from_torch(to_torch(model)).config == model.config  # under this library's names


@pytest.mark.slow
def test_other_networks_with_pooled_transitions_equal_pytorch():
    """Bottlenecks, attention and group norms, with pooling that pads as TensorFlow does."""
    config = ResNetConfig(
        depths=(0, 1), widths=(4, 8), stem_width=8, num_classes=3, block="bottleneck",
        transition="pooled", padding="same", norm="group", norm_groups=4, attention="se",
        attention_place="sum", first_stride=2,
    )  # fmt: skip
    images = np.random.default_rng(2).normal(0.2, 1, (3, 37, 35, 3))
    plan = Plan(gradients=True, precisions=("float64",))
    pair = ReferencePair.random(config)
    found = compare_pair(pair, images, plan)
    assert found.passed, [row for row in found.measurements if not row.verdict.passed][:3]
    assert "transition2.pool" in {row.slot for row in found.measurements}


def test_a_pooled_transition_is_refused_with_what_needs_strides():
    sizes = {"depths": (1, 0), "widths": (8, 16), "stem": "cifar", "transition": "pooled"}
    assert ResNetConfig(**sizes, stride_on="1x1") == ResNetConfig(**sizes)
    for wrong in ({"order": "pre_activation"}, {"antialias": "blur"}, {"dilated_stages": (2,)}):
        with pytest.raises(ValueError, match="transition='pooled' goes with"):
            ResNetConfig(**sizes, **wrong)
    for depths in ((0, 0), (1, -1), (1, "1")):
        with pytest.raises(ValueError, match="at least one altogether"):
            ResNetConfig(**{**sizes, "depths": depths})
    with pytest.raises(ValueError, match="must be positive integers"):
        ResNetConfig(**{**sizes, "transition": "strided"})
