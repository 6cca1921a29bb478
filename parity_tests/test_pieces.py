"""A function that is compiled in pieces computes what it computes as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_resblock.cpu.pieces import InPieces, _flat, _key, _moved, _pieces_of

RNG = np.random.default_rng(7)


def layer(x, kernel, shift, *, stride=1, padding=((1, 1), (1, 1)), groups=1):
    """A convolution, a ReLU and an addition."""
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(y) + jnp.asarray(shift)


def network(x, wide, kernels):
    """Two equal layers, strided, grouped and unevenly padded ones, and one on a map smaller than
    its kernel."""
    kept = x
    for kernel in kernels:
        x = layer(x, kernel, 0.25)
    x = layer(x, kernels[0], 0.5, stride=2)
    x = layer(x, wide, 0.25, stride=2, padding=((0, 2), (2, 1)), groups=2)
    x = layer(x, kernels[1], 0.25, stride=3)
    x = layer(x, kernels[0], jnp.float64(0.25))
    return x.reshape(len(x), -1) @ jnp.ones((x[0].size, 3)) / 7, kept


def gradients(x, wide, kernels, weight):
    output, backward, kept = jax.vjp(network, x, wide, kernels, has_aux=True)
    return backward(weight), output, kept


@pytest.fixture
def arguments():
    with jax.enable_x64(True):
        shapes = ((3, 7, 8, 4), (3, 3, 2, 4))
        x, wide = (jnp.asarray(RNG.standard_normal(one)) for one in shapes)
        kernels = [jnp.asarray(RNG.standard_normal((3, 3, 4, 4))) for _ in range(2)]
        yield x, wide, kernels, jnp.asarray(RNG.standard_normal((3, 3)))


def difference(ours, whole):
    pairs = zip(*(jax.tree.leaves(one) for one in (ours, whole)), strict=True)
    return max(float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs)


def test_outputs_and_gradients_are_those_of_the_whole_program(arguments):
    program = InPieces(gradients, *arguments)
    whole = jax.jit(gradients)(*arguments)
    ours = program(*arguments)
    assert jax.tree.structure(ours) == jax.tree.structure(whole)
    assert difference(ours, whole) < 1e-14
    moved = arguments[0] + 1e-9, *arguments[1:]
    assert difference(program(*moved), whole) > 1e-11  # not what it computed before
    assert difference(program(*moved), jax.jit(gradients)(*moved)) < 1e-14


def keys(function, *arguments):
    traced = jax.make_jaxpr(function)(*arguments)
    return [_key(one.operations, one.inputs, one.outputs) for one in _pieces_of(_flat(traced))]


def test_equal_layers_are_compiled_once(arguments):
    found = keys(gradients, *arguments)
    assert len(set(found)) < 0.8 * len(found)
    programs = {id(one) for _, one in InPieces(gradients, *arguments)._steps}
    assert len(programs) == len(set(found))


TABLE = np.arange(4000.0)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: jnp.sin(x - 1e-16) * 2,
        lambda x: jnp.sin(x + 0.0) * 2,
        lambda x: 2 * (jnp.sin(x - 0.0) + x),
        lambda x: jnp.cos(x - 0.0) * 2,
        lambda x: (jnp.sin(x - 0.0) * 2).T,
        lambda x: jax.nn.relu(x),
        lambda x: jax.jit(lambda x: jnp.sin(x) - TABLE[1:4])(x),
        lambda x: jax.jit(lambda x: jnp.sin(x) - TABLE[2:5])(x),
    ],
)
def test_what_differs_is_never_taken_for_equal(other, arguments):
    x = arguments[3]
    assert keys(lambda x: jnp.sin(x - 0.0) * 2, x) != keys(other, x)
    assert keys(other, x) != keys(other, x.astype(jnp.float32))
    assert keys(other, x) != keys(other, x[1:])
    assert keys(other, x) != keys(lambda x: other(jnp.flip(x)), x)


def test_what_xla_has_no_fast_kernel_for_is_written_out(arguments):
    """In float64: zeros between pixels, and the gradients of grouped convolutions."""

    def kinds(operations):
        convolutions = [one.params for one in operations if "lhs_dilation" in one.params]
        grouped = [one for one in convolutions if one["feature_group_count"] > 1]
        return (
            {one["lhs_dilation"] for one in convolutions},
            {one["batch_group_count"] for one in convolutions},
            {one["dimension_numbers"].rhs_spec for one in grouped},
        )

    traced = jax.make_jaxpr(gradients)(*arguments)
    plain, other = (3, 2, 0, 1), (2, 3, 0, 1)
    assert kinds(traced.jaxpr.eqns) == ({(1, 1), (2, 2), (3, 3)}, {1, 2}, {plain, other})
    written = [one for piece in _pieces_of(_flat(traced)) for one in piece.operations]
    assert kinds(written) == ({(1, 1)}, {1}, {plain})


def test_pads_and_flips_without_a_program_are_those_of_xla(arguments):
    x, fill = arguments[0], jnp.float64(0.5)
    ends = ((0, 0, 0), (-1, 2, 1), (3, -2, 2), (0, 1, 0))
    for function in (
        lambda x, fill: lax.pad(x, fill, ends),
        lambda x, _: lax.pad(x, np.float64(-3), ends),
        lambda x, _: lax.rev(x, (1, 3)),
    ):
        program = InPieces(function, x, fill)
        assert [one.result().func for _, one in program._steps] == [_moved]
        assert np.array_equal(program(x, fill), function(x, fill))
        assert not np.array_equal(program(x, fill), function(x + 1, fill))
