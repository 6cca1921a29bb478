"""On a CPU layers take forms of their own: the same values and derivatives, and only there."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import BlockConfig, ResidualBlock, ResNetConfig, architectures
from flax_resblock.cli import run
from flax_resblock.config import SlotKind, architecture, choices_of, walk
from flax_resblock.cpu import winograd
from flax_resblock.cpu.forms import forms_of
from flax_resblock.cpu.materialised import kept, materialised
from flax_resblock.cpu.max_pool import max_pool
from flax_resblock.cpu.primitives import Forms
from flax_resblock.cpu.switch import conv_lowering, for_cpu
from flax_resblock.nn.conv import convolve
from flax_resblock.nn.norm import normalised_by_batch
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.devices import strict
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import relative_l2, verdict_of
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.taps import as_tensor
from parity_tests.support import fast_only, fewest

# N, H, W, C, O, kernel, stride: every row of the table, odd and even sizes, one pixel, wide and
# narrow
SHAPES = [
    (2, 7, 6, 5, 9, 1, 1),
    (2, 7, 6, 300, 70, 1, 1),
    (3, 7, 6, 66, 40, 1, 2),
    (2, 8, 9, 64, 64, 3, 1),
    (2, 6, 5, 130, 66, 3, 1),
    (1, 1, 1, 64, 65, 3, 1),
    (3, 1, 4, 70, 129, 3, 1),
    (2, 9, 8, 64, 96, 3, 2),
    (2, 7, 10, 128, 64, 3, 2),
    (2, 2, 2, 64, 64, 3, 2),
]
ORDINARY = [(2, 7, 8, 3, 64, 7, 2), (2, 5, 5, 16, 16, 3, 1), (2, 5, 5, 12, 20, 3, 2)]
LARGE = [(8, 32, 32, 64, 64, 3, 1), (8, 16, 16, 128, 128, 3, 1), (4, 8, 8, 256, 512, 3, 2)]
LIMIT = 1e-12


def function(shape, lowering):
    size, stride = shape[5:]
    plain = {"dilation": 1, "groups": 1, "precision": None}
    return partial(convolve, stride=stride, padding=size // 2, lowering=lowering, **plain)


def arrays(shape, dtype=np.float64, seed=0):
    n, height, width, inside, out, size, stride = shape
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 1.0, (n, height, width, inside))
    kernel = rng.normal(0, 1, (size, size, inside, out)) / np.sqrt(size * size * inside)
    dy = rng.normal(0, 1, (n, (height - 1) // stride + 1, (width - 1) // stride + 1, out))
    return [array.astype(dtype) for array in (x, kernel, dy)]


def derivatives(f, x, kernel, dy):
    """Output, both gradients, a directional derivative, both gradients of a sum of gradients."""
    y, back = jax.vjp(f, x, kernel)
    along = jax.jvp(f, (x, kernel), (x[::-1], kernel[::-1]))[1]

    def of_gradients(x, kernel):
        return sum(
            jnp.sum(jnp.square(each))
            for each in jax.grad(lambda x, kernel: jnp.sum(f(x, kernel) ** 2 * dy), argnums=(0, 1))(
                x, kernel
            )
        )

    return {
        "output": y,
        "along": along,
        **dict(zip("xk", back(dy), strict=True)),
        "second": jax.grad(of_gradients, argnums=(0, 1))(x, kernel),
    }


@pytest.mark.parametrize("shape", fast_only([SHAPES[7]], [*SHAPES, *ORDINARY]), ids=str)
def test_values_and_derivatives_are_those_of_xla(shape):
    with jax.enable_x64(True):
        x, kernel, dy = map(jnp.asarray, arrays(shape))
        ours, theirs = (
            jax.jit(partial(derivatives, function(shape, lowering)))(x, kernel, dy)
            for lowering in ("auto", "xla")
        )
        for name, truth in theirs.items():
            for mine, theirs_ in zip(
                jax.tree.leaves(ours[name]), jax.tree.leaves(truth), strict=True
            ):
                assert relative_l2(mine, theirs_) <= LIMIT, name
        found = relative_l2(function(shape, "auto")(x, 1.00001 * kernel), theirs["output"])
        assert found >= 1e6 * LIMIT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_row_of_the_table_is_used(shape):
    size, stride = shape[5:]
    x, kernel, _ = arrays(shape, np.float32)
    forms = forms_of(x, kernel, stride=stride, padding=size // 2, dilation=1, groups=1)
    assert forms is not None
    assert forms != Forms()


@pytest.mark.parametrize(
    "shape",
    fast_only([SHAPES[2], SHAPES[7], LARGE[1]], [*SHAPES, *LARGE]),
    ids=str,
)
def test_float32_is_as_accurate_as_pytorch(shape):
    """Against float64: at most four times PyTorch's own error, or eight units in the last place."""
    size, stride = shape[5:]
    single = arrays(shape, np.float32)
    y, back = jax.vjp(jax.jit(function(shape, "auto")), *map(jnp.asarray, single[:2]))
    ours = (y, *back(jnp.asarray(single[2])))
    errors = []
    torches = []
    for dtype in (torch.float64, torch.float32):
        x, kernel, dy = (torch.from_numpy(array).to(dtype) for array in single)
        x, kernel = (
            x.permute(0, 3, 1, 2).requires_grad_(),
            kernel.permute(3, 2, 0, 1).requires_grad_(),
        )
        out = torch.nn.functional.conv2d(x, kernel, stride=stride, padding=size // 2)
        gradients = torch.autograd.grad(out, (x, kernel), dy.permute(0, 3, 1, 2))
        torches.append(
            [
                out.detach().permute(0, 2, 3, 1).numpy(),
                gradients[0].permute(0, 2, 3, 1).numpy(),
                gradients[1].permute(2, 3, 1, 0).numpy(),
            ]
        )
    for name, mine, truth, theirs in zip(("output", "x", "kernel"), ours, *torches, strict=True):
        verdict = verdict_of(
            relative_l2(np.asarray(mine), truth),
            relative_l2(theirs, truth),
            float(np.finfo(np.float32).eps),
        )
        errors.append((name, verdict))
    assert all(verdict.passed for _, verdict in errors), errors


def test_a_coarser_transform_would_be_seen(monkeypatch):
    """The control of the test above: with 1/2 a little off, as in half precision, it fails."""
    shape = LARGE[1]
    exact = winograd._g
    monkeypatch.setattr(
        winograd,
        "_g",
        lambda w: [value.astype(jnp.float16).astype(jnp.float32) for value in exact(w)],
    )
    with pytest.raises(AssertionError):
        test_float32_is_as_accurate_as_pytorch(shape)


@pytest.fixture
def two_images_at_once(monkeypatch):
    """A kernel's gradient adds the products of two images of 5x6 pixels at a time."""
    monkeypatch.setattr(winograd, "WHOLE_BYTES", 0)
    monkeypatch.setattr(winograd, "PART_BYTES", 2 * 16 * 9 * (64 + 66) * 8)


def kernel_gradient_of(f, x, kernel, dy):
    return jax.vjp(f, x, kernel)[1](dy)[1]


@pytest.mark.parametrize("batch", fast_only([5], [4, 5]))
def test_a_kernels_gradient_in_parts_is_the_whole_one(batch, two_images_at_once):
    shape = (batch, 5, 6, 64, 66, 3, 1)
    with jax.enable_x64(True):
        x, kernel, dy = map(jnp.asarray, arrays(shape))
        ours = jax.jit(partial(kernel_gradient_of, function(shape, "auto")))
        assert ours.lower(x, kernel, dy).as_text().count("stablehlo.while") == 1
        truth = kernel_gradient_of(function(shape, "xla"), x, kernel, dy)
        assert relative_l2(ours(x, kernel, dy), truth) <= LIMIT
        # the control: without the last image
        assert relative_l2(ours(x, kernel, dy.at[-1].set(0)), truth) >= 1e6 * LIMIT


def test_a_kernels_gradient_of_few_images_is_one_part():
    shape = (5, 5, 6, 64, 66, 3, 1)
    gradient = jax.jit(partial(kernel_gradient_of, function(shape, "auto")))
    assert "stablehlo.while" not in gradient.lower(*arrays(shape, np.float32)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 16, 16, 64, 64, 3, 1), (5, 8, 9, 64, 96, 3, 1)], ids=str)
