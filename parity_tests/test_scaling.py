"""The figures of docs/scaling.md: multiplications and bytes against the compiler's own counts."""

import importlib
import json
import sys

import jax
import pytest

from flax_resblock.aot.program import lower
from flax_resblock.aot.request import request_for
from flax_resblock.config import ResNetConfig, architecture
from parity_tests.support import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
operations, roofline, tables, scaling = (
    importlib.import_module(name) for name in ("layers", "roofline", "scaling_tables", "scaling")
)

BASIC = ResNetConfig(depths=(2, 1), widths=(8, 16), stem="cifar", stem_width=8, num_classes=5)
BOTTLENECK = ResNetConfig(
    block="bottleneck",
    depths=(1, 2, 1),
    widths=(8, 16, 16),
    stem_width=16,
    groups=4,
    dilated_stages=(3,),
    num_classes=7,
)
ZERO_PAD = ResNetConfig(
    depths=(1, 1), widths=(6, 10), stem="cifar", stem_width=6, shortcut="zero_pad", num_classes=None
)
DEEP = ResNetConfig(
    depths=(1, 1), widths=(8, 12), stem="deep", stem_hidden=(4, 6), stem_width=8, num_classes=3
)
CASES = {
    "basic": (BASIC, 18),
    "bottleneck": (BOTTLENECK, 61),
    "zero_pad": (ZERO_PAD, 15),
    "deep": (DEEP, 37),
}

PER_OUTPUT = {"norm": 3, "relu": 1, "add": 1, "pool": 9}
"""Operations on each output element in evaluation mode: subtract, multiply, add; compare; add; nine
comparisons.
"""


def lowered(config, size, what, batch):
    request = request_for(config, "tpu:v5e:1x1", what=what, batch=batch, height=size, width=size)
    return lower(request, jax.devices()[:1])


def counted(config, size, what, batch):
    """FLOPs as XLA counts them in the program that is asked for."""
    return lowered(config, size, what, batch).cost_analysis()["flops"]


def elementwise(network):
    return sum(
        PER_OUTPUT.get(layer.kind, 0) * layer.outputs
        + (layer.inputs if layer.kind == "mean" else 0)
        for layer in network
    )


@pytest.mark.parametrize("case", CASES)
def test_forward_flops_are_the_compilers_up_to_the_elementwise_ones(case):
    config, size = CASES[case]
    network = operations.layers(config, size)
    rest = counted(config, size, "forward", 3) - operations.flops(
        network, "forward", 3, padding=False
    )
    assert rest == pytest.approx(3 * elementwise(network), rel=0.05)
    wrong = counted(config, size, "forward", 3) - operations.flops(
        network, "forward", 3, padding=True
    )
    assert abs(wrong - 3 * elementwise(network)) > elementwise(network)


@pytest.mark.parametrize("what", ["forward", "train-step"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            {"groups": 1},
            {"groups": 4},
            # every 3x3 convolution has a quarter of the multiplications; everything elementwise
            # stays
        ),
        (
            {"in_channels": 3},
            {"in_channels": 5},
        ),  # only the first convolution, whose input needs no gradient
    ],
)
def test_what_two_networks_differ_by_is_the_compilers_difference_exactly(what, one, other):
    size = 20
    configs = [
        ResNetConfig(
            depths=(1, 1), widths=(8, 16), stem="cifar", stem_width=8, num_classes=5, **changes
        )
        for changes in (one, other)
    ]
    # The second batch takes away what does not depend on the batch: the optimizer's work on
    # parameters.
    growth = [counted(config, size, what, 6) - counted(config, size, what, 4) for config in configs]
    networks = [operations.layers(config, size) for config in configs]
    analytic = [operations.flops(network, what, 2, padding=False) for network in networks]
    assert growth[0] - growth[1] == analytic[0] - analytic[1] != 0
    if what == "train-step":
        as_if_all_were_alike = [
            3 * operations.flops(network, "forward", 2, padding=False) for network in networks
        ]
        differs = as_if_all_were_alike[0] - as_if_all_were_alike[1] != growth[0] - growth[1]
        assert differs == ("in_channels" in one)


def test_resnet50_has_its_published_size():
    network = operations.layers(architecture("resnet50"), 224)
    assert sum(layer.parameters for layer in network) == 25_557_032
    # torchvision's documentation
    assert sum(layer.multiply_adds("forward", True) for layer in network) == pytest.approx(
        4.09e9, rel=2e-3
    )


def test_networks_that_are_not_counted_are_refused():
    with pytest.raises(ValueError, match="are not counted here"):
        operations.layers(architecture("seresnet18"), 64)


def test_bytes_of_a_program_are_those_that_the_compiler_says():
    compiled = lowered(BASIC, 18, "train-step", 4).compile()
    moved = scaling.traffic(compiled.as_text())
    assert sum(moved.values()) == pytest.approx(
        compiled.cost_analysis()["bytes accessed"], rel=0.03
    )
    assert min(moved.values()) > 0


