"""Every block and network: Flax equals PyTorch, and wrong variants fail by far."""

import copy
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from flax_resblock import BlockConfig
from flax_resblock.checkpoint.torch_file import with_tensors
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity import parts
from flax_resblock.parity.battery import BATTERY
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair, torch_reference
from flax_resblock.parity.taps import trace_torch

ODD_BLOCKS = {
    "stride 3": BlockConfig(in_channels=4, out_channels=6, stride=3),
    "option A, odd channels": BlockConfig(
        in_channels=5, out_channels=8, stride=2, shortcut="zero_pad"
    ),
    "bottleneck, groups, base width, dilation": BlockConfig(
        in_channels=16,
        out_channels=32,
        kind="bottleneck",
        stride=2,
        groups=4,
        base_width=32,
        dilation=2,
    ),
}
SIZES = [(9, 9), (7, 12), (10, 5)]


def twins_of(config, seed=0, **norm_options) -> ReferencePair:
    return ReferencePair.random(config, seed, **norm_options)


def worst(comparison):
    return max(comparison.measurements, key=lambda m: m.verdict.excess)


@pytest.mark.parametrize(("name", "size"), list(zip(ODD_BLOCKS, SIZES, strict=True)))
def test_block_of_unusual_numbers_equals_pytorch_at_any_size(name, size):
    config = ODD_BLOCKS[name]
    images = adversarial_images(config, batch=3, height=size[0], width=size[1], seed=sum(size))
    comparison = compare_pair(twins_of(config), images)
    assert comparison.passed, worst(comparison)


@pytest.mark.parametrize(
    "name",
    [
        name if number % 6 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate(BATTERY)
    ],
)
def test_every_option_equals_pytorch_in_both_modes_with_gradients(name):
    config = BATTERY[name]
    comparison = compare_pair(
        twins_of(config), adversarial_images(config, batch=3), Plan(gradients=True)
    )
    assert comparison.passed, worst(comparison)
    groups = {(precision, quantity) for precision, quantity, _ in comparison.groups()}
    assert {precision for precision, _ in groups} == {"float64", "float32"}
    assert {quantity for _, quantity in groups} >= {
        "tensors",
        "eval forward",
        "train forward",
        "running statistics",
        "running statistics after 5",
    }
    gradients = [
        m
        for m in comparison.measurements
        if m.quantity == "parameter gradient" and m.precision == "float64"
    ]
    trainable = [
        e
        for e in StateMap(config, NAMINGS["torchvision"]).entries
        if e.flax_path[-1] in ("kernel", "scale", "bias")
    ]
    assert len(gradients) == len(trainable)


def test_one_pixel_at_stride_2_still_projects():
    """The shortcut projects because of the numbers, not because shapes differ."""
    config = BlockConfig(in_channels=6, out_channels=6, stride=2)
    comparison = compare_pair(
        twins_of(config), adversarial_images(config, batch=5, height=1, width=1)
    )
    assert comparison.passed, worst(comparison)
    assert "shortcut.conv" in {m.slot for m in comparison.measurements}


@pytest.mark.parametrize(
    "options", [{"eps": 1e-3}, {"momentum": 0.37}, {"momentum": None}], ids=str
)
def test_norm_options_mean_the_same_on_both_sides(options):
    config = BATTERY["basic block, stride 2"]
    comparison = compare_pair(twins_of(config, **options), adversarial_images(config, batch=3))
    assert comparison.passed, worst(comparison)


# Each wrong variant is applied to the PyTorch side, so that the Flax network under test stays what
# users run.


def _padded_same(module):
    """Flax's 'SAME': at stride 2 and even size one pixel more at the end, none at the beginning."""
    module.conv1.padding = (0, 0)
    module.conv1.register_forward_pre_hook(
        lambda _, inputs: (torch.nn.functional.pad(inputs[0], (0, 1, 0, 1)),)
    )


def _norms(change):
    def apply(module):
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                change(layer)

    return apply