def test_parts_are_as_accurate_as_pytorch(shape, two_images_at_once):
    test_float32_is_as_accurate_as_pytorch(shape)


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_parts_of_a_batch_spread_over_devices_have_the_same_gradients(mapped, two_images_at_once):
    test_a_batch_spread_over_devices_has_the_same_gradients(mapped)


def convolutions_of(block):
    """Each convolution's size, stride, groups, and the form that a CPU computes it in."""
    for slot in walk(block):
        if slot.kind is SlotKind.CONV:
            kernel = np.empty(slot.shape, np.float32)
            forms = forms_of(
                np.empty((1, 8, 8, 8), np.float32),
                kernel,
                stride=slot.stride,
                padding=slot.padding,
                dilation=slot.dilation,
                groups=slot.groups,
            )
            yield slot.shape[0], slot.stride, slot.groups > 1, forms


def blocks_of_architectures():
    """Few blocks with every option and every kind of convolution of the named architectures."""
    blocks = {block for name in architectures() for _, _, block in architecture(name).blocks()}
    features = {
        block: {(name, getattr(block, name)) for name in choices_of(BlockConfig)}
        | {*convolutions_of(block), (block.kind, block.out_channels > 256)}
        for block in sorted(blocks, key=lambda block: (block.out_channels, repr(block)))
    }
    return fewest(features)


