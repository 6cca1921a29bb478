"""What the layers compute on a GPU or TPU in their own form, traced for one and run on the CPU: the
numbers are those of the plain form, in a program with fewer passes over memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import BatchNorm, BlockConfig, conv_lowering, create
from flax_resblock.cpu.switch import traced_for
from flax_resblock.nn.activations import relu_by_output
from flax_resblock.nn.attention import SqueezeExcitation
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.layers import Layers
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.pooling import max_pool


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def in_own_form(function):
    """The function, traced as for a GPU."""

    @jax.jit
    def traced(*arguments):
        with traced_for("cuda"), conv_lowering("auto"):
            return function(*arguments)

    return traced


def in_plain_form(function):
    @jax.jit
    def traced(*arguments):
        with conv_lowering("xla"):
            return function(*arguments)

    return traced


def apart(ours, theirs):
    return max(
        float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
        / float(np.abs(np.asarray(b, np.float64)).max() + 1e-300)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )


def step_of(model, images):
    """Loss, gradients and new statistics of a network in training mode."""
    model.train()
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)

    def step(params, stats, images):
        def loss_of(params):
            network = nnx.merge(graphdef, params, stats, copy=True)
            logits = network(images)
            weights = jnp.linspace(-1, 2, logits.size, dtype=logits.dtype).reshape(logits.shape)
            return jnp.sum(jnp.sin(logits) * weights), nnx.state(network, nnx.BatchStat)

        return jax.value_and_grad(loss_of, has_aux=True)(params)

    return step, (params, stats, images)


def test_a_training_step_is_the_same_in_float64():
    """Loss, every gradient and all statistics, of a network with norms, ReLUs and max pooling."""
    images = jnp.asarray(np.random.default_rng(3).normal(0.4, 1.3, (3, 37, 33, 3)))
    sizes = {"widths": (8, 12), "depths": (2, 1), "stem_width": 8, "num_classes": 5}
    model = create("resnet50", rngs=nnx.Rngs(1), param_dtype=jnp.float64, stem="imagenet", **sizes)
    step, arguments = step_of(model, images)
    found, truth = in_own_form(step)(*arguments), in_plain_form(step)(*arguments)
    assert apart(found, truth) < 1e-11
    text = str(jax.make_jaxpr(in_own_form(step))(*arguments))
    assert "reduce_window" not in text


@pytest.mark.parametrize(
    ("size", "stride", "padding", "ceil"),
    [(3, 2, 1, False), (2, 2, 0, False), (3, 2, 0, True), ((2, 3), (1, 2), (1, 0), False)],
)
def test_max_pooling_is_torchs_with_ties_and_nan(size, stride, padding, ceil):
    rng = np.random.default_rng(5)
    x = rng.integers(-3, 4, (2, 9, 12, 3)).astype(np.float64)  # many pixels are equal
    weights = rng.normal(size=(2, 16, 16, 3))

    def loss(x):
        y = max_pool(x, size, stride, padding, ceil_mode=ceil)
        return jnp.sum(y * weights[:, : y.shape[1], : y.shape[2]]), y

    gradient = in_own_form(jax.value_and_grad(loss, has_aux=True))
    (_, y), dx = gradient(jnp.asarray(x))
    tensor = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(tensor, size, stride, padding, ceil_mode=ceil)
    cut = weights[:, : pooled.shape[2], : pooled.shape[3]].transpose(0, 3, 1, 2)
    (pooled * torch.from_numpy(cut.copy())).sum().backward()
    assert np.array_equal(y, pooled.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(dx, tensor.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-13)
    holed = jnp.asarray(x).at[0, 4, 5, 1].set(jnp.nan)
    assert np.isnan(gradient(holed)[0][1]).any()


def norm_errors(x, dy, about):
    """Largest errors against float64 of outputs, gradient and statistics in bfloat16: ours in one
    pass about the running mean, and torch's under autocast. In units of each one's size."""
    x, dy = (np.asarray(jnp.asarray(v, jnp.bfloat16), np.float64) for v in (x, dy))
    channels = x.shape[-1]
    norm = BatchNorm(channels, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    norm.mean.set_value(jnp.asarray(about, jnp.float32))

    def run(x):
        def normalised(x):
            inside = nnx.merge(*nnx.split(norm), copy=True)
            return inside(x), (inside.mean[...], inside.var[...])

        y, pull, stats = jax.vjp(normalised, jnp.asarray(x, jnp.bfloat16), has_aux=True)
        return y, pull(jnp.asarray(dy, jnp.bfloat16))[0], stats

    y, dx, (mean, var) = in_own_form(run)(x)
    ours = [y, dx, (mean - 0.9 * np.asarray(about)) * 10, var * 10 - 9]

    def of_torch(kind):
        twin = torch.nn.BatchNorm2d(channels, momentum=1.0, dtype=torch.float32)
        if kind is torch.float64:
            twin.double()
        given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(kind).requires_grad_()
        out = twin(given)
        out.backward(torch.from_numpy(dy.transpose(0, 3, 1, 2).copy()).to(kind))
        found = [v.double().detach().numpy().transpose(0, 2, 3, 1) for v in (out, given.grad)]
        return [*found, twin.running_mean.double().numpy(), twin.running_var.double().numpy()]

    truth, theirs = of_torch(torch.float64), of_torch(torch.bfloat16)

    def errors(found):
        pairs = zip(found, truth, strict=True)
        return np.array(
            [np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max() for a, b in pairs]
        )

    return errors(ours), errors(theirs)


@pytest.mark.parametrize(("mean", "about"), [(0.0, 0.0), (3.0, 0.0), (40.0, 0.0), (40.0, 38.0)])
def test_statistics_of_bfloat16_in_one_pass_are_as_exact_as_torchs(mean, about):
    """Even where the running mean knows nothing of the batch's yet."""
    rng = np.random.default_rng(7)
    x = rng.standard_normal((8, 13, 11, 6)) * rng.uniform(0.5, 2, 6) + mean
    ours, theirs = norm_errors(x, rng.standard_normal(x.shape), np.full(6, about))
    assert (ours[:2] <= 1.5 * theirs[:2] + 1e-6).all(), (ours, theirs)
    assert (ours[2:] < 1e-4).all(), ours


