"""BatchNorm is PyTorch's, statistics and all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import PartitionSpec

from flax_resblock import BatchNorm
from flax_resblock.nn.norm import batch_moments


def activations(shape=(4, 5, 3, 6), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return (
        rng.standard_normal(shape) * rng.uniform(0.2, 3, shape[-1]) + rng.normal(0, 4, shape[-1])
    ).astype(dtype)


def torch_norm(channels, **options):
    norm = torch.nn.BatchNorm2d(channels, **options).double()
    rng = np.random.default_rng(9)
    for tensor, low, high in (
        (norm.weight.data, 0.3, 2),
        (norm.bias.data, -1, 1),
        (norm.running_mean, -2, 2),
        (norm.running_var, 0.2, 4),
    ):
        tensor.copy_(torch.from_numpy(rng.uniform(low, high, channels)))
    return norm


def flax_norm(norm, **options):
    twin = BatchNorm(
        norm.num_features,
        eps=norm.eps,
        momentum=norm.momentum,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
        **options,
    )
    names = {
        "scale": norm.weight,
        "bias": norm.bias,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }
    for name, tensor in names.items():
        getattr(twin, name).set_value(jnp.asarray(tensor.detach().numpy()))
    return twin


def run_torch(norm, x):
    return np.moveaxis(norm(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).detach().numpy(), 1, -1)


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("shape", [(4, 5, 3, 6), (2, 1, 1, 3), (1, 2, 1, 5)], ids=str)
def test_three_training_batches_and_an_evaluation_equal_pytorch(momentum, shape):
    norm = torch_norm(shape[-1], momentum=momentum)
    with jax.enable_x64(True):
        twin = flax_norm(norm)
        for seed in range(3):
            x = activations(shape, seed)
            np.testing.assert_allclose(
                twin(jnp.asarray(x)), run_torch(norm, x), rtol=1e-10, atol=1e-12
            )
        np.testing.assert_allclose(twin.mean[...], norm.running_mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(twin.var[...], norm.running_var.numpy(), rtol=1e-12)
        assert int(twin.num_batches_tracked[...]) == 3
        twin.eval()
        x = activations(shape, 7)
        np.testing.assert_allclose(
            twin(jnp.asarray(x)), run_torch(norm.eval(), x), rtol=1e-12, atol=1e-13
        )


def test_running_variance_is_unbiased_and_normalisation_is_not():
    x = activations((3, 2, 2, 4))
    with jax.enable_x64(True):
        moments = batch_moments(jnp.asarray(x))
        np.testing.assert_allclose(moments.biased_var, x.var((0, 1, 2)), rtol=1e-13)
        np.testing.assert_allclose(moments.unbiased_var, x.var((0, 1, 2), ddof=1), rtol=1e-13)
    assert np.all(np.abs(x.var((0, 1, 2), ddof=1) / x.var((0, 1, 2)) - 1) > 0.05)


@pytest.mark.parametrize("ratio", [10, 1e3, 1e4])
def test_variance_survives_a_large_mean(ratio):
    """E[x^2] - E[x]^2, Flax's default, is off by 0.19 at mean/std = 1000; two passes are not."""
    x = (np.random.default_rng(2).standard_normal((8, 8, 8, 3)) + ratio).astype(np.float32)
    truth = x.astype(np.float64).var((0, 1, 2))
    fast = (x**2).mean((0, 1, 2)) - x.mean((0, 1, 2)) ** 2
    error = np.abs(np.asarray(batch_moments(jnp.asarray(x)).biased_var) / truth - 1).max()
    assert error < 1e-6
    assert ratio < 1e3 or np.abs(fast / truth - 1).max() > 100 * error


def test_statistics_are_float32_under_bfloat16_activations():
    x = activations((4, 8, 8, 3), dtype=np.float32)
    norm = BatchNorm(3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    y = norm(jnp.asarray(x, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == norm.var[...].dtype == jnp.float32
    truth = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64).mean((0, 1, 2))
    np.testing.assert_allclose(norm.mean[...], 0.1 * truth, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 4)], ids=str)
def test_one_value_per_channel_is_refused_in_training_mode_as_in_pytorch(shape):
    norm = BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"more than one value per channel .* \(1, (1, 1, )?4\)"):
        norm(jnp.asarray(activations(shape, dtype=np.float32)))
    assert int(norm.num_batches_tracked[...]) == 0
    assert (
        norm(jnp.asarray(activations(shape, dtype=np.float32)), use_running_average=True).shape
        == shape
    )


def test_wrong_channel_count_names_both_sides():
    with pytest.raises(ValueError, match=r"over 4 channels got an input of shape \(2, 3, 3, 5\)"):
        BatchNorm(4, rngs=nnx.Rngs(0))(jnp.zeros((2, 3, 3, 5)))


needs_devices = pytest.mark.skipif(
    jax.device_count() < 4, reason="needs 4 (simulated) devices; conftest.py asks for them"
)


def spread(x, **options):
    """Output and the first device's statistics of ``x``, normalised over 4 devices in shard_map."""
    mesh = jax.make_mesh((4,), ("batch",))
    norm = BatchNorm(x.shape[-1], param_dtype=x.dtype, rngs=nnx.Rngs(0), **options)
    graphdef, state = nnx.split(norm)

    def body(state, x):
        module = nnx.merge(graphdef, state, copy=True)
        y = module(x)
        return y, jnp.tile(module.mean[...], (1, 1)), jnp.tile(module.var[...], (1, 1))

    shard = PartitionSpec("batch")
    x = jax.device_put(x, jax.sharding.NamedSharding(mesh, shard))
    state = jax.device_put(state, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(PartitionSpec(), shard),
        out_specs=(shard, shard, shard),
        check_vma=False,
    )
    return tuple(np.asarray(value) for value in jax.jit(mapped)(state, x))


@needs_devices
def test_axis_name_gives_the_statistics_of_the_whole_batch_with_the_global_count():
    x = activations((8, 2, 1, 3))
    with jax.enable_x64(True):
        y, means, variances = spread(jnp.asarray(x), axis_name="batch")
        norm = BatchNorm(3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(y, norm(jnp.asarray(x)), rtol=1e-10, atol=1e-12)
        for row in range(4):
            np.testing.assert_allclose(means[row], norm.mean[...], rtol=1e-12)
            np.testing.assert_allclose(variances[row], norm.var[...], rtol=1e-12)
        local_y, _, local_variances = spread(jnp.asarray(x))
        assert np.abs(np.asarray(local_y) - np.asarray(y)).max() > 0.1
        assert np.abs(np.asarray(local_variances[0]) / np.asarray(norm.var[...]) - 1).max() > 1e-3


@needs_devices
def test_a_sharded_batch_under_jit_has_global_statistics():
    x = activations((8, 3, 2, 3))
    with jax.enable_x64(True):
        norm = BatchNorm(3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(norm)

        @jax.jit
        def step(state, x):
            module = nnx.merge(graphdef, state, copy=True)
            return module(x), module.var[...]

        sharding = jax.sharding.NamedSharding(
            jax.make_mesh((4,), ("batch",)), PartitionSpec("batch")
        )
        y, variance = step(state, jax.device_put(jnp.asarray(x), sharding))
        np.testing.assert_allclose(y, norm(jnp.asarray(x)), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(variance, norm.var[...], rtol=1e-12)