def brief(block):
    return (
        f"{block.kind[:5]} {block.in_channels}-{block.out_channels}/{block.stride} "
        f"{block.attention} {block.shortcut} g{block.groups} {block.antialias}"
    )


class SmallestReluInput(torch.overrides.TorchFunctionMode):
    """How near to zero the input of any ReLU comes, in units of its standard deviation."""

    found = float("inf")

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function in (torch.relu, torch.nn.functional.relu):
            self.found = min(self.found, float(arguments[0].abs().min() / arguments[0].std()))
        return function(*arguments, **(keywords or {}))


def distance_from_a_kink(twins, images):
    """In float64. Nearer than float32 rounds, the sign and with it the gradient are chance."""
    precision = PRECISIONS["float64"]
    with torch.no_grad(), SmallestReluInput() as smallest:
        twins.torch(precision).train()(as_tensor(images, precision))
    return smallest.found


def assert_block_equals_pytorch(block, size):
    twins = ReferencePair.random(block)
    candidates = (
        adversarial_images(block, batch=2, height=size[0], width=size[1], seed=seed)
        for seed in range(1, 50)
    )
    images = next(images for images in candidates if distance_from_a_kink(twins, images) > 3e-6)
    comparison = compare_pair(twins, images, Plan(gradients=True))
    assert comparison.passed, max(comparison.measurements, key=lambda m: m.verdict.excess)


def test_the_distance_from_a_kink_is_seen():
    block = BlockConfig(in_channels=4, out_channels=4)
    twins, images = ReferencePair.random(block), adversarial_images(block, batch=2, seed=1)
    first = next(key for key in twins.state if key.endswith("running_mean")).removesuffix(
        "running_mean"
    )
    zeroed = {
        f"{first}{name}": np.array([1, 0, 1, 1], np.float32) * twins.state[f"{first}{name}"]
        for name in ("weight", "bias")
    }
    assert 1e-7 < distance_from_a_kink(twins, images) < 0.1
    assert distance_from_a_kink(replace(twins, state={**twins.state, **zeroed}), images) == 0


