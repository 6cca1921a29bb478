"""compile_inference: the model's own logits for any number of images from a few programs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_resblock
from flax_resblock import ResNetConfig, compile_inference
from flax_resblock.cpu import onednn
from flax_resblock.cpu.inference import WINOGRAD_BYTES, WINOGRAD_PAYS, CpuNetwork, _planned
from flax_resblock.cpu.onednn import ConvolutionSizes
from flax_resblock.cpu.rewrite import Fused
from flax_resblock.cpu.switch import conv_lowering
from flax_resblock.errors import InputError
from flax_resblock.export.inference import _Plain
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from parity_tests.support import fast_only

CONFIG = ResNetConfig(depths=(1, 1), widths=(64, 512), stem="cifar", stem_width=64, num_classes=7)


@pytest.fixture(scope="module")
def twins():
    return ReferencePair.random(CONFIG, seed=4)


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


@pytest.fixture(scope="module")
def quick(twins, images):
    """The programs that compile soonest, for three images."""
    return compile_inference(twins.flax(PRECISIONS["float32"]), images[:3], quick=True)


@pytest.mark.slow
def test_a_kernel_in_onednns_order_is_held_once_and_serves_other_batches(compiled, twins, images):
    held = compiled._network._arrays
    assert any(array is None for array in held) == onednn.available()
    assert any(array is not None and array.ndim == 4 for array in held)  # Winograd's stay
    fresh = compile_inference(twins.flax(PRECISIONS["float32"]), images[:2])
    logits = np.asarray(compiled(images[:2]))
    assert np.array_equal(logits, fresh(images[:2]))
    assert not np.array_equal(logits, fresh(images[1:3]))


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 8, 21])
def test_any_number_of_images_gets_the_models_logits(count, compiled, images, truth, twins):
    logits = np.asarray(compiled(images[:count]))
    assert logits.shape == (count, 7)
    plain = np.asarray(
        twins.flax(PRECISIONS["float32"])(jnp.asarray(images[:count]), use_running_average=True)
    )
    assert relative_l2(logits, truth[:count]) <= max(
        4 * relative_l2(plain, truth[:count]), 8 * 2**-23
    )
    # the control: other images
    assert relative_l2(logits, truth[1 : count + 1]) > 1e-3 or count == 21


@pytest.mark.slow
def test_only_powers_of_two_and_the_example_are_compiled(compiled, images):
    assert compiled.batch_sizes == (1, 2, 4, 8)
    for count in (1, 3, 5, 6, 7, 8, 20):
        compiled(images[:count])
    assert set(compiled._compiled) <= set(compiled.batch_sizes)
    assert compile_inference(
        flax_resblock.ResidualBlock(3, 4, rngs=nnx.Rngs(0)),
        jax.ShapeDtypeStruct((6, 5, 5, 3), jnp.float32),
    ).batch_sizes == (1, 2, 4, 6)


@pytest.fixture(params=fast_only(["oneDNN"], ["oneDNN", "no oneDNN"]))
def jaxlib_of(request, monkeypatch):
    """With a jaxlib that has the instruction, and with one that nothing is known of."""
    onednn.available.cache_clear()
    if request.param == "no oneDNN":
        monkeypatch.setattr(onednn, "VERSIONS", frozenset())
    elif not onednn.available():
        pytest.skip("this machine or this jaxlib has no known oneDNN")
    yield request.param
    onednn.available.cache_clear()


@pytest.mark.filterwarnings("ignore:compile_inference does without oneDNN")
def test_either_jaxlib_gets_the_models_logits(jaxlib_of, twins, images, truth):
    made = compile_inference(twins.flax(PRECISIONS["float32"]), images[:8])
    plain = np.asarray(
        twins.flax(PRECISIONS["float32"])(jnp.asarray(images[:8]), use_running_average=True)
    )
    assert relative_l2(np.asarray(made(images[:8])), truth[:8]) <= max(
        4 * relative_l2(plain, truth[:8]), 8 * 2**-23
    )
    assert isinstance(made._network, CpuNetwork)
    forms = {plan.form for plan in made._network._plans.values()}
    assert forms == ({"onednn", "winograd"} if jaxlib_of == "oneDNN" else {"xla", "winograd"})
    assert WINOGRAD_PAYS[True] != WINOGRAD_PAYS[False]


def test_the_programs_that_compile_soonest_get_the_models_logits(quick, twins, images, truth):
    model, made = twins.flax(PRECISIONS["float32"]), quick
    assert isinstance(made._network, _Plain)
    with conv_lowering("xla"):
        plain = np.asarray(model(jnp.asarray(images[:4]), use_running_average=True))
    logits = np.asarray(made(images[:4]))  # three, and one
    assert relative_l2(logits, truth[:4]) <= max(4 * relative_l2(plain, truth[:4]), 8 * 2**-23)
    assert relative_l2(logits, truth[1:5]) > 1e-3  # the control: other images
    assert np.array_equal(logits, np.asarray(made(images[:4])))


def _square(channels):
    return ConvolutionSizes((3, 3, channels, channels), (1, 1), (1, 1), (1, 1), 1)


@pytest.mark.parametrize(("fewest", "channels"), WINOGRAD_PAYS[True], ids=str)
def test_winograd_is_chosen_from_as_many_tiles_on_as_pay_and_while_its_matrices_fit(
    fewest, channels
):
    most = WINOGRAD_BYTES // (16 * channels * 4)
    forms = [
        _planned(_square(channels), (tiles, 2, 2, channels), True).form
        for tiles in (fewest - 1, fewest, most, most + 1)
    ]
    assert forms == ["onednn", "winograd", "winograd", "onednn"]
    # XLA's own would be slower still
    assert _planned(_square(channels), (most + 1, 2, 2, channels), False).form == "winograd"


@pytest.mark.parametrize(
    "changed",
    [
        {"strides": (2, 2)},
        {"padding": (0, 0)},
        {"dilation": (2, 2)},
        {"groups": 2, "kernel": (3, 3, 256, 512)},
        {"kernel": (1, 3, 512, 512)},
    ],
    ids=str,
)
def test_only_what_winograd_can_compute_is_planned_for_it(changed):
    of = _square(512)
    assert _planned(of, (4, 8, 8, 512), True).form == "winograd"
    assert _planned(replace(of, **changed), (4, 8, 8, 512), True).form == "onednn"


ENDS = [(), ("bias",), ("residual",), ("bias", "residual", "relu")]


@pytest.mark.parametrize("ends", fast_only([ENDS[0], ENDS[-1]], ENDS), ids=str)
@pytest.mark.parametrize(("batch", "form"), [(1, "onednn"), (4, "winograd"), (1, "xla")])
def test_every_form_computes_what_follows_the_convolution(batch, form, ends):
    if form == "onednn" and not onednn.available():
        pytest.skip("this machine or this jaxlib has no known oneDNN")
    of = (
        _square(512)
        if form != "xla"
        else ConvolutionSizes((3, 3, 64, 64), (1, 1), (1, 1), (1, 1), 1)
    )
    rng = np.random.default_rng(5)
    shape = (batch, 5, 6, of.kernel[2])
    plan = _planned(of, shape, form != "xla")
    assert plan.form == form
    x, kernel, residual = (
        rng.normal(0.0, 1.0, size).astype(np.float32) for size in (shape, of.kernel, shape)
    )
    given = {
        "bias": rng.normal(0.0, 1.0, (1, 1, 1, shape[3])).astype(np.float32),
        "residual": residual,
    }

    def computed(x, kernel, given, ends):
        taken = {name: value for name, value in given.items() if name in ends}
        return plan(Fused(of, x, None, **taken, relu="relu" in ends), kernel)

    def plain(x, kernel, given, ends):
        y = of.by_xla(x, kernel)
        y = y + sum(given[name] for name in ("bias", "residual") if name in ends)
        return jnp.maximum(y, 0) if "relu" in ends else y

    with jax.enable_x64(True):
        wide = [jnp.asarray(value, jnp.float64) for value in (x, kernel)]
        truth = np.asarray(
            plain(
                wide[0],
                wide[1],
                {name: np.asarray(value, np.float64) for name, value in given.items()},
                ends,
            )
        )
    prepared, others = plan.prepared(jnp.asarray(kernel)), () if ends else ("relu",)
    with onednn.not_kept():
        found, other = (
            np.asarray(jax.jit(computed, static_argnums=3)(x, prepared, given, some))
            for some in (ends, others)
        )
    assert relative_l2(found, truth) <= max(
        4 * relative_l2(np.asarray(plain(x, kernel, given, ends)), truth), 8 * 2**-23
    )
    assert relative_l2(other, truth) > 1e-3  # the control: something else follows


@pytest.mark.slow
@pytest.mark.parametrize("family", ["resnext50_32x4d", "seresnet18", "resnet18d"])
def test_networks_with_groups_attention_and_pooled_shortcuts(family):
    model = flax_resblock.create(family, num_classes=5, rngs=nnx.Rngs(2))
    images = np.random.default_rng(3).normal(0.2, 1.0, (2, 65, 48, 3)).astype(np.float32)
    with conv_lowering("xla"):
        plain = np.asarray(model(jnp.asarray(images), use_running_average=True))
    logits = np.asarray(compile_inference(model, images)(images))
    assert relative_l2(logits, plain) < 1e-5 < relative_l2(logits[::-1], plain)


def test_plain_lowering_is_left_alone(twins, images):
    with conv_lowering("xla"):
        made = compile_inference(twins.flax(PRECISIONS["float32"]), images[:2])
    assert isinstance(made._network, _Plain)


def test_the_model_stays_as_it_was(twins, images):
    model = twins.flax(PRECISIONS["float32"])
    before = [np.array(leaf) for leaf in jax.tree.leaves(nnx.state(model))]
    compile_inference(model, images[:1])
    assert all(
        np.array_equal(old, new)
        for old, new in zip(before, jax.tree.leaves(nnx.state(model)), strict=True)
    )


@pytest.mark.parametrize(
    "shape", [(2, 9, 11, 3), (2, 9, 10, 1), (9, 10, 3), (0, 9, 10, 3)], ids=str
)
def test_other_images_are_refused(shape, quick):
    with pytest.raises(InputError, match=r"compiled for images \(N, 9, 10, 3\)"):
        quick(np.ones(shape, np.float32))


@pytest.mark.parametrize("shape", [(2, 9, 10, 4), (9, 10, 3), (0, 9, 10, 3)], ids=str)
def test_an_example_that_is_no_batch_is_refused(shape, twins):
    with pytest.raises(InputError, match="at least one"):
        compile_inference(
            twins.flax(PRECISIONS["float32"]), jax.ShapeDtypeStruct(shape, jnp.float32)
        )
