"""The user's own module, --torch FILE.py:NAME: faults are named, misuse is explained."""

import sys

import numpy as np
import pytest
import torch

from flax_resblock import InputError
from flax_resblock.cli import run
from flax_resblock.parity.causes.blocks import BlockEnd, explain_ending, explain_gradient
from flax_resblock.parity.causes.connections import ACTIVATIONS, activation_slope
from flax_resblock.parity.comparison import Plan
from flax_resblock.parity.user_code import load_factory
from flax_resblock.parity.user_module import cases_of, examine
from parity_tests.support import REPOSITORY, fast_only
from torch_ref import BasicBlock, Block, Bottleneck, ResNet, as_asked

AS_ASKED = REPOSITORY / "torch_ref" / "as_asked.py"
OVERWRITTEN = "overwrites the main path"
STRIDE = "the first convolution ignores stride"
CHANNELS = "the second convolution takes in_channels"
FAULTS = {
    "Block": {OVERWRITTEN, STRIDE, CHANNELS},
    "AcceptedAnswer": {STRIDE, CHANNELS},
    "StrideIgnored": {STRIDE},
    "WrongChannels": {CHANNELS},
    "BranchOverwritten": {OVERWRITTEN},
}
QUICK = Plan(train=False, precisions=("float64",))
SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", list(FAULTS)[1:])
def test_exactly_the_faults_of_each_variant_are_named(name):
    factory = getattr(as_asked, name)
    text = " ".join(
        finding
        for case in cases_of(factory, None)
        for finding in examine(factory, case, QUICK).findings
    )
    assert {fault for fault in (OVERWRITTEN, STRIDE, CHANNELS) if fault in text} == FAULTS[name]


def test_the_command_says_what_is_wrong_with_the_block_as_asked(capsys):
    assert run(["verify", "--torch", f"{AS_ASKED}:Block", "--eval-only"]) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert all(fault in output for fault in FAULTS["Block"])


NETWORK = {"depths": [1, 1], "widths": [8, 12], "stem": "cifar", "stem_width": 8, "num_classes": 3}


@pytest.mark.parametrize(
    ("factory", "arguments"),
    [
        (Block, {"in_channels": 4, "out_channels": 8, "stride": 2}),
        pytest.param(Bottleneck, {"in_channels": 16, "planes": 4}, marks=SLOW),
        pytest.param(ResNet, NETWORK, marks=SLOW),
    ],
    ids=["question", "bottleneck", "network"],
)
def test_a_right_module_has_no_findings(factory, arguments):
    case = examine(factory, arguments, Plan(gradients=True, precisions=("float64",)))
    assert case.findings == []
    assert case.passed
    assert case.verification is not None
    expected = {"eval forward", "parameter gradient", "running statistics after 5 batches"}
    assert {m.quantity for m in case.verification.comparison.measurements} >= expected


def variant(forward):
    return type("Variant", (Block,), {"forward": forward})


ENDINGS = {
    "does not add the skip": lambda self, x: torch.relu(self.block(x)),
    "has no last ReLU": lambda self, x: self.block(x) + self.skip(x),
    "applies the ReLU before the addition": lambda self, x: (
        torch.relu(self.block(x)) + self.skip(x)
    ),
    "subtracts the skip": lambda self, x: torch.relu(self.block(x) - self.skip(x)),
    "multiplies the branches": lambda self, x: torch.relu(self.block(x) * self.skip(x)),
    "leaves the main path out": lambda self, x: torch.relu(self.skip(x)) + 0 * self.block(x),
}


@pytest.mark.parametrize("words", fast_only(["does not add the skip"], ENDINGS))
def test_a_wrong_ending_is_named(words):
    stride = 1 + list(ENDINGS).index(words) % 2
    case = examine(
        variant(ENDINGS[words]), {"in_channels": 6, "out_channels": 6, "stride": stride}, QUICK
    )
    assert len(case.findings) == 1
    assert words in case.findings[0]


@pytest.mark.parametrize("name", ["ReLU", "GELU", "SiLU", "LeakyReLU(0.01)"])
def test_the_end_of_a_block_is_explained_with_its_own_activation(name):
    rng, act = np.random.default_rng(0), ACTIVATIONS[name]
    main, skip, cotangent, rest = rng.normal(size=(4, 2, 5, 4, 3))
    end = BlockEnd(act(main + skip), main, skip, rest)
    assert end.activation == name
    for cause, value in (
        ("skip-not-added", act(main)),
        ("overwritten-branch", act(skip + rest)),
        ("relu-before-add", act(main) + skip),
        ("missing-relu", main + skip),
        ("other-activation", np.tanh(main + skip)),
    ):
        assert explain_ending(end, value).name == cause
    assert explain_ending(end, np.tanh(main + skip)).sentence == f"ends in tanh instead of {name}"
    assert explain_ending(end, cotangent) is None
    truth = rest + cotangent * activation_slope(name, main + skip)
    assert explain_gradient(rest, truth, None, cotangent, end).name == "cut-skip"
    assert explain_gradient(truth + 1, truth, None, cotangent, end) is None