@pytest.fixture
def small_checkpoint(tmp_path, monkeypatch):
    """Random weights; its convolutions are Winograd's, products and sums over taps."""
    monkeypatch.chdir(tmp_path)
    config = ResNetConfig(
        depths=(1, 1), widths=(64, 72), stem="cifar", stem_width=64, num_classes=5
    )
    flax_resblock.save(
        ReferencePair.random(config, seed=6).flax(PRECISIONS["float32"]), "small.pth"
    )
    return "small.pth"


@pytest.mark.slow
def test_the_verifier_compares_either_lowering(small_checkpoint, monkeypatch):
    command = ["verify", small_checkpoint, "--gradients", "--height", "9", "--width", "8"]
    assert run([*command, "--conv-lowering", "auto", "--json", "auto.json"]) == 0
    facts = json.loads(Path("auto.json").read_text())
    assert facts["provenance"]["conv_lowering"] == "auto"
    exact = winograd._g
    monkeypatch.setattr(winograd, "_g", lambda w: [value * (1 + 1e-9) for value in exact(w)])
    # the control: another transform is seen, but only there
    assert run([*command, "--conv-lowering", "auto"]) == 1
    assert run([*command, "--json", "plain.json"]) == 0
    assert json.loads(Path("plain.json").read_text())["provenance"]["conv_lowering"] == "xla"


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_of_architectures(), ids=brief)
def test_blocks_of_the_architectures_equal_pytorch(block):
    """Outputs, statistics and gradients, float64 to 1e-12 and float32 by the oracle."""
    assert for_cpu()
    assert_block_equals_pytorch(block, (5, 6))


