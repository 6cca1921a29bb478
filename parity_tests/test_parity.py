"""Every block and network: Flax equals PyTorch, and wrong variants fail by far."""

import pytest

from flax_resblock import BlockConfig
from flax_resblock.config import SlotKind, walk
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity.battery import BATTERY
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.reference import ReferencePair
from parity_tests.support import fast_only

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
SIZES = dict(zip(ODD_BLOCKS, [(9, 9), (7, 12), (10, 5)], strict=True))


def twins_of(config, seed=0, **norm_options) -> ReferencePair:
    return ReferencePair.random(config, seed, **norm_options)


def worst(comparison):
    return max(comparison.measurements, key=lambda m: m.verdict.excess)


@pytest.mark.parametrize("name", fast_only([*ODD_BLOCKS][1:2], ODD_BLOCKS))
def test_block_of_unusual_numbers_equals_pytorch_at_any_size(name):
    config, size = ODD_BLOCKS[name], SIZES[name]
    images = adversarial_images(config, batch=3, height=size[0], width=size[1], seed=sum(size))
    comparison = compare_pair(twins_of(config), images)
    assert comparison.passed, worst(comparison)


BLOCKS = [name for name, config in BATTERY.items() if isinstance(config, BlockConfig)]


@pytest.mark.parametrize("name", fast_only(BLOCKS[::6], BATTERY))
def test_every_option_equals_pytorch_in_both_modes_with_gradients(name):
    config = BATTERY[name]
    comparison = compare_pair(
        twins_of(config), adversarial_images(config, batch=3), Plan(gradients=True)
    )
    assert comparison.passed, worst(comparison)
    groups = {(precision, quantity) for precision, quantity, _ in comparison.groups()}
    assert {precision for precision, _ in groups} == {"float64", "float32"}
    stated = {"tensors", "eval forward", "train forward"}
    if config.norm != "group":  # which has none
        stated |= {"running statistics", "running statistics after 5 batches"}
    assert {quantity for _, quantity in groups} >= stated
    gradients = [
        m
        for m in comparison.measurements
        if m.quantity == "parameter gradient" and m.precision == "float64"
    ]
    norms = {slot.path for slot in walk(config) if slot.kind is SlotKind.FROZEN_NORM}
    trainable = [
        e
        for e in StateMap(config, NAMINGS["torchvision"]).entries
        if e.flax_path[-1] in ("kernel", "scale", "bias") and e.flax_path[:-1] not in norms
    ]
    assert len(gradients) == len(trainable)


def test_one_pixel_at_stride_2_still_projects():
    """The shortcut projects because of the numbers, not because shapes differ."""
    config = BlockConfig(in_channels=6, out_channels=6, stride=2)
    images = adversarial_images(config, batch=5, height=1, width=1)
    comparison = compare_pair(twins_of(config), images, Plan(precisions=("float64",)))
    assert comparison.passed, worst(comparison)
    assert "shortcut.conv" in {m.slot for m in comparison.measurements}


OPTIONS = [{"momentum": None}, {"momentum": 0.37}, {"eps": 1e-3}]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_norm_options_mean_the_same_on_both_sides(options):
    config = BATTERY["basic block, stride 2"]
    comparison = compare_pair(twins_of(config, **options), adversarial_images(config, batch=3))
    assert comparison.passed, worst(comparison)


SQUARE = BlockConfig(in_channels=6, out_channels=6, stride=2)


def test_float32_errors_are_judged_against_float64_not_against_each_other():
    comparison = compare_pair(
        twins_of(SQUARE),
        adversarial_images(SQUARE, batch=2),
        Plan(train=False, precisions=("float32",)),
    )
    rows = [m for m in comparison.measurements if m.quantity == "eval forward"]
    assert all(0 < m.verdict.reference_error < 1e-5 for m in rows)
    # the output is the block's, in another order in memory
    assert len({f"{m.verdict.reference_error:.6e}" for m in rows}) == len(
        {m.slot for m in rows if m.slot != "output"}
    )