class FixedPool(ResNet):
    """A CIFAR network as many write it: a pool of 16x16 pixels, for images of 32x32."""

    def __init__(self):
        super().__init__(**NETWORK)

    def forward(self, images):
        x = torch.relu(self.bn1(self.conv1(images)))
        for stage in self.stages:
            x = stage(x)
        return self.fc(torch.nn.functional.avg_pool2d(x, 16).mean((2, 3)))


class EvenOnly(Block):
    """A block that drops the last row of an odd number of them."""

    def forward(self, x):
        return super().forward(x)[:, :, : x.shape[2] // 2 * 2]


def test_a_block_that_is_right_at_even_sizes_alone_is_wrong():
    """It has no pool of fixed size that would explain it."""
    arguments = {"in_channels": 4, "out_channels": 4}
    found = examine(EvenOnly, arguments, QUICK, any_size=True)
    assert found.raised or not found.verification.passed
    right = examine(Block, arguments, QUICK, any_size=True)  # the control
    assert right.verification.passed


def test_a_network_with_a_pool_of_fixed_size_is_run_at_the_size_it_was_made_for():
    found = examine(FixedPool, {}, QUICK, any_size=True)
    assert found.passed
    assert found.verification is not None
    (note,) = found.verification.notes
    assert note.startswith("made for images of 32x32")
    assert not examine(FixedPool, {}, QUICK).passed  # the control: at 33x32 it is another network


def test_an_unknown_difference_is_not_given_a_wrong_name():
    case = examine(
        variant(lambda self, x: torch.relu(self.block(x) + self.skip(x)) + 0.01 * x.mean()),
        {"in_channels": 6, "out_channels": 6},
        QUICK,
    )
    assert [d.cause for d in case.diagnosis] == ["unknown"]
    assert case.findings[0].startswith(
        "block: PyTorch differs in forward, and no known mistake explains it"
    )


BAD = {
    "no colon": ("model.py", "must be FILE.py:NAME"),
    "no file": ("nowhere.py:Block", "does not exist"),
    "no module": ("nowhere.at.all:Block", "ModuleNotFoundError"),
    "no name": (f"{AS_ASKED}:Missing", "no class or function 'Missing'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_specification_is_explained(case):
    spec, message = BAD[case]
    with pytest.raises(InputError, match=message):
        load_factory(spec)


class Raising(Block):
    def forward(self, x):
        raise RuntimeError("not today")


@pytest.mark.parametrize("more", [[], ["--kwargs", '{"in_channels": 4, "out_channels": 4}']])
def test_a_module_that_raises_is_bad_input(more, capsys):
    assert run(["verify", "--torch", f"{__name__}:Raising", "--eval-only", *more]) == 2
    error = capsys.readouterr().err
    assert "forward raises RuntimeError: not today" in error
    assert len(error.strip().splitlines()) == 1


def test_a_file_is_imported_as_python_runs_it(tmp_path, monkeypatch):
    folder = tmp_path / "zoo" / "nets"
    folder.mkdir(parents=True)
    (tmp_path / "zoo" / "__init__.py").touch()
    (tmp_path / "zoo" / "shared.py").write_text("WIDTH = 3\n")
    (folder / "__init__.py").touch()
    (folder / "beside_it.py").write_text("DEPTH = 2\n")
    (folder / "relative.py").write_text("from ..shared import WIDTH\nnet = lambda: WIDTH\n")
    begins = "import argparse\nparser = argparse.ArgumentParser()\n"
    body = "from beside_it import DEPTH\nparser.parse_args()\nnet = lambda: DEPTH\n"
    (folder / "absolute.py").write_text(begins + body)
    more = "parser.add_argument('--data', required=True)\n"
    (folder / "demanding.py").write_text(begins + more + body)
    monkeypatch.setattr("sys.argv", ["flax-resblock", "port", "net.py:Net", "out"])
    before = list(sys.path)
    assert load_factory(f"{folder}/relative.py:net")() == 3
    assert load_factory(f"{folder}/absolute.py:net")() == 2
    with pytest.raises(InputError, match="importing it ended the program"):
        load_factory(f"{folder}/demanding.py:net")
    assert (sys.path, sys.argv[1]) == (before, "port")


def test_a_factory_that_needs_unknown_arguments_says_so():
    with pytest.raises(InputError, match="needs in_channels, planes; pass them with `kwargs="):
        cases_of(BasicBlock, None)
    with pytest.raises(InputError, match=r"raised TypeError.*`kwargs=...`"):
        examine(Block, {"width": 3}, QUICK)
    with pytest.raises(InputError, match="no residual network"):
        examine(lambda: torch.nn.Linear(3, 4), {}, QUICK)
