"""The Linen module is the nnx network: same variables, same numbers, same statistics."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

from flax_resblock import BlockConfig, ResNetConfig
from flax_resblock.nn import linen
from flax_resblock.parity.battery import BATTERY
from parity_tests.support import fast_only

CONFIGS = {
    "basic": ResNetConfig(depths=(1, 2), widths=(8, 12), stem="cifar", stem_width=8, num_classes=5),
    "no head": ResNetConfig(
        depths=(1, 1), widths=(6, 12), stem="cifar", stem_width=6, num_classes=None
    ),
    "every option of a network": next(
        replace(config, norm="batch")
        for config in BATTERY.values()
        if getattr(config, "stem", None) == "deep"
    ),
    "every option of a block": next(
        replace(config, norm="batch")
        for config in BATTERY.values()
        if isinstance(config, BlockConfig) and config.attention == "eca"
    ),
}


@pytest.fixture(params=fast_only(["every option of a block"], CONFIGS))
def config(request):
    return CONFIGS[request.param]


def images(channels=3):
    return (
        np.random.default_rng(3).standard_normal((3, 19, 16, channels)).astype(np.float32) * 2 + 0.7
    )


def built(config):
    from flax_resblock.nn.resnet import build

    return build(config, rngs=nnx.Rngs(11))


@pytest.mark.slow
def test_variables_of_a_fresh_linen_network_are_those_of_the_nnx_one(config):
    ours = linen.ResNet(config).init(jax.random.key(1), images(config.in_channels))
    theirs = linen.variables(built(config))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), ours) == jax.tree.map(
        lambda a: (a.shape, a.dtype), theirs
    )
    keys = {key.key for path, _ in jax.tree_util.tree_flatten_with_path(ours)[0] for key in path}
    assert all(isinstance(key, str) for key in keys)


def test_evaluation_and_training_equal_nnx_bit_for_bit(config):
    model, x = built(config), images(config.in_channels)
    variables = linen.variables(model)
    evaluated = linen.ResNet(config).apply(variables, x)
    trained, updates = linen.ResNet(config).apply(variables, x, train=True, mutable=["batch_stats"])
    model.eval()
    np.testing.assert_array_equal(evaluated, model(x))
    model.train()
    np.testing.assert_array_equal(trained, model(x))
    jax.tree.map(
        np.testing.assert_array_equal, updates["batch_stats"], linen.variables(model)["batch_stats"]
    )
    assert not np.allclose(trained, evaluated, rtol=1e-2)


@pytest.mark.slow
def test_training_without_mutable_statistics_leaves_them(config):
    variables = linen.variables(built(config))
    before = jax.tree.map(np.array, variables)
    linen.ResNet(config).apply(variables, images(config.in_channels), train=True)
    jax.tree.map(np.testing.assert_array_equal, before, variables)


def test_works_under_jit_and_grad():
    config = CONFIGS["basic"]
    model = linen.ResNet(config)
    variables = linen.variables(built(config))

    @jax.jit
    def loss(params):
        logits, updates = model.apply(
            {**variables, "params": params}, images(), train=True, mutable=["batch_stats"]
        )
        return (logits**2).sum(), updates

    gradients, updates = jax.grad(loss, has_aux=True)(variables["params"])
    assert float(abs(gradients["stage2"]["0"]["shortcut"]["conv"]["kernel"]).max()) > 0
    assert int(updates["batch_stats"]["stem"]["norm"]["num_batches_tracked"]) == 1


def test_options_reach_the_layers():
    config = CONFIGS["basic"]
    variables = linen.variables(built(config))
    default = linen.ResNet(config).apply(variables, images())
    other = linen.ResNet(config, options={"eps": 0.5}).apply(variables, images())
    assert float(abs(default - other).max()) > 1e-3
