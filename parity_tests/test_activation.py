"""The activation of a network: PyTorch's values, told by a module, settable, kept in metadata."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import BlockConfig, ResNetConfig, compile_inference, from_torch
from flax_resblock.cli import run
from flax_resblock.config import choices_of, from_json, name_of, to_json
from flax_resblock.convert.opening import ReadOptions
from flax_resblock.errors import InputError
from flax_resblock.export.fold import fold_batch_norm, folding_error
from flax_resblock.nn import layers
from flax_resblock.nn.resnet import build
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.live_module import open_module
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from parity_tests.support import fast_only, output
from torch_ref import BasicBlock, ResNet

OTHERS = [name for name in choices_of(BlockConfig)["activation"] if name != "relu"]
TORCH = {
    "relu": torch.nn.ReLU(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "gelu": torch.nn.GELU(),
    "silu": torch.nn.SiLU(),
}
BLOCK = BlockConfig(in_channels=4, out_channels=8, stride=2)
NETWORK = ResNetConfig(depths=(1, 1), widths=(8, 12), stem="cifar", stem_width=8, num_classes=5)
SMALL = {"depths": (1, 1), "widths": (8, 12), "stem": "cifar", "stem_width": 8, "num_classes": 5}


@pytest.mark.parametrize("name", TORCH)
def test_values_and_derivatives_are_pytorchs_also_at_zero(name):
    values = np.array([0.0, -0.0, -40, -6, -1, -1e-9, 1e-9, 0.5, 3, 40])
    x = torch.tensor(values, requires_grad=True)
    y = TORCH[name](x)
    y.sum().backward()
    assert x.grad is not None
    with jax.enable_x64(True):
        act = layers.ACTIVATIONS[name]
        ours, slopes = act(jnp.asarray(values)), jax.vmap(jax.grad(act))(jnp.asarray(values))
        np.testing.assert_allclose(ours, y.detach().numpy(), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(slopes, x.grad.numpy(), rtol=1e-12, atol=1e-15)


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
def test_json_and_checkpoints_keep_the_activation(name, tmp_path):
    config = replace(NETWORK, activation=name)
    assert from_json(to_json(config)) == config
    assert name in name_of(config)
    model = build(config, rngs=nnx.Rngs(0))
    for path in ("net.safetensors", "folder", "net.pth"):
        flax_resblock.save(model, tmp_path / path)
        assert flax_resblock.load(tmp_path / path).config == config
    (tmp_path / "net.pth.sha256.json").unlink()  # a bare state dict has no metadata
    assert flax_resblock.load(tmp_path / "net.pth").config != config
    told = flax_resblock.load(tmp_path / "net.pth", assumptions={"activation": name})
    assert told.config == config


def test_the_flag_is_written_into_the_metadata(tmp_path, capsys):
    torch.save(ResNet(**SMALL, activation="silu").state_dict(), tmp_path / "net.pth")
    flags = [str(tmp_path / "net.pth"), str(tmp_path / "out.safetensors")]
    assert run(["convert", *flags, "--activation", "silu"]) == 0
    assert flax_resblock.load(tmp_path / "out.safetensors").config.activation == "silu"
    capsys.readouterr()


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
