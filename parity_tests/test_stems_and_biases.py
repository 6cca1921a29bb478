"""Biases in front of norms, and stems of any stride and pooling: carried bit for bit, read from
weights and modules, folded, trained, named where another format cannot hold them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import (
    BlockConfig,
    CheckpointError,
    InputError,
    ResNetConfig,
    compile_inference,
    from_torch,
    to_torch,
)
from flax_resblock.config import architecture, architectures, from_json, name_of, to_json
from flax_resblock.convert import StateMap
from flax_resblock.convert.hubs import files_of
from flax_resblock.convert.image_facts import ImageFacts
from flax_resblock.export.fold import fold_batch_norm, folding_error
from flax_resblock.nn.resnet import build
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.parts import vanishing
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.runs.param_groups import names_of
from parity_tests.support import fast_only, output, random_bits, torch_output
from torch_ref import ResNet

F = torch.nn.functional
BIASES = ("stem_bias", "conv_bias", "shortcut_bias")
BIASED = dict.fromkeys(BIASES, True)
SMALL = {"depths": (1, 1), "widths": (4, 8), "stem_width": 4, "num_classes": 3, "stem": "cifar"}
NETWORK = ResNetConfig(**SMALL, **BIASED)


@pytest.mark.parametrize(
    ("stem", "choices"),
    [("imagenet", [(True, False, True)]), ("deep", list(product([False, True], repeat=3)))],
    ids=["imagenet", "deep"],
)
def test_biases_are_read_from_the_tensors_and_go_back_bit_for_bit(stem, choices):
    hidden = {"stem_hidden": (4, 5) if stem == "deep" else (), "block": "bottleneck"}
    for values in choices:
        config = ResNetConfig(
            **{**SMALL, "stem": stem}, **hidden, **dict(zip(BIASES, values, strict=True))
        )
        assert from_json(to_json(config)) == config
        state = random_bits(config, np.float32)
        model = from_torch(state, assume="known")
        assert model.config == config
        assert {key: value.tobytes() for key, value in to_torch(model).items()} == {
            key: value.tobytes() for key, value in state.items()
        }
        block = next(replace(one, stride=2) for _, i, one in config.blocks() if not i)
        assert from_torch(random_bits(block, np.float32), stride=2).config == block
    names = [name for name in architectures() if name != "resnet9"]
    assert not any(getattr(architecture(name), one) for name in names for one in BIASES)


def test_a_bias_in_some_convolutions_of_a_kind_is_refused_by_name():
    state = random_bits(NETWORK, np.float32)
    del state["layer2.0.conv1.bias"]
    words = (
        r"a bias beside others without.*layer1\.0\.conv1, .*\n.*port(.*\n)*.*layer2\.0\.conv1\.bias"
    )
    with pytest.raises(CheckpointError, match=words):
        from_torch(state)


def test_a_gradient_that_vanishes_is_judged_by_that_of_its_kernel():
    """In training a norm takes the bias in front of it off again."""
    config = BlockConfig(
        in_channels=4,
        out_channels=8,
        stride=2,
        kind="bottleneck",
        conv_bias=True,
        shortcut_bias=True,
    )
    pair, images = ReferencePair.random(config), adversarial_images(config, batch=3)
    plan = Plan(gradients=True, steps=2, precisions=("float64",), optimizers=("adamw",))
    found = compare_pair(pair, images, plan)
    assert found.passed
    rows = [m for m in found.measurements if m.quantity == "parameter gradient"]
    assert {m.slot for m in rows if m.slot.endswith("/bias")} >= {
        "conv1/bias",
        "shortcut.conv/bias",
    }
    key, ones = ("parameter gradient", "conv1/bias"), np.ones(4)
    kernel = ("parameter gradient", "conv1/kernel")
    assert vanishing(key, {key: 1e-14 * ones, kernel: ones}) == 2
    for other in ({key: 1e-9 * ones, kernel: ones}, {key: 0 * ones}):  # the controls
        assert vanishing(key, other) == 0
    assert vanishing(kernel, {kernel: 0 * ones}) == 0


def test_folding_takes_the_bias_off_the_mean():
    pair = ReferencePair.random(replace(NETWORK, stem_pool="2x2"))
    images = adversarial_images(NETWORK, batch=2, height=9, width=10).astype(np.float32)
    model = pair.flax(PRECISIONS["float32"])
    model.eval()
    truth = output(model, images)
    folded = fold_batch_norm(model)
    assert not [p for p, _ in nnx.to_flat_state(nnx.state(folded)) if p[-2:] == ("conv", "bias")]
    errors = folding_error(model, folded, 9)
    assert 0 < errors["folded"] <= 4 * errors["unfolded"]
    assert relative_l2(np.asarray(compile_inference(model, images)(images)), truth) < 1e-5
    path = {"stage1": model.stage1[0].conv1.bias[...]}
    model.stage1[0].conv1.bias.set_value(path["stage1"] + 1)  # the control: the bias counts
    moved = np.asarray(fold_batch_norm(model)(images))
    assert relative_l2(moved, truth) > 1e-3


def test_biases_of_convolutions_are_no_parameters_of_norms():
    """An optimizer without names that keeps norms apart, as people write it for weight decay."""
    module = ResNet(**SMALL, **BIASED)
    norms = [
        p for m in module.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()
    ]
    ids = set(map(id, norms))
    others = [p for p in module.parameters() if id(p) not in ids]
    optimizer = torch.optim.SGD([{"params": others}, {"params": norms, "weight_decay": 0.0}], 0.1)
    groups = optimizer.state_dict()["param_groups"]
    state_map = StateMap(NETWORK, "torchvision")
    named, how = names_of(groups, [one["params"] for one in groups], {}, state_map, "it")
    assert how == "norms last"
    assert "conv1.bias" in named[0]
    assert len(state_map.parameters) == len(list(module.parameters()))


@pytest.mark.parametrize("change", [*BIASES, "stem_stride", "stem_pool"])
def test_a_hub_that_cannot_be_told_refuses(change):
    value = {"stem_stride": 1, "stem_pool": "none"}.get(change, True)
    config = replace(architecture("resnet18"), **{change: value})
    for hub in ("transformers", "timm"):
        with pytest.raises(InputError, match=change if hub == "transformers" else "no name"):
            files_of(hub, config, {}, ImageFacts())
    assert change.replace("stem_pool", "stem pool").replace("stem_str", "stem str") in name_of(
        config
    )


class Functional(ResNet):
    """Its pooling after the stem is a function, which is no layer that could be read."""

    pool = "none"

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        if self.pool != "none":
            x = F.max_pool2d(x, 3, 2, 1) if self.pool == "3x3" else F.max_pool2d(x, 2)
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


class Layered(Functional):
    """Its pooling is a layer under a name of its author's own."""

    def __init__(self, **options):
        super().__init__(**options, stem_pool="none")
        self.shrink = torch.nn.MaxPool2d(2)

    def forward(self, x):
        return self.fc(
            self.stages[1](self.stages[0](self.shrink(F.relu(self.bn1(self.conv1(x)))))).mean(
                (2, 3)
            )
        )