def _biased_running_variance(layer):
    def update(layer, inputs, _):
        if layer.training:
            n = inputs[0].numel() / inputs[0].shape[1]
            old = (layer.running_var - layer.momentum * inputs[0].var((0, 2, 3), unbiased=True)) / (
                1 - layer.momentum
            )
            layer.running_var.copy_(
                (1 - layer.momentum) * old
                + layer.momentum * inputs[0].var((0, 2, 3), unbiased=True) * (n - 1) / n
            )

    layer.register_forward_hook(update)


def _swap_convolutions(module):
    module.conv1.weight.data, module.conv2.weight.data = (
        module.conv2.weight.data,
        module.conv1.weight.data,
    )


def _set(attribute, value):
    return _norms(lambda layer: setattr(layer, attribute, value))


SQUARE = BlockConfig(in_channels=6, out_channels=6, stride=2)
FAULTS = {
    "eps 1e-4": (_set("eps", 1e-4), "eval forward"),
    "momentum 0.11": (_set("momentum", 0.11), "running statistics"),
    "momentum complement": (_set("momentum", 0.9), "running statistics"),
    "SAME padding": (_padded_same, "eval forward"),
    "biased running variance": (_norms(_biased_running_variance), "running statistics"),
    "swapped convolutions": (_swap_convolutions, "eval forward"),
    "stride on the second convolution": (
        lambda m: (setattr(m.conv1, "stride", (1, 1)), setattr(m.conv2, "stride", (2, 2))),
        "eval forward",
    ),
}


@pytest.fixture(scope="module")
def square():
    """A right pair, and the images on which it passes."""
    twins, images = twins_of(SQUARE), adversarial_images(SQUARE, batch=3, height=8, width=12)
    assert compare_pair(twins, images).passed
    return twins, images


@pytest.mark.parametrize(
    "fault",
    ["SAME padding", *(pytest.param(f, marks=pytest.mark.slow) for f in FAULTS if "SAME" not in f)],
)
def test_a_wrong_variant_fails_by_a_hundred_times_the_limit(fault, square, monkeypatch):
    break_it, quantity = FAULTS[fault]

    def trace_broken(module, *args, **kwargs):
        module = copy.deepcopy(module)
        break_it(module)
        return trace_torch(module, *args, **kwargs)

    monkeypatch.setattr(parts, "trace_torch", trace_broken)
    rows = [m for m in compare_pair(*square).measurements if m.quantity == quantity]
    wide, narrow = ([m for m in rows if m.precision == p] for p in ("float64", "float32"))
    assert max(m.verdict.excess for m in wide) >= 100
    # against the true yardstick, not that of the broken module
    assert max(replace(m.verdict, limit=1e-6).excess for m in narrow) >= 100


def test_statistics_of_a_second_batch_accumulate():
    """Five batches in a row, float64: the running statistics follow PyTorch's."""
    config, twins = SQUARE, twins_of(SQUARE)
    module = twins.torch(PRECISIONS["float64"]).train()
    with jax.enable_x64(True):
        model = twins.flax(PRECISIONS["float64"])
        model.train()
        for seed in range(5):
            images = adversarial_images(config, batch=2, height=5, width=6, seed=seed)
            module(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
            model(jax.numpy.asarray(images))
        for entry in twins.state_map.entries:
            if entry.flax_path[-1] in ("mean", "var", "num_batches_tracked"):
                node = model
                for part in entry.flax_path:
                    node = getattr(node, part)
                np.testing.assert_allclose(
                    node[...], module.state_dict()[entry.torch_key].numpy(), rtol=1e-12
                )


def test_float32_errors_are_judged_against_float64_not_against_each_other():
    comparison = compare_pair(
        twins_of(SQUARE),
        adversarial_images(SQUARE, batch=2),
        Plan(train=False, precisions=("float32",)),
    )
    rows = [m for m in comparison.measurements if m.quantity == "eval forward"]
    assert all(0 < m.verdict.reference_error < 1e-5 for m in rows)
    assert len({m.verdict.reference_error for m in rows}) == len(
        {m.slot for m in rows if m.slot != "output"}
    )


def test_torch_loads_what_the_twins_hold():
    twins = twins_of(SQUARE)
    module = torch_reference(SQUARE)
    module.load_state_dict(with_tensors(twins.state), strict=True)