def test_what_stays_on_the_chip_is_not_counted():
    line = (
        "  %y = f32[8,4]{{1,0:T(8,128){space}}} fusion(%x, %x), kind=kLoop, calls=%f, "
        'metadata={{op_name="jit(f)/slot=stem.conv/conv_general_dilated"}}'
    )
    text = (
        "ENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n  %x = f32[8,4]{{1,0:T(8,128)}} parameter(0)\n"
        + line
        + "\n}}\n"
    )
    assert scaling.traffic(text.format(space="")) == {"products": 256, "others": 0}
    assert scaling.traffic(text.format(space="S(1)")) == {"products": 128, "others": 0}


def test_a_copy_to_the_chip_reads_what_it_copies():
    whole, part = "f32[8,4]{1,0:T(8,128)}", "f32[2,4]{1,0:T(8,128)S(1)}"
    head = f"ENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n  %x = {whole} parameter(0)\n"
    piece = (
        f"  %s = (({whole}), {part}, s32[]{{:S(2)}}) slice-start(%x), slice={{[0:2], [0:4]}}\n  "
        f"%d = {part} slice-done(%s)\n}}\n"
    )
    assert scaling.traffic(head + piece) == {"products": 0, "others": 32}
    back = (
        f"  %c = ({whole}, {whole.replace(')}', ')S(1)}')}, u32[]{{:S(2)}}) copy-start(%x)\n  %d "
        f"= {whole} copy-done(%c)\n}}\n"
    )
    assert scaling.traffic(head + back) == {"products": 0, "others": 256}


@pytest.mark.parametrize("what", ["forward", "train-step"])
def test_the_slower_roof_decides(what):
    network = operations.layers(BOTTLENECK, 61)
    arithmetic = roofline.total(
        roofline.roofline(network, what, 8, width=4, fusion="fused", peak=1e9, bandwidth=1e18)
    )
    assert arithmetic.flops / 1e9 == pytest.approx(arithmetic.seconds, rel=1e-6)
    memory = roofline.total(
        roofline.roofline(network, what, 8, width=4, fusion="fused", peak=1e18, bandwidth=1e9)
    )
    assert memory.bytes / 1e9 == pytest.approx(memory.seconds, rel=1e-6)
    assert arithmetic.waiting < 1e-6 * arithmetic.seconds
    assert memory.waiting == memory.seconds
    alone = roofline.total(
        roofline.roofline(network, what, 8, width=4, fusion="alone", peak=1e18, bandwidth=1e9)
    )
    assert alone.bytes > memory.bytes


def test_from_the_balanced_batch_on_arithmetic_takes_longer_than_memory():
    network = operations.layers(architecture("resnet50"), 64)
    roofs = {"peak": 300e9, "bandwidth": 10e9}
    batch = roofline.balanced_batch(network, "train-step", width=4, fusion="fused", **roofs)

    def computes(batch):
        part = roofline.total(
            roofline.roofline(network, "train-step", batch, width=4, fusion="fused", **roofs)
        )
        return part.flops / roofs["peak"] >= part.bytes / roofs["bandwidth"]

    assert batch > 1
    assert computes(batch)
    assert not computes(batch - 1)
    assert (
        roofline.balanced_batch(
            network, "train-step", width=4, fusion="fused", peak=300e12, bandwidth=10e9
        )
        is None
    )


def test_all_reduces_cost_what_rings_and_trees_cost():
    ethernet = roofline.Network("", 1, 1, 0, outer_bandwidth=10e9, outer_latency=1e-5)
    assert ethernet.seconds(1e9, 1) == 0
    assert ethernet.seconds(1e9, 4) == pytest.approx(2 * 3 / 4 * 0.1 + 6e-5)
    # a ring would have 2046 steps
    assert ethernet.seconds(8, 1024) == pytest.approx(20e-5, rel=1e-3)
    torus = roofline.Network("", 256, 100e9, 1e-6, torus=True)
    assert torus.seconds(8, 8) == pytest.approx(2 * (1 + 3) * 1e-6, rel=1e-3)
    assert torus.seconds(8, 256) == pytest.approx(60e-6, rel=1e-3)
    hosts = roofline.Network("", 8, 100e9, 0, 10e9, 0)
    assert hosts.seconds(1e9, 32) == pytest.approx(2 * 7 / 8 * 0.01 + 2 * 3 / 4 * 0.1)


def test_only_what_does_not_hide_behind_the_backward_pass_costs_time():
    assert roofline.efficiency(1.0, 0.5, 0.0, overlap=0.0) == pytest.approx(1 / 1.5)
    assert roofline.efficiency(1.0, 0.5, 0.0, overlap=2 / 3) == 1
    assert roofline.efficiency(1.0, 0.5, 0.25, overlap=2 / 3) == pytest.approx(0.8)


def test_the_tables_of_the_document_are_those_of_its_figures():
    document = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    figures = json.loads((REPOSITORY / "docs" / "scaling.json").read_text(encoding="utf-8"))
    assert set(figures["programs"]) == set(scaling.PROGRAMS)
    assert all(f"<!-- table {name} -->" in document for name in tables.TABLES)
    assert tables.fill(document, figures) == document
    figures["measured"]["copy"] *= 1.1
    assert tables.fill(document, figures) != document
