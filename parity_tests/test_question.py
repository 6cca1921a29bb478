"""The block of the question: the specification passes, and its three faults are told apart."""

import jax
import numpy as np
import pytest
import torch

import flax_resblock
from flax_resblock import InputError
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from parity_tests.support import output, with_trained_norms
from torch_ref import Block, as_asked

CASES = [(8, 8, 1), (8, 8, 2), (4, 8, 1), (4, 8, 2)]


def pair(block_class, in_channels, out_channels, stride):
    """A faulty block, and the specification's Flax block with the same weights where they fit."""
    torch.manual_seed(5)
    block = with_trained_norms(block_class(in_channels, out_channels, stride).double().eval())
    return block, flax_resblock.from_torch(block.state_dict(), naming="sequential", stride=stride)


def difference(block, model, in_channels):
    images = np.random.default_rng(1).standard_normal((2, 9, 12, in_channels)) * 1.7 + 0.4
    with torch.no_grad():
        truth = np.moveaxis(
            block(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy(), 1, -1
        )
    with jax.enable_x64(True):
        return relative_l2(output(model, images), truth)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_specification_keeps_the_questions_names_and_equals_its_flax_counterpart(case):
    keys = set(Block(*case).state_dict())
    assert {"block.0.weight", "block.1.running_var", "block.3.weight", "block.4.bias"} <= keys
    assert ("skip.0.weight" in keys) == (case != (8, 8, 1))
    block, model = pair(Block, *case)
    assert difference(block, model, case[0]) <= FLOAT64_LIMIT


def test_first_fault_the_overwritten_branch_gives_another_result():
    block, model = pair(as_asked.BranchOverwritten, 8, 8, 1)
    assert difference(block, model, 8) >= 100 * FLOAT64_LIMIT
    assert difference(block, model, 8) > 0.1


def test_second_fault_the_ignored_stride_breaks_the_addition():
    block, _ = pair(as_asked.StrideIgnored, 8, 8, 2)
    with pytest.raises(RuntimeError, match="must match the size"):
        block(torch.randn(1, 8, 9, 12, dtype=torch.float64))
    with pytest.raises(InputError, match=r"conv1 has .*\(1, 1, 1, 1\), expected \(2, 1, 1, 1\)"):
        flax_resblock.from_torch(block, stride=2)


def test_third_fault_the_second_convolution_cannot_take_its_input():
    block = as_asked.WrongChannels(4, 8)
    with pytest.raises(RuntimeError, match="expected input"):
        block(torch.randn(1, 4, 9, 12))
    with pytest.raises(
        InputError, match=r"wrong shape\s+block\.3\.weight \[8, 4, 3, 3\], expected \[8, 8, 3, 3\]"
    ):
        flax_resblock.from_torch(block)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_the_specification_passes_everywhere(case):
    assert not _fails(Block, case)
    assert _fails(as_asked.Block, case)
    assert _fails(as_asked.AcceptedAnswer, case) == (case != (8, 8, 1))  # two faults are left


def _fails(block_class, case) -> bool:
    """Whether the block raises, is refused, or computes something else than the specification."""
    try:
        block, model = pair(block_class, *case)
        return difference(block, model, case[0]) >= 100 * FLOAT64_LIMIT
    except (RuntimeError, InputError):
        return True
