"""The activation of a network: PyTorch's values, told by a module, settable, kept in metadata."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import BlockConfig, ResNetConfig, compile_inference, from_torch
from flax_resblock.config import choices_of
from flax_resblock.convert.opening import ReadOptions
from flax_resblock.errors import InputError
from flax_resblock.export.fold import fold_batch_norm, folding_error
from flax_resblock.nn import layers
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.live_module import open_module
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from parity_tests.support import fast_only, output
from torch_ref import BasicBlock, ResNet

OTHERS = [name for name in choices_of(BlockConfig)["activation"] if name != "relu"]
BLOCK = BlockConfig(in_channels=4, out_channels=8, stride=2)
NETWORK = ResNetConfig(depths=(1, 1), widths=(8, 12), stem="cifar", stem_width=8, num_classes=5)
SMALL = {"depths": (1, 1), "widths": (8, 12), "stem": "cifar", "stem_width": 8, "num_classes": 5}


NEARLY = {
    "gelu": partial(nnx.gelu, approximate=True),
    "leaky_relu": partial(nnx.leaky_relu, negative_slope=0.02),
    "silu": partial(nnx.gelu, approximate=False),
}


@pytest.mark.parametrize("name", fast_only(["gelu"], NEARLY))
def test_a_similar_activation_fails_by_far(name, monkeypatch):
    """The battery compares every activation with PyTorch; this is its negative control."""
    pair, plan = ReferencePair.random(replace(BLOCK, activation=name)), Plan(train=False)
    images = adversarial_images(BLOCK, batch=2, height=6, width=7)
    assert compare_pair(pair, images, plan).passed
    monkeypatch.setitem(layers.ACTIVATIONS, name, NEARLY[name])
    wrong = compare_pair(pair, images, plan).measurements
    for precision in ("float64", "float32"):
        rows = [m for m in wrong if (m.precision, m.quantity) == (precision, "eval forward")]
        assert max(m.verdict.excess for m in rows) >= 10


@pytest.mark.parametrize("name", fast_only(["leaky_relu"], OTHERS))
def test_a_live_module_tells_its_activation(name):
    torch.manual_seed(0)
    block, network = BasicBlock(4, 8, 2, activation=name), ResNet(**SMALL, activation=name)
    images = np.random.default_rng(0).standard_normal((2, 9, 8, 4)).astype(np.float32)
    model = from_torch(block.eval())
    assert model.config == replace(BLOCK, activation=name)
    truth = block(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).detach().numpy()
    assert relative_l2(np.moveaxis(output(model, images), -1, 1), truth) < 1e-5
    assert from_torch(network).config == replace(NETWORK, activation=name)
    # Weights alone do not tell: the assumption is ReLU, and it can be set.
    assert from_torch(network.state_dict()).config == NETWORK
    told = from_torch(network.state_dict(), assumptions={"activation": name})
    assert told.config == replace(NETWORK, activation=name)


@pytest.mark.parametrize(
    "layer",
    [torch.nn.GELU("tanh"), torch.nn.LeakyReLU(0.1), torch.nn.SiLU(), torch.nn.Mish()],
    ids=str,
)
def test_a_module_with_another_activation_in_one_place_is_refused(layer):
    module = ResNet(**SMALL, activation="gelu")
    module.layer2[0].act = layer
    with pytest.raises(InputError, match=r"layer2\.0\.act is .*, expected GELU\(approximate=none"):
        open_module(module, ReadOptions())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.slow
def test_inference_folds_and_fuses_the_right_activation(name):
    pair = ReferencePair.random(replace(NETWORK, activation=name))
    images = adversarial_images(NETWORK, batch=3, height=9, width=8).astype(np.float32)
    model = pair.flax(PRECISIONS["float32"])
    truth = np.asarray(model(images, use_running_average=True))
    assert relative_l2(np.asarray(compile_inference(model, images)(images)), truth) < 1e-5
    errors = folding_error(model, fold_batch_norm(model), 9)
    assert 0 < errors["folded"] <= 4 * errors["unfolded"]
    relu = ReferencePair(NETWORK, pair.state, pair.norm_options).flax(PRECISIONS["float32"])
    assert relative_l2(np.asarray(compile_inference(relu, images)(images)), truth) > 1e-3