def test_relu_by_its_output_is_relu():
    x = jnp.asarray([-2.0, -0.0, 0.0, 1e-300, 3.0, jnp.nan])
    ours, theirs = (jax.vjp(f, x) for f in (relu_by_output, jax.nn.relu))
    assert np.array_equal(ours[0], theirs[0], equal_nan=True)
    assert np.array_equal(ours[1](jnp.ones(6))[0], theirs[1](jnp.ones(6))[0])


def test_own_forms_are_for_other_platforms_and_can_be_turned_off():
    x = jnp.ones((2, 6, 6, 2))
    split = nnx.split(BatchNorm(2, rngs=nnx.Rngs(0)))

    def of(context):
        with traced_for("tpu"), conv_lowering(context):
            return str(
                jax.make_jaxpr(lambda x: (nnx.merge(*split, copy=True)(x), max_pool(x, 2)))(x)
            )

    assert "custom_vjp" in of("auto")
    assert "custom_vjp" not in of("xla")


def test_gradients_of_biases_and_gates_are_summed_in_float32():
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal((3, 17, 16, 8)), jnp.bfloat16) for _ in range(2))
    rngs, options = nnx.Rngs(0), {"dtype": jnp.bfloat16, "param_dtype": jnp.float32}

    def sums_in_bfloat16(function, *arguments):
        traced = jax.make_jaxpr(lambda *given: jax.vjp(function, *given)[1](dy))(*arguments)
        return str(traced).count("bf16[8] = reduce_sum") + str(traced).count(
            "bf16[3,1,1,8] = reduce_sum"
        )

    def of(layer):
        graphdef, state = nnx.split(layer)
        return lambda state: nnx.merge(graphdef, state)(x), state

    layers = Layers(rngs, options, BlockConfig(in_channels=8, out_channels=8))
    gate = SqueezeExcitation(8, 4, layers, use_bias=True)
    conv = Conv(8, 8, 3, padding=1, use_bias=True, rngs=rngs, **options)
    for layer in (gate, conv, Linear(8, 8, rngs=rngs, **options)):
        assert sums_in_bfloat16(*of(layer)) == 0
    function, state = of(conv)
    ours = jax.jit(lambda state: jax.vjp(function, state)[1](dy))(state)[0]["bias"][...]
    plain = jax.jit(lambda bias: jax.vjp(lambda bias: x + bias, bias)[1](dy)[0])
    bias = jnp.zeros(8, jnp.bfloat16)
    assert sums_in_bfloat16(lambda bias: x + bias, bias)  # as jax derives it
    truth = np.asarray(dy, np.float64).sum((0, 1, 2))
    assert apart(ours, truth) < 2**-8
    assert apart(plain(bias), truth) > 4 * 2**-8
