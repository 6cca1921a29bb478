"""compile_inference: the model's own logits for any number of images, compiled for a few batch sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_resblock
from flax_resblock import ResNetConfig, compile_inference
from flax_resblock.errors import InputError
from flax_resblock.inference import TransformedConv
from flax_resblock.lowering.switch import conv_lowering
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.twins import Twins

CONFIG = ResNetConfig(depths=(1, 1), widths=(64, 256), stem="cifar", stem_width=64, num_classes=7)


@pytest.fixture(scope="module")
def twins():
    return Twins.random(CONFIG, seed=4)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(0.3, 1.0, (21, 9, 10, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def truth(twins, images):
    with jax.enable_x64(True):
        model = twins.flax(PRECISIONS["float64"])
        return np.asarray(model(jnp.asarray(images, jnp.float64), use_running_average=True))


@pytest.fixture(scope="module")
def compiled(twins, images):
    return compile_inference(twins.flax(PRECISIONS["float32"]), images[:8])


@pytest.mark.parametrize("count", [1, 3, 8, 21])
def test_any_number_of_images_gets_the_models_logits(count, compiled, images, truth, twins):
    logits = np.asarray(compiled(images[:count]))
    assert logits.shape == (count, 7)
    plain = np.asarray(twins.flax(PRECISIONS["float32"])(jnp.asarray(images[:count]), use_running_average=True))
    assert relative_l2(logits, truth[:count]) <= max(4 * relative_l2(plain, truth[:count]), 8 * 2**-23)
    assert relative_l2(logits, truth[1 : count + 1]) > 1e-3 or count == 21  # the control: other images


def test_only_powers_of_two_and_the_example_are_compiled(compiled, images):
    assert compiled.batch_sizes == (1, 2, 4, 8)
    for count in (1, 3, 5, 6, 7, 8, 20):
        compiled(images[:count])
    assert set(compiled._compiled) <= set(compiled.batch_sizes)
    assert compile_inference(flax_resblock.ResidualBlock(3, 4, rngs=nnx.Rngs(0)), jax.ShapeDtypeStruct((6, 5, 5, 3), jnp.float32)).batch_sizes == (1, 2, 4, 6)


def test_winograds_kernels_are_transformed_once_on_a_cpu_and_nowhere_else(twins, images):
    def transformed(lowering):
        with conv_lowering(lowering):
            made = compile_inference(twins.flax(PRECISIONS["float32"]), images[:2])
        return made._jitted.lower(made._arrays, images[:2]).as_text(), len(made._arrays)

    here, arrays = transformed("auto")
    plain, fewer = transformed("xla")
    assert arrays - fewer >= 16
    assert plain.count("stablehlo.convolution") > here.count("stablehlo.convolution")


def test_a_small_image_of_few_channels_is_convolved_as_it_is():
    block = flax_resblock.ResidualBlock(64, 64, rngs=nnx.Rngs(0))
    fast = TransformedConv(block.conv1)
    for size, dots in ((4, 0), (64, 16)):
        text = jax.jit(lambda x: fast(x)).lower(jax.ShapeDtypeStruct((1, size, size, 64), jnp.float32)).as_text()
        assert (text.count("stablehlo.dot_general") >= 16) == bool(dots)


def test_the_model_stays_as_it_was(twins, images):
    model = twins.flax(PRECISIONS["float32"])
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    compile_inference(model, images[:1])
    assert all(np.array_equal(old, new) for old, new in zip(before, jax.tree.leaves(nnx.state(model)), strict=True))


@pytest.mark.parametrize("shape", [(2, 9, 11, 3), (2, 9, 10, 1), (9, 10, 3), (0, 9, 10, 3)], ids=str)
def test_other_images_are_refused(shape, compiled):
    with pytest.raises(InputError, match=r"compiled for images \(N, 9, 10, 3\)"):
        compiled(np.ones(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, 9, 10, 4), (9, 10, 3), (0, 9, 10, 3)], ids=str)
def test_an_example_that_is_no_batch_is_refused(shape, twins):
    with pytest.raises(InputError, match="at least one"):
        compile_inference(twins.flax(PRECISIONS["float32"]), jax.ShapeDtypeStruct(shape, jnp.float32))