@pytest.mark.parametrize(
    ("height", "width", "window", "stride", "padding"),
    [(7, 8, 3, 2, 1), (9, 9, 3, 1, 1), (5, 6, 2, 2, 0), (1, 1, 3, 2, 1)],
)
def test_max_pooling_is_pytorchs_where_pixels_are_equal_too(height, width, window, stride, padding):
    rng = np.random.default_rng(0)
    pixels = rng.integers(-2, 3, (2, height, width, 5)).astype(np.float32)
    there = torch.from_numpy(pixels).permute(0, 3, 1, 2).requires_grad_()
    pooled = torch.nn.functional.max_pool2d(there, window, stride, padding)
    dy = torch.from_numpy(rng.integers(-8, 8, tuple(pooled.shape)).astype(np.float32))
    (gradient,) = torch.autograd.grad(pooled, there, dy)

    @jax.jit
    def both(x, dy):
        y, back = jax.vjp(lambda x: max_pool(x, window, stride, padding), x)
        return y, *back(dy)

    y, dx = both(pixels, dy.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(y, pooled.detach().permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(dx, gradient.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("ratio", fast_only([1000], [10, 1000]))
def test_the_norm_stays_accurate_where_the_mean_is_large(ratio):
    """At mean / std = 1000: under 1e-5 for statistics and output; x's gradient as in PyTorch."""
    rng = np.random.default_rng(0)
    single = (rng.normal(ratio, 1, (16, 12, 12, 8))).astype(np.float32)
    dy = rng.normal(0, 1, single.shape).astype(np.float32)
    one, zero = np.ones(8, np.float32), np.zeros(8, np.float32)
    y, back, moments = jax.vjp(
        lambda x: normalised_by_batch(x, jnp.asarray(one), jnp.asarray(zero), 1e-5),
        jnp.asarray(single),
        has_aux=True,
    )
    wide = single.astype(np.float64)
    mean, var = wide.mean((0, 1, 2)), wide.var((0, 1, 2))
    assert relative_l2(moments.biased_var, var) <= 1e-5
    assert relative_l2(moments.mean, mean) <= 1e-6
    errors = {}
    for dtype in (torch.float64, torch.float32):
        x = torch.from_numpy(single).to(dtype).permute(0, 3, 1, 2).requires_grad_()
        out = torch.nn.functional.batch_norm(x, None, None, training=True, eps=1e-5)
        (gradient,) = torch.autograd.grad(
            out, x, torch.from_numpy(dy).to(dtype).permute(0, 3, 1, 2)
        )
        errors[dtype] = [value.detach().permute(0, 2, 3, 1).numpy() for value in (out, gradient)]
    for mine, truth, theirs in zip(
        (y, back(jnp.asarray(dy))[0]), errors[torch.float64], errors[torch.float32], strict=True
    ):
        assert (
            verdict_of(relative_l2(mine, truth), relative_l2(theirs, truth), 2**-23).passed
            or relative_l2(mine, truth) <= 1e-5 * ratio / 100
        )


@pytest.fixture
def wide_network():
    config = ResNetConfig(
        depths=(1, 1), widths=(64, 128), stem="cifar", stem_width=64, num_classes=5
    )
    return flax_resblock.nn.resnet.ResNet(config, rngs=nnx.Rngs(0))


def program(network, platform):
    """The gradient's program as it is handed to the compiler of a platform."""
    graphdef, state = nnx.split(network)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)

    def loss(state, images):
        return jnp.sum(nnx.merge(graphdef, state)(images, use_running_average=True) ** 2)

    return (
        jax.jit(jax.grad(loss, allow_int=True))
        .trace(state, images)
        .lower(lowering_platforms=(platform,))
        .as_text()
    )


@pytest.mark.parametrize("platform", fast_only(["tpu"], ["tpu", "cuda", "rocm"]))
def test_other_platforms_get_the_convolution_untouched(platform, wide_network):
    there = program(wide_network, platform)
    with conv_lowering("xla"):
        plain = program(wide_network, platform)
    count = "stablehlo.convolution"
    assert there.count(count) == plain.count(count) > 15
    assert there.count("stablehlo.dot_general") == plain.count("stablehlo.dot_general")
    here = program(wide_network, "cpu")
    assert here.count(count) < plain.count(count)  # the control: on a CPU it is something else


def test_the_switches(wide_network, monkeypatch):
    auto = program(wide_network, "cpu")
    with conv_lowering("xla"):
        plain = program(wide_network, "cpu")
        assert not for_cpu()
    with strict():
        assert program(wide_network, "cpu") == plain.replace("DEFAULT", "HIGHEST")
    chosen = flax_resblock.nn.resnet.ResNet(
        wide_network.config, conv_lowering="xla", rngs=nnx.Rngs(0)
    )
    assert (
        program(chosen, "cpu").count("stablehlo.convolution")
        == plain.count("stablehlo.convolution")
        > auto.count("stablehlo.convolution")
    )
    with pytest.raises(ValueError, match="winograd"), conv_lowering("winograd"):
        pass
    with pytest.raises(ValueError, match="choose from auto, xla"):
        ResidualBlock(3, 4, conv_lowering="fast", rngs=nnx.Rngs(0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not for_cpu()


def many_users(keep):
    def f(x, y):
        z = keep(x * y + jnp.square(y))
        return [z[:, i::4] + i for i in range(4)]

    return f


def test_a_kept_value_is_computed_once():
    x, y = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(8, 12, 64)), jnp.float32)
        for seed in range(2)
    )

    def products(keep):
        text = jax.jit(many_users(keep)).lower(x, y).compile().as_text()
        return sum(" multiply(" in line for line in text.splitlines())

    assert products(materialised) == 2
    assert products(lambda x: x) >= 5  # the control: left to itself, XLA computes it for each user


def test_a_kept_value_has_its_derivatives_and_other_platforms_nothing_of_it():
    x, y = (
        jnp.asarray(np.random.default_rng(seed).normal(size=(2, 8, 3)), jnp.float32)
        for seed in range(2)
    )
    here, plain = many_users(materialised), many_users(lambda x: x)

    def derived(f):
        along = jax.jvp(f, (x, y), (y, x))[1]
        back = jax.vjp(f, x, y)[1](f(y, x))
        return [
            *f(x, y),
            *along,
            *back,
            *jax.vmap(f)(x[None], y[None]),
            *jax.jacfwd(jax.jit(f))(x, y),
        ]

    for one, other in zip(derived(here), derived(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    there = [
        jax.jit(f).trace(x, y).lower(lowering_platforms=("tpu",)).as_text() for f in (here, plain)
    ]
    assert there[0] == there[1]
    assert "inlineable" in jax.jit(here).lower(x, y).as_text()


def test_only_a_derivative_keeps_what_the_backward_pass_uses():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 3)), jnp.float32)

    def f(x):
        return jnp.sum(jnp.sin(kept(x * x)))

    assert "inlineable" not in jax.jit(f).lower(x).as_text()
    assert "inlineable" in jax.jit(jax.grad(f)).lower(x).as_text()
    np.testing.assert_allclose(jax.grad(f)(x), 2 * x * jnp.cos(x * x), rtol=1e-5)
    block = ResidualBlock(64, 64, rngs=nnx.Rngs(0))
    block.eval()
    images = jax.ShapeDtypeStruct((1, 4, 4, 64), jnp.float32)
    # so that what is exported is what is evaluated, to the last bit
    assert "inlineable" not in jax.jit(block).lower(images).as_text()


