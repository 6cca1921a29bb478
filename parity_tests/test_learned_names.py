"""Names are labels: networks under names of their author's own are read right, announced or
refused, and a refusal names the cause."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

from flax_resblock import CheckpointError, checkpoint, from_torch, load, to_torch
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.cli import run
from flax_resblock.convert.naming_file import from_toml, to_toml
from flax_resblock.convert.opening import open_checkpoint
from flax_resblock.parity.oracle import relative_l2
from parity_tests.families import randomise
from parity_tests.people import Choices, Network, drawn, outcome_of
from parity_tests.support import fast_only, output, torch_output
from torch_ref import ResNet

PLAIN = Choices()
RESIDUAL = replace(
    PLAIN,
    spelling=("residual_function.{:3}", "residual_function.{:3n}", "shortcut.0", "shortcut.1"),
    stages="conv{stage}_x.{block}",
    bottleneck=True,
    widths=(4, 4),
)
INSIDE = replace(
    PLAIN,
    spelling=("conv{}", "conv{}.norm", "shortcut", "shortcut.norm"),
    stages="res{stage}.{block}",
    stem=("first", "first.norm"),
    kernel=7,
    stem_stride=2,
    stem_pool="3x3",
    reversed=True,
)
KERAS = replace(
    PLAIN,
    spelling=("_{}_conv", "_{}_bn", "_0_conv", "_0_bn"),
    stages="conv{stage}_block{block}",
    stem=("conv1_conv", "conv1_bn"),
    head="predictions",
    bottleneck=True,
    biased="all",
)
UNITS = replace(
    PLAIN,
    spelling=("body.conv{}.conv", "body.conv{}.bn", "identity_conv.conv", "identity_conv.bn"),
    stages="features.stage{stage}.unit{block}",
    stem=("features.init_block.conv", "features.init_block.bn"),
    head="output",
    wrapper="my_network.",
)


@pytest.mark.slow
def test_drawn_networks_are_right_announced_or_refused():
    """The first hundred of the thousands that ``python -m parity_tests.people`` reads."""
    outcomes = {number: outcome_of(Network(drawn(number), number)) for number in range(100)}
    counts = Counter(outcome for outcome, _ in outcomes.values())
    print(counts)
    assert counts["WRONG"] == 0, [n for n, (outcome, _) in outcomes.items() if outcome == "WRONG"]
    assert counts["right"] >= 40
    assert counts["announced"] >= 25
    assert "learned" in {why for outcome, why in outcomes.values() if outcome == "right"}


def test_a_wrong_network_would_be_noticed():
    """The control: one whose choice is in no list of assumptions is called wrong."""
    network = Network(replace(PLAIN, stem_pool="3x3"))
    assert network.choices.announced == ()
    assert outcome_of(network)[0] == "WRONG"


@pytest.mark.parametrize(
    "name", fast_only(["residual", "keras"], ["flat", "residual", "units", "inside", "keras"])
)
def test_a_module_and_its_weights_are_read_and_go_back(name, tmp_path):
    named = {"flat": PLAIN, "residual": RESIDUAL, "units": UNITS, "inside": INSIDE, "keras": KERAS}
    network = Network(named[name], seed=3)
    images = np.random.default_rng(0).normal(0.2, 1, (3, 18, 21, 3)).astype(np.float32)
    truth = torch_output(network, images)
    torch.save(network.saved(), tmp_path / "net.pth")
    opened = open_checkpoint(tmp_path / "net.pth")
    assert opened.state_map.naming.name == "learned"
    for model in (from_torch(network), load(tmp_path / "net.pth", assume="known")):
        assert relative_l2(output(model, images), truth) < 1e-5
        back = to_torch(model, opened.state_map.naming)
        own = state_to_numpy(network.saved())
        assert {key.removeprefix("my_network.") for key in back} == set(network.state_dict())
        for key, value in back.items():
            full = key if key in own else f"my_network.{key}"
            assert value.tobytes() == own[full].tobytes()
    assert from_toml(to_toml(opened.state_map.naming), "it") == opened.state_map.naming


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors", "out"])
def test_what_is_written_is_read_back_under_the_same_names(out, tmp_path, capsys):
    network = Network(PLAIN, seed=4)
    state = state_to_numpy(network.state_dict())
    torch.save(network.state_dict(), tmp_path / "net.pth")
    first, second = tmp_path / out, tmp_path / "again.pth"
    for source, target in ((tmp_path / "net.pth", first), (first, second)):
        assert run(["convert", str(source), str(target), "--no-certificate"]) == 0
    found = checkpoint.read(second).tensors
    assert found.keys() == state.keys()
    assert all(found[key].tobytes() == value.tobytes() for key, value in state.items())
    assert "damaged" not in capsys.readouterr().out


def test_a_sorted_file_whose_order_says_nothing_is_refused():
    """In a safetensors file "first" comes before "second" by chance alone."""
    words = replace(PLAIN, depths=(2,), widths=(4,), stages="blocks.{flat}")
    state = Network(words).state_dict()
    named = {
        key.replace("blocks.3", "blocks.zeta").replace("blocks.4", "blocks.alpha"): value
        for key, value in state.items()
    }
    assert from_torch(named, assume="known").config.depths == (2,)  # as it was defined
    with pytest.raises(CheckpointError):
        from_torch(dict(sorted(named.items())))
    assert from_torch(dict(sorted(state.items())), assume="known").config.depths == (2,)


def test_a_sorted_file_whose_norms_are_not_numbered_is_refused():
    """The norm of the projection would be taken for the first of the main path."""
    plain = replace(PLAIN, spelling=("conv{}", "bn{}", "skip", "skip_bn"), stages="blocks.{flat}")
    whole = Network(plain).state_dict()
    # every block that is left has a projection
    state = {key: whole[key] for key in whole if not key.startswith(("blocks.3", "blocks.5"))}
    odd = {key.replace("skip_bn", "a_bn"): value for key, value in state.items()}
    from_torch(odd, assume="known")  # as it was defined
    from_torch(dict(sorted(state.items())), assume="known")
    with pytest.raises(CheckpointError, match="sorted by name, and the names do not tell"):
        from_torch(dict(sorted(odd.items())))


@pytest.mark.parametrize("double", ["", "norm"], ids=["float32", "two dtypes"])
def test_the_order_of_a_safetensors_file_is_not_taken_for_that_of_the_layers(double, tmp_path):
    """safetensors sorts by dtype, then by name: the counters come first."""
    from safetensors.torch import save_file

    def read(names):
        state = {
            re.sub(r"blocks\.(\d+)", lambda found: names(int(found[1]) - 3), key): value
            for key, value in network.state_dict().items()
        }
        wide = {key: v.double() if double and v.ndim == 1 else v for key, v in state.items()}
        save_file(wide, tmp_path / "net.safetensors")
        return load(tmp_path / "net.safetensors", assume="known")

    network = Network(
        replace(PLAIN, depths=(11,), widths=(4,), stem=("a", "a_norm"), stages="blocks.{flat}")
    )
    images = np.random.default_rng(0).normal(0.2, 1, (2, 9, 9, 3)).astype(np.float32)
    truth = torch_output(network, images)
    assert relative_l2(output(read(lambda i: f"blocks.{i}"), images), truth) < 1e-5
    with pytest.raises(CheckpointError, match="sorted by name, and the names do not tell"):
        read(lambda i: f"blocks.{'kjihgfedcba'[i]}")


HOSTILE = ["a." * 3000 + "b", "²", "9" * 5000, "blocks.²", "", "."]


@pytest.mark.parametrize("name", fast_only(HOSTILE[2:5], HOSTILE))
def test_hostile_names_are_refused(name):
    state = {f"{name}.{key}": value for key, value in Network(PLAIN).state_dict().items()}
    for found in (state, {**Network(PLAIN).state_dict(), f"{name}.weight": torch.ones(3)}):
        for order in (list, sorted):
            try:
                from_torch({key: found[key] for key in order(found)}, assume="known")
            except CheckpointError:
                continue


def test_a_plain_network_of_two_convolutions_a_stage_is_announced():
    """Its tensors are those of residual blocks; that blocks add their input is an assumption."""
    outcome, words = outcome_of(
        Network(replace(PLAIN, no_skip=True, announced=("adds its input",)))
    )
    assert (outcome, words) == ("announced", "adds its input")


def test_numbers_are_sorted_as_numbers():
    """Block 10 comes after block 9, also in a file sorted by name."""
    many = Network(replace(PLAIN, depths=(9,), widths=(4,), stages="blocks.{flat}"))
    outcome = outcome_of(many, dict(sorted(many.saved().items())))
    assert outcome == ("right", "learned")


def _changed(choices=PLAIN, **changes):
    return Network(replace(choices, **changes)).state_dict()


def _group_norms(**changes):
    state = _changed(**changes)
    return {k: value for k, value in state.items() if "running" not in k and "num" not in k}


CAUSES = {
    "pre-activation": (lambda: _changed(preactivation=True), "pre-activation order, in which"),
    "biases": (lambda: _changed(biased="first"), "convolutions with a bias beside others"),
    "group norm": (
        lambda: _group_norms(biased="first"),
        "norms without running statistics, such as GroupNorm",
    ),
    "volumes": (
        lambda: {**_changed(), "stem.0.weight": torch.ones(4, 3, 3, 3, 3)},
        "kernels with five axes",
    ),
    "weight norm": (
        lambda: {**_changed(), "stem.0.weight_g": torch.ones(4, 1, 1, 1)},
        "weight norm, spectral norm or pruning masks",
    ),
}


@pytest.fixture(scope="module")
def refusal_of_another_cause():
    """The control: none of the causes is in it."""
    with pytest.raises(CheckpointError) as caught:
        from_torch({**_changed(), "extra.weight": torch.ones(3)})
    return str(caught.value)


@pytest.mark.parametrize("case", CAUSES)
def test_a_refusal_names_the_cause(case, refusal_of_another_cause):
    make, words = CAUSES[case]
    with pytest.raises(CheckpointError, match=words):
        from_torch(make())
    assert words not in refusal_of_another_cause


def own_names(state):
    """A state dict of torch_ref's under names of nobody else's."""
    outside = {"conv1": "entry", "bn1": "entry_norm", "bn": "exit_norm", "fc": "answer"}

    def renamed(name):
        module, _, kind = name.rpartition(".")
        inner = re.sub(r"^layer(\d)\.(\d)\.(conv|bn)(\d)", r"part\1.unit\2.step\4.\3", module)
        inner = re.sub(r"^layer(\d)\.(\d)\.downsample\.0", r"part\1.unit\2.jump", inner)
        return f"{outside.get(module, inner)}.{kind}"

    return {renamed(name): value for name, value in state.items()}


def test_a_norm_behind_a_stem_in_pre_activation_order_is_told_by_its_channels():
    sizes = {"depths": (1, 2), "stem": "cifar", "stem_width": 8, "num_classes": 3}
    images = np.random.default_rng(0).normal(0.2, 1, (2, 13, 12, 3))
    for stem_norm, final_norm, widths in ((True, False, (8, 16)), (True, True, (12, 8))):
        ends = {"stem_norm": stem_norm, "final_norm": final_norm, "widths": widths}
        module = randomise(ResNet(**sizes, **ends, order="pre_activation"))
        with jax.enable_x64(True):
            model = from_torch(own_names(module.state_dict()), assume="known")
            truth = module.eval()(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
            found = model.config.stem_norm, model.config.final_norm
            assert found == (stem_norm, final_norm)
            assert relative_l2(output(model, images), truth.detach().numpy()) <= 1e-12
    # alone before blocks of as many channels, it may be used in either place
    alone = {"widths": (12, 8), "stem_norm": True, "final_norm": False}
    unclear = ResNet(**sizes, **alone, order="pre_activation")
    with pytest.raises(CheckpointError, match=r"norm entry_norm of 8 channels beside .*entry of 8"):
        from_torch(own_names(unclear.state_dict()))
