"""Fresh weights come from PyTorch's distributions; architectures that make no sense are refused."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from scipy import stats

import torch_ref
from flax_resblock import (
    BlockConfig,
    BottleneckBlock,
    ResidualBlock,
    ResNetConfig,
    architectures,
    create,
)
from flax_resblock.config import architecture, from_json, to_json, walk
from flax_resblock.nn.initializers import INITIALIZERS, drawn
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.resnet import ResNet
from flax_resblock.parity.battery import BATTERY
from parity_tests.support import fast_only

SIGNIFICANT = 1e-4
"""p-value below which two samples are said to come from different distributions; the seeds are
fixed, so nothing here is left to chance.
"""


def same_distribution(ours, theirs) -> bool:
    return stats.ks_2samp(np.asarray(ours).ravel(), np.asarray(theirs).ravel()).pvalue > SIGNIFICANT


def test_a_bare_block_starts_as_nn_conv2d_does():
    torch.manual_seed(0)
    theirs, ours = torch_ref.Block(48, 64, 2), ResidualBlock(48, 64, 2, rngs=nnx.Rngs(0))
    pairs = (
        (theirs.block[0], ours.conv1),
        (theirs.block[3], ours.conv2),
        (theirs.skip[0], ours.shortcut.conv),
    )
    for torch_conv, conv in pairs:
        assert same_distribution(conv.kernel[...], torch_conv.weight.detach())
        assert not same_distribution(
            nnx.Conv(48, 64, (3, 3), rngs=nnx.Rngs(0)).kernel[...], torch_conv.weight.detach()
        )


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_network_starts_as_torchvisions_do(name):
    settings = {
        "block": name,
        "depths": (1, 1),
        "widths": (32, 64),
        "groups": 1 if name == "basic" else 4,
        "num_classes": 40,
    }
    torch.manual_seed(1)
    theirs, ours = torch_ref.ResNet(**settings), ResNet(ResNetConfig(**settings), rngs=nnx.Rngs(1))
    pairs = {
        "stem": (theirs.conv1.weight, ours.stem.conv.kernel),
        "conv2": (theirs.layer2[0].conv2.weight, ours.stage2[0].conv2.kernel),
        "shortcut": (theirs.layer2[0].downsample[0].weight, ours.stage2[0].shortcut.conv.kernel),
        "head": (theirs.fc.weight, ours.head.kernel),
        "bias": (theirs.fc.bias, ours.head.bias),
    }
    for place, (tensor, variable) in pairs.items():
        assert same_distribution(variable[...], tensor.detach()), place
    assert not same_distribution(
        ours.stage2[0].conv2.kernel[...] * 1.2, theirs.layer2[0].conv2.weight.detach()
    )


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (12, 10)])
@pytest.mark.parametrize("dtype", fast_only(["float32"], ["float32", "bfloat16"]))
def test_kernels_are_those_of_jaxs_initialisers(shape, dtype):
    """The random numbers to the last bit; jax 0.12 rounds once less when it scales them."""
    key = jax.random.key(5)
    for draw in (jax.random.normal, jax.random.uniform):
        truth = np.asarray(draw(key, shape, dtype))
        np.testing.assert_array_equal(np.asarray(drawn(draw, key, shape, dtype)), truth)
        assert not np.array_equal(drawn(draw, jax.random.key(6), shape, dtype), truth)
    scaling = jax.nn.initializers.variance_scaling
    theirs = {
        "torch_default": scaling(1 / 3, "fan_in", "uniform"),
        "kaiming_fan_out": scaling(2.0, "fan_out", "normal"),
    }
    close = 2.0**-22 if dtype == "float32" else 2.0**-6  # two units in the last place
    for name, init in theirs.items():
        truth = np.asarray(init(key, shape, dtype), np.float32)
        ours = np.asarray(INITIALIZERS[name](key, shape, dtype), np.float32)
        np.testing.assert_allclose(ours, truth, rtol=close)


def test_linear_bias_is_drawn_from_the_fan_in():
    ours, theirs = Linear(30, 4000, rngs=nnx.Rngs(2)), torch.nn.Linear(30, 4000)
    assert same_distribution(ours.bias[...], theirs.bias.detach())
    assert float(abs(ours.bias[...]).max()) <= 30**-0.5


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("block", [ResidualBlock, BottleneckBlock])
def test_zero_init_residual_zeroes_the_last_norm_only_where_asked(block, zero):
    module = block(8, 8, rngs=nnx.Rngs(0), zero_init_residual=zero)
    last = module.norm2 if block is ResidualBlock else module.norm3
    assert bool((last.scale[...] == 0).all()) == zero
    assert bool((module.norm1.scale[...] == 1).all())
    if zero:
        module.eval()
        x = np.random.default_rng(0).standard_normal((1, 5, 4, 8)).astype(np.float32)
        np.testing.assert_array_equal(module(x), np.maximum(x, 0))


@pytest.mark.slow
def test_options_reach_every_layer():
    model = create(
        "resnet20",
        rngs=nnx.Rngs(0),
        dtype=jax.numpy.bfloat16,
        eps=1e-3,
        momentum=0.2,
        precision="highest",
    )
    logits = model(np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32))
    assert logits.dtype == jax.numpy.bfloat16
    norms = [m for _, m in nnx.iter_modules(model) if type(m).__name__ == "BatchNorm"]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.2)}
    assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {
        np.dtype("float32")
    }
    assert {
        m.precision for _, m in nnx.iter_modules(model) if type(m).__name__ in ("Conv", "Linear")
    } == {"highest"}


def test_create_names_unknown_options_and_architectures():
    with pytest.raises(TypeError, match=r"unknown option colour; known: .*, block, depths"):
        create("resnet18", rngs=None, colour="red")
    with pytest.raises(TypeError, match=r"unknown option colour; known: dtype"):
        ResidualBlock(4, 4, rngs=None, colour="red")
    with pytest.raises(ValueError, match=r"'resnet19' is unknown; known: resnet18"):
        create("resnet19", rngs=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (1, 2)}, "same stages"),
        ({"depths": ()}, "same stages"),
        ({"widths": (0, 1, 2, 3)}, "positive integers"),
        ({"num_classes": 0}, "positive integers"),
        ({"dilated_stages": (1,)}, "stage 1 has no stride"),
        ({"base_width": 128}, "basic block has none"),
        ({"shortcut": "zero_pad", "widths": (64, 32, 64, 64)}, "cannot reduce 64 channels to 32"),
        ({"stem": "fancy"}, "'imagenet', 'deep' or 'cifar'"),
        ({"block": "bottleneck", "widths": (4,) * 4, "base_width": 8}, "no inner channel"),
        ({"stem_width": 6, "groups": 4}, "groups=4 must divide in_channels=6"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_network_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        architecture("resnet18", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"out_channels": 6, "kind": "bottleneck"},
        {"stride": 0},
        {"groups": -1},
        {"shortcut": "magic"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_block_is_refused(fields):
    with pytest.raises(ValueError, match=r"must be|unknown|multiple of 4"):
        BlockConfig(**{"in_channels": 4, "out_channels": 8, **fields})


def test_a_configuration_survives_json_and_names_every_slot_once():
    for config in (
        *(architecture(name, num_classes=3) for name in architectures()),
        *BATTERY.values(),
    ):
        assert from_json(to_json(config)) == config
        names = [slot.name for slot in walk(config)]
        assert len(set(names)) == len(names), config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[]",
        '{"type": "os.system"}',
        '{"type": "ResNetConfig", "colour": 1}',
        '{"type": "ResNetConfig", "depths": 3}',
    ],
)
def test_a_configuration_from_a_stranger_is_checked(text):
    with pytest.raises((ValueError, TypeError)):
        from_json(text)
