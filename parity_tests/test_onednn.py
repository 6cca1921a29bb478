"""XLA's instruction for oneDNN: a plain convolution, never in jax's cache of programs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_resblock.cpu import onednn
from flax_resblock.cpu.onednn import ConvolutionSizes, not_kept
from flax_resblock.cpu.orders import BLOCKS, in_plain_order, orders_of, reordered
from flax_resblock.cpu.primitives import DIMENSIONS
from flax_resblock.cpu.rewrite import evaluate_fused, kernels
from flax_resblock.parity.oracle import relative_l2

pytestmark = pytest.mark.skipif(
    not onednn.available(), reason="this machine or this jaxlib has no known oneDNN"
)

CASES = (
    ((2, 9, 7, 5), ConvolutionSizes((3, 3, 5, 30), (1, 1), (1, 1), (1, 1), 1)),
    ((1, 8, 8, 256), ConvolutionSizes((3, 3, 256, 96), (2, 2), (1, 1), (1, 1), 1)),
    ((3, 13, 10, 3), ConvolutionSizes((7, 7, 3, 64), (2, 2), (3, 3), (1, 1), 1)),
    ((2, 7, 7, 48), ConvolutionSizes((1, 1, 48, 80), (1, 1), (0, 0), (1, 1), 1)),
    ((2, 11, 6, 16), ConvolutionSizes((3, 2, 16, 24), (2, 1), (2, 0), (1, 2), 1)),
    ((2, 9, 9, 32), ConvolutionSizes((3, 3, 4, 32), (1, 1), (2, 2), (2, 2), 8)),
)


@pytest.fixture(scope="module")
def orders():
    """Of all cases, tried together."""
    return orders_of((of, shape) for shape, of in CASES)


def _data(shape, of, seed=0):
    rng = np.random.default_rng(seed)
    outputs = (shape[0], *of.size(*shape[1:3]), of.kernel[3])
    return [
        rng.normal(0.0, 1.0, size).astype(np.float32)
        for size in (shape, of.kernel, of.kernel[3:], outputs)
    ]


def _plain(of, x, kernel):
    sides = [(side, side) for side in of.padding]
    return lax.conv_general_dilated(
        x,
        kernel,
        of.strides,
        sides,
        rhs_dilation=of.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=of.groups,
    )


@pytest.mark.parametrize(("shape", "of"), CASES, ids=str)
def test_it_computes_what_xla_computes(shape, of, orders):
    x, kernel, bias, residual = _data(shape, of)
    with jax.enable_x64(True):
        wide = [jnp.asarray(value, jnp.float64) for value in (x, kernel, bias, residual)]
        truth = np.asarray(jnp.maximum(_plain(of, wide[0], wide[1]) + wide[2] + wide[3], 0))
    plain = jnp.maximum(_plain(of, x, kernel) + bias + residual, 0)
    ordered = orders[of, shape]
    with not_kept():
        found = jax.jit(partial(ordered, relu=True))(
            x, reordered(kernel, ordered.block), bias, residual
        )
        control = jax.jit(ordered)(x, reordered(kernel, ordered.block), bias, residual)
    assert relative_l2(np.asarray(found), truth) <= max(
        4 * relative_l2(np.asarray(plain), truth), 8 * 2**-23
    )
    assert relative_l2(np.asarray(control), truth) > 1e-2  # without its ReLU


@pytest.mark.parametrize(("shape", "of"), [case for case in CASES if case[1].groups == 1], ids=str)
def test_the_right_order_gives_the_same_bits_and_another_does_not(shape, of, orders):
    x, kernel, _, _ = _data(shape, of, seed=1)
    ordered = orders[of, shape]
    with not_kept():
        expected = jax.jit(of)(x, kernel)
        found = jax.jit(ordered)(x, reordered(kernel, ordered.block))
        assert np.array_equal(found, expected)
        if ordered.block:
            assert not np.array_equal(
                jax.jit(ordered)(x, reordered(kernel[:, :, ::-1], ordered.block)), expected
            )


def test_a_residual_that_is_needed_again_stays_as_it_was():
    """The sum is written over the residual; one that is used later, or the caller's, is copied."""
    of = ConvolutionSizes((3, 3, 8, 8), (1, 1), (1, 1), (1, 1), 1)
    x, kernel, bias, residual = _data((2, 6, 5, 8), of, seed=2)
    before = jnp.array(residual)

    def twice(kernel, bias, x, residual):
        inner = residual * 2
        y = of(x, kernel, bias, inner, relu=True)
        return of(
            y, kernel, bias, residual
        ), inner + y  # one is an argument, the other is used again

    with not_kept():
        first, second = jax.jit(twice)(kernel, bias, x, before)
    y = jnp.maximum(_plain(of, x, kernel) + bias + 2 * residual, 0)
    assert np.array_equal(before, residual)
    assert relative_l2(np.asarray(second), np.asarray(2 * residual + y)) < 1e-6
    assert (
        relative_l2(np.asarray(first), np.asarray(_plain(of, y, kernel) + bias + residual)) < 1e-6
    )
    # the control: the residual overwritten
    assert relative_l2(np.asarray(second), np.asarray(2 * y)) > 1e-2