def test_vmap_and_half_precision():
    shape = (2, 6, 6, 64, 64, 3, 1)
    x, kernel, _ = map(jnp.asarray, arrays(shape, np.float32))
    f = function(shape, "auto")
    many = jax.vmap(f, in_axes=(0, None))(jnp.stack([x, 2 * x]), kernel)
    np.testing.assert_allclose(many[1], 2 * f(x, kernel), rtol=1e-4, atol=1e-5)
    half = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
    assert forms_of(*half, stride=1, padding=1, dilation=1, groups=1) is None


def test_the_precision_of_the_moment_of_tracing_reaches_the_gradients():
    shape = (1, 6, 6, 64, 64, 3, 1)
    x, kernel, dy = map(jnp.asarray, arrays(shape, np.float32))
    f = function(shape, "auto")
    with jax.default_matmul_precision("highest"):
        traced = jax.jit(lambda x, kernel, dy: jax.vjp(f, x, kernel)[1](dy)).trace(x, kernel, dy)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("HIGHEST") > 0
    assert "DEFAULT, DEFAULT" not in text


@pytest.mark.slow
@pytest.mark.parametrize("mapped", [False, True], ids=["jit", "shard_map"])
def test_a_batch_spread_over_devices_has_the_same_gradients(mapped):
    """Four devices, partitioned by the compiler and by hand: output and gradients to 1e-12."""
    shape = (8, 6, 7, 64, 66, 3, 1)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))
    spread, whole = jax.sharding.PartitionSpec("batch"), jax.sharding.PartitionSpec()
    f = function(shape, "auto")

    def loss(kernel, x, dy):
        if mapped:
            kernel = jax.lax.pcast(kernel, "batch", to="varying")
        total = jnp.sum(f(x, kernel) * dy)
        return jax.lax.psum(total, "batch") if mapped else total

    both = jax.grad(loss, argnums=(0, 1))
    with jax.enable_x64(True):
        x, kernel, dy = map(jnp.asarray, arrays(shape))
        _, back = jax.vjp(function(shape, "xla"), x, kernel)
        truth = back(dy)[::-1]
        if mapped:
            found = jax.jit(
                jax.shard_map(
                    both, mesh=mesh, in_specs=(whole, spread, spread), out_specs=(whole, spread)
                )
            )(kernel, x, dy)
        else:
            sharding = jax.sharding.NamedSharding(mesh, spread)
            found = jax.jit(both)(kernel, jax.device_put(x, sharding), jax.device_put(dy, sharding))
            assert len(found[1].sharding.device_set) == 4
        assert max(map(relative_l2, found, truth)) <= LIMIT
        assert relative_l2(found[0], 1.00001 * truth[0]) >= 1e6 * LIMIT