STEMS = [
    ("cifar", 2, "3x3", Functional),
    ("cifar", 1, "2x2", Layered),
    ("deep", 1, "2x2", ResNet),
    ("imagenet", 2, "none", Functional),
    ("imagenet", 1, "2x2", Functional),
]


@pytest.mark.parametrize(
    "case", fast_only(STEMS[:3], STEMS), ids=lambda case: "-".join(map(str, case[:3]))
)
def test_a_live_module_tells_its_stem_and_weights_alone_are_told(case):
    stem, stride, pool, kind = case
    torch.manual_seed(0)
    numbers = {**SMALL, "stem": stem, "stem_hidden": (4, 5) if stem == "deep" else ()}
    said = {"stem_stride": stride} | ({"stem_pool": pool} if kind is ResNet else {})
    module = kind(**numbers, **said).eval()
    module.pool = pool
    if kind is Functional:
        module.maxpool = torch.nn.Identity()
    config = ResNetConfig(**numbers, stem_stride=stride, stem_pool=pool)
    model = from_torch(module)
    assert model.config == config
    told = {"stem_stride": stride, "stem_pool": pool}
    assert from_torch(module.state_dict(), assumptions=told, assume="known").config == config
    assert from_torch(module.state_dict(), assume="known").config == ResNetConfig(**numbers)
    images = np.random.default_rng(0).normal(0.2, 1, (2, 35, 38, 3)).astype(np.float32)
    truth = torch_output(module, images)
    assert relative_l2(output(model, images), truth) < 1e-5


def test_equal_networks_are_equal_however_their_stem_is_said():
    usual = architecture("resnet18")
    assert replace(usual, stem_stride=2, stem_pool="3x3") == usual
    assert replace(usual, stem="cifar").stem_reduction == 1
    assert replace(usual, stem_pool="none").stem_reduction == 2
    assert replace(usual, stem="cifar", stem_pool="3x3").image_size == 224
    with pytest.raises(ValueError, match="stem_stride 3 is unknown; choose None, 1 or 2"):
        replace(usual, stem_stride=3)
    with pytest.raises(ValueError, match="3x3 pixels or none"):
        replace(usual, antialias="blur", stem_pool="2x2")
    shapes = jax.eval_shape(
        build(replace(usual, stem_pool="2x2"), rngs=None).stem.pool, np.zeros((1, 7, 9, 2))
    )
    assert shapes.shape == (1, 3, 4, 2)