def test_what_follows_a_convolution_is_taken_along_where_nobody_else_sees_it():
    of = ConvolutionSizes((3, 3, 4, 4), (1, 1), (1, 1), (1, 1), 1)
    x, kernel, bias, _ = _data((2, 6, 5, 4), of)
    seen = []

    def network(kernel, bias, x):
        y = jax.nn.relu(_plain(of, x, kernel) + bias.reshape(1, 1, 1, -1))
        z = _plain(of, y, kernel)
        return jax.nn.relu(z + x) + z  # z is used twice, and so is computed alone

    def compute(fused):
        seen.append((fused.relu, fused.bias is not None, fused.residual is not None))
        y = _plain(fused.convolution, fused.x, fused.kernel)
        y = y + sum(value for value in (fused.bias, fused.residual) if value is not None)
        return jnp.maximum(y, 0) if fused.relu else y

    found = evaluate_fused(
        jax.make_jaxpr(network)(kernel, bias, x), [kernel, bias, jnp.asarray(x)], compute
    )[0]
    assert seen == [(True, True, False), (False, False, False)]
    assert relative_l2(np.asarray(found), np.asarray(network(kernel, bias, x))) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "taken"), [(jnp.float32, 1), (jnp.bfloat16, 0), (jnp.float16, 0)], ids=str
)
def test_only_convolutions_of_float32_are_handed_on(dtype, taken):
    of = ConvolutionSizes((3, 3, 4, 4), (1, 1), (1, 1), (1, 1), 1)
    x, kernel = (jnp.asarray(value, dtype) for value in _data((2, 6, 5, 4), of)[:2])
    seen = []

    def compute(fused):
        seen.append(fused)
        return _plain(of, fused.x, fused.kernel)

    network = jax.make_jaxpr(lambda kernel, x: _plain(of, x, kernel))(kernel, x)
    found = evaluate_fused(network, [kernel, x], compute)[0]
    assert (len(seen), len(kernels(network)), found.dtype) == (taken, taken, dtype)


UNKNOWN = {
    "another version": ("VERSIONS", frozenset({"0.0.1"}), "has not been tested"),
    "no such instruction": ("TARGET", "__onednn$gone", r"__onednn\$gone"),
}


@pytest.mark.parametrize("lost", UNKNOWN)
def test_an_unknown_jaxlib_does_without_and_says_so_once(lost, monkeypatch):
    name, value, words = UNKNOWN[lost]
    monkeypatch.setattr(onednn, name, value)
    onednn.available.cache_clear()
    with pytest.warns(RuntimeWarning, match=words) as caught:
        found = [onednn.available() for _ in range(2)]
    onednn.available.cache_clear()
    assert (found, len(caught)) == ([False, False], 1)


@pytest.mark.parametrize(("shape", "of"), [case for case in CASES if case[1].groups == 1], ids=str)
def test_a_kernels_buffer_is_longer_than_what_is_read(shape, of, orders):
    """It has room for whole blocks of both channel axes; nothing in it reaches the result."""
    x, kernel, _, _ = _data(shape, of, seed=1)
    ordered = orders[of, shape]
    height, width, inner, outer = of.kernel
    assert ordered.block
    for block in BLOCKS:
        blocks = -(-inner // block) * -(-outer // block) * block**2
        assert reordered(kernel, ordered.block).size >= height * width * blocks
    with not_kept():
        expected = jax.jit(of)(x, kernel)
        assert np.array_equal(
            jax.jit(ordered)(x, reordered(kernel, ordered.block, np.nan)), expected
        )
        kernel[0, 0, 0, 0] = np.nan  # the control: NaN in the kernel is seen
        assert np.isnan(jax.jit(ordered)(x, reordered(kernel, ordered.block))).any()


def test_the_plain_order_comes_back_bit_for_bit():
    kernel = np.random.default_rng(3).standard_normal((3, 2, 13, 70)).astype(np.float32)
    for block in BLOCKS:
        flat = reordered(kernel, block, np.nan)
        assert np.array_equal(in_plain_order(flat, kernel.shape, block), kernel), block
        other = BLOCKS[BLOCKS.index(block) - 1]  # the control
        assert not np.array_equal(in_plain_order(flat, kernel.shape, other), kernel)


def _kept_from():
    return getattr(jax.config, "jax_persistent_cache_min_compile_time_secs")  # noqa: B009  # a setting that jax's types do not list


def test_its_programs_are_never_kept():
    before, inside = _kept_from(), []
    with not_kept():
        inside.append(_kept_from())
    assert (_kept_from(), inside) == (before, [float("inf")])


@pytest.mark.parametrize(
    ("size", "window", "stride", "padding"),
    [((9, 10), 3, 2, 1), ((5, 4), 5, 2, 2), ((6, 7), 2, 2, 0), ((3, 1), 3, 1, 1)],
    ids=str,
)
def test_a_pool_in_a_traced_network_takes_its_form_for_a_cpu(size, window, stride, padding):
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))

    def network(x):
        return lax.reduce_window(
            x, -jnp.inf, lax.max, (1, window, window, 1), (1, stride, stride, 1), pads
        )

    # below zero: a border of zeros would show
    x = np.random.default_rng(3).normal(-5.0, 1.0, (2, *size, 3)).astype(np.float32)
    traced = jax.make_jaxpr(network)(x)

    def rewritten(x):
        return evaluate_fused(traced, [x], lambda fused: fused.x)[0]

    assert "reduce_window" in str(traced)
    assert "reduce_window" not in str(jax.make_jaxpr(rewritten)(x))
    assert np.array_equal(jax.jit(rewritten)(x), network(x))
