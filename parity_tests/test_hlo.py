"""Reading compiled programs: captured lines of real compilers, and what must be found in them."""

from __future__ import annotations

import pytest

from flax_resblock.aot.hlo import Collective, Narrow, Product, read_hlo, slot_of
from flax_resblock.aot.outcome import bytes_needed, computed_in, findings
from flax_resblock.aot.request import request_for
from flax_resblock.config import BlockConfig
from parity_tests.support import REPOSITORY

TPU = (REPOSITORY / "parity_tests" / "hlo" / "tpu.txt").read_text(encoding="utf-8")

CUDA = (REPOSITORY / "parity_tests" / "hlo" / "cuda.txt").read_text(encoding="utf-8")


def test_convolutions_of_tpu_have_slot_direction_precision_and_operand_types():
    assert read_hlo(TPU).products == (
        Product("stage1.0.conv1", "forward", "convolution", ("highest", "highest"), ("f32", "f32")),
        Product(
            "stage1.0.conv1", "backward", "convolution", ("default", "default"), ("bf16", "f32")
        ),
    )


def test_narrow_values_are_found_at_their_slot():
    assert read_hlo(TPU).narrow == (Narrow("bf16", "stage1.0.conv1", 1),)
    assert read_hlo(CUDA).narrow == ()


def test_collectives_have_the_bytes_of_their_operands():
    (reduce,) = read_hlo(TPU).collectives
    assert reduce == Collective(
        "all-reduce", ((3, 3, 16, 32), (32,)), 4 * (3 * 3 * 16 * 32 + 32), "stage1.0.conv1"
    )
    (started,) = read_hlo(CUDA).collectives
    assert (started.kind, started.bytes) == ("all-reduce", 4 * 512 * 512)


def test_cycles_are_summed_over_the_entry_alone():
    assert read_hlo(TPU).cycles == 2000
    assert read_hlo(CUDA).cycles == 0


def test_products_of_cuda_are_custom_calls_and_fused_dots():
    found = {
        (product.slot, product.kind, product.direction): product.precision
        for product in read_hlo(CUDA).products
    }
    assert found == {
        ("head", "product", "backward"): ("default", "default"),
        ("stem.conv", "convolution", "forward"): ("high", "high"),
        ("stem.conv", "convolution", "backward"): (
            "highest",
            "highest",
        ),  # fused with the update of the momentum
        ("head", "product", "forward"): ("highest", "highest"),
    }


def test_what_a_precision_computes_in_depends_on_platform_and_kind():
    high = Product("x", "forward", "convolution", ("high", "high"), ("f32", "f32"))
    assert computed_in("cuda", high) == "TF32"
    assert computed_in("tpu", high) == "three bfloat16 passes"
    dot = Product("x", "forward", "product", ("high", "high"), ("f32", "f32"))
    assert computed_in("cuda", dot) == "float32"
    assert (
        computed_in(
            "tpu", Product("x", "forward", "convolution", ("highest", "highest"), ("bf16", "f32"))
        )
        == "bfloat16"
    )


def test_an_algorithm_that_was_named_overrides_the_precision():
    text = TPU.replace(
        "operand_precision={highest,highest}",
        "operand_precision={highest,highest}, algorithm=dot_tf32_tf32_f32",
    )
    assert read_hlo(text).products[0].precision == ("dot_tf32_tf32_f32", "dot_tf32_tf32_f32")


def test_the_certificate_names_what_was_lowered_and_the_narrow_values():
    request = request_for(
        BlockConfig(in_channels=16, out_channels=32, stride=2), "tpu:v5e", what="train-step"
    )
    sentences = [finding.sentence for finding in findings(request, read_hlo(TPU))]
    assert sentences == [
        "stage1.0.conv1: the backward convolution has precision {default,default}, asked for "
        "was highest; it runs in bfloat16",
        "stage1.0.conv1: 1 values of type bf16",
    ]
    whole = TPU.replace(
        "labels=f01b_i01o->01bf,", "labels=f01b_i01o->01bf, operand_precision={highest,highest},"
    ).replace("bf16[", "f32[")
    assert findings(request, read_hlo(whole)) == []


def test_a_program_without_products_is_no_proof():
    text = "\n".join(
        line for line in TPU.splitlines() if " convolution(" not in line and "bf16[" not in line
    )
    request = request_for(BlockConfig(in_channels=16, out_channels=32, stride=2), "tpu:v5e")
    assert [finding.sentence for finding in findings(request, read_hlo(text))] == [
        "the program has no convolution and no product at all"
    ]


@pytest.mark.parametrize("text", ["", "no HLO\nat all (but) {braces}\n"])
def test_what_is_no_hlo_is_refused(text):
    with pytest.raises(ValueError, match="no HLO"):
        read_hlo(text)


def test_the_innermost_slot_counts():
    found = slot_of("jit(f)/slot=outer/jvp(slot=stage2.1.shortcut.conv)/add")
    assert found == "stage2.1.shortcut.conv"
    assert slot_of("jit(f)/jvp()/add") == ""


@pytest.mark.parametrize(
    ("refusal", "numbers"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (47.07G) "
            "exceeds available HBM (15.75G).",
            (47.07, 15.75),
        ),
        (
            "Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm "
            "capacity by 4.75G.",
            (20.5, 15.75),
        ),
    ],
)
def test_a_refusal_says_what_is_needed_and_what_there_is(refusal, numbers):
    assert bytes_needed(refusal) == tuple(int(number * 2**30) for number in numbers)
    assert bytes_needed("INVALID_ARGUMENT: something else") is None
