"""The verifier's own promises: what it compares, by which criterion, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import BlockConfig, InputError, ResNetConfig, from_torch
from flax_resblock.cli import run
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity import compare
from flax_resblock.parity.certificate import REFERENCE
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import Tolerance, relative_l2, verdict_of
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.parts import reference_run
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.report import divergences, report_json
from parity_tests.faults import Faulty
from torch_ref import BasicBlock

BLOCK = BlockConfig(in_channels=4, out_channels=6, stride=2)
ACTIVATION = {"0.weight": "layers.0.kernel", "0.bias": "layers.0.bias"}


def linear_pair():
    return torch.nn.Sequential(torch.nn.Linear(5, 3)), nnx.Sequential(
        nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    )


X = np.random.default_rng(0).normal(0.4, 2, (4, 5))


@pytest.mark.slow
def test_every_precision_and_quantity_is_there():
    plan = Plan(
        gradients=True, isolated=True, steps=2, precisions=("float64", "float32", "bfloat16")
    )
    comparison = compare_pair(ReferencePair.random(BLOCK), adversarial_images(BLOCK, batch=3), plan)
    assert comparison.passed
    by_precision = {
        p: {m.quantity for m in comparison.measurements if m.precision == p}
        for p in plan.precisions
    }
    assert (
        by_precision["float64"]
        == by_precision["float32"] | {"tensors"}
        == by_precision["bfloat16"] | {"tensors"}
    )
    assert len(by_precision["float64"]) == 26
    rows = [m for m in comparison.measurements if m.quantity == "eval forward"]
    errors = {
        p: np.median([m.verdict.error for m in rows if m.precision == p]) for p in plan.precisions
    }
    assert errors["float64"] < 1e-14 < errors["float32"] < 1e-6 < errors["bfloat16"] < 0.05


def test_bfloat16_is_compared_and_can_fail():
    """A fault of ten percent is beyond what bfloat16 explains."""
    base = ReferencePair.random(BLOCK)
    pair = Faulty(
        BLOCK, base.state, {}, edit=lambda m: m.conv2.kernel.set_value(m.conv2.kernel[...] * 1.1)
    )
    images = adversarial_images(BLOCK, batch=3)
    assert compare_pair(base, images, Plan(train=False, precisions=("bfloat16",))).passed
    rows = compare_pair(pair, images, Plan(train=False, precisions=("bfloat16",))).measurements
    found = next(m.slot for m in rows if m.quantity == "eval forward" and not m.verdict.passed)
    assert found == "conv2"


def test_isolation_blames_one_layer_where_the_forward_pass_blames_all_that_follow():
    config = ResNetConfig(depths=(1, 1), widths=(4, 6), stem="cifar", stem_width=4, num_classes=3)
    base = ReferencePair.random(config)
    pair = Faulty(config, base.state, {}, edit=lambda m: setattr(m.stage1[0].norm1, "eps", 1e-2))
    images = adversarial_images(config, batch=2, height=9, width=8)
    rows = compare_pair(
        pair, images, Plan(train=False, isolated=True, precisions=("float64",))
    ).measurements
    wrong = {
        q: [m.slot for m in rows if m.quantity == q and not m.verdict.passed]
        for q in ("eval forward", "isolated forward")
    }
    assert wrong["eval forward"][0] == "stage1.0.norm1"
    assert len(wrong["eval forward"]) > 8
    assert wrong["isolated forward"] == ["stage1.0.norm1"]


def test_gradients_are_sought_from_the_output_backwards():
    config = ResNetConfig(depths=(1, 1), widths=(4, 6), stem="cifar", stem_width=4, num_classes=3)
    base = ReferencePair.random(config)

    def reverse(module):
        module.layer2[0].bn1.register_forward_hook(lambda _, __, y: 2 * y.detach() - y)

    pair = Faulty(config, base.state, {}, edit=reverse, side="torch")
    images = adversarial_images(config, batch=2, height=9, width=8)
    comparison = compare_pair(
        pair, images, Plan(train=False, gradients=True, precisions=("float64",))
    )
    (found,) = [d for d in divergences(comparison) if d.quantity == "activation gradient"]
    expected = ("backward", "stage2.0.conv1")
    assert (
        found.order,
        found.slot,
    ) == expected  # right down to norm1's output, wrong from its input on


def test_what_every_slot_was_fed_is_what_the_one_before_gave():
    trace = reference_run(
        ReferencePair.random(BLOCK), adversarial_images(BLOCK, batch=2), train=False
    )
    np.testing.assert_array_equal(trace.inputs["norm1"], trace.activations["conv1"])
    np.testing.assert_array_equal(trace.inputs["conv2"], np.maximum(trace.activations["norm1"], 0))


def test_a_tolerance_of_ones_own_replaces_the_criterion():
    plan = {"copy_weights": True, "train": False, "precisions": ("float32",)}
    exact, strict = (
        compare(*linear_pair(), X, state_map=ACTIVATION, rtol=rtol, **plan)
        for rtol in (1e-3, 1e-12)
    )
    assert exact.passed
    assert {m.verdict.limit for m in exact.comparison.measurements} == {1.0}
    assert not strict.passed
    assert "1e-12 x |PyTorch|" in report_json(strict.comparison, {})["criterion"]


def test_tolerances_mean_what_numpy_means():
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth, noise = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)) * 1e-3
        rtol, atol = rng.uniform(0, 2e-3, 2)
        assert (Tolerance(rtol, atol).excess(truth + noise, truth) <= 1) == np.allclose(
            truth + noise, truth, rtol=rtol, atol=atol
        )
    assert Tolerance(0, 0).excess(truth, truth) == 0
    assert Tolerance(0, 0).excess(truth, truth + 1e-300 + 1e-3) == np.inf
    assert Tolerance(1, 1).excess(np.array([np.nan]), np.array([1.0])) == np.inf
    assert Tolerance(1, 1).excess(truth, truth[:2]) == np.inf


def test_the_criterion():
    assert verdict_of(1e-12, 0.0, 2.0**-52).passed
    assert not verdict_of(
        1.01e-12, 1.0, 2.0**-52
    ).passed  # in float64 PyTorch's own error is no excuse
    assert verdict_of(3.9e-5, 1e-5, 2.0**-23).passed
    assert not verdict_of(4.1e-5, 1e-5, 2.0**-23).passed
    assert verdict_of(7.9 * 2.0**-23, 0.0, 2.0**-23).passed
    assert not verdict_of(8.1 * 2.0**-23, 0.0, 2.0**-23).passed
    assert not verdict_of(float("nan"), 1.0, 2.0**-23).passed
    assert relative_l2(np.array([1.0, np.inf]), np.array([1.0, np.inf])) == 0
    assert relative_l2(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == np.inf


def test_a_network_of_this_project_is_a_pair_like_any_other():
    module = BasicBlock(4, 6, 2)
    found = compare(
        module,
        from_torch(module),
        adversarial_images(BLOCK, batch=2),
        state_map=StateMap(BLOCK, NAMINGS["torchvision"]),
        gradients=False,
        precisions=("float64",),
    )
    assert found.passed, str(found)


def test_tensors_are_compared_as_they_are_unless_told_otherwise():
    torch_module, flax_module = linear_pair()
    found = compare(torch_module, flax_module, X, state_map=ACTIVATION)
    assert found.diagnosis[0].cause == "stale-tensor"
    assert "layers.0/kernel" in str(found)
    before = np.asarray(flax_module.layers[0].kernel[...])
    assert compare(torch_module, flax_module, X, state_map=ACTIVATION, copy_weights=True).passed
    # neither module is modified
    np.testing.assert_array_equal(flax_module.layers[0].kernel[...], before)


TABLES = {
    "a row missing": ({"0.weight": "layers.0.kernel"}, "no row names PyTorch's '0.bias'"),
    "an unknown key": (
        ACTIVATION | {"1.weight": "layers.0.scale"},
        "PyTorch has no tensor '1.weight'",
    ),
    "an unknown path": (ACTIVATION | {"0.bias": "layers.0.b"}, "Flax has no variable 'layers.0.b'"),
    "one path twice": (
        ACTIVATION | {"0.bias": "layers.0.kernel"},
        "two rows lead to 'layers.0.kernel'",
    ),
    "a wrong codec": (
        ACTIVATION | {"0.weight": ("layers.0.kernel", "as is")},
        r"PyTorch's \[3, 5\] is .* but Flax's layers.0.kernel is \[5, 3\]",
    ),
    "no codec": (
        ACTIVATION | {"0.weight": ("layers.0.kernel", "backwards")},
        "names the codec 'backwards'; known:",
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_that_does_not_fit_is_explained(case):
    table, message = TABLES[case]
    with pytest.raises(InputError, match=message):
        compare(*linear_pair(), X, state_map=table)


class _Returns(torch.nn.Sequential):
    def __init__(self, layer, change):
        super().__init__(layer)
        self.change = change

    def forward(self, x):
        return self.change(self[0](x), self)


def _raise(y, module):
    raise RuntimeError("not today")


MISBEHAVED = {
    "a tuple": (lambda y, m: (y, y), "returns a tuple, not a tensor"),
    "a dict": (lambda y, m: {"logits": y}, "returns a dict, not a tensor"),
    "raises": (_raise, r"refuses an input of shape \[4, 5\]: RuntimeError: not today"),
    "random": (lambda y, m: y + torch.rand(()), "in evaluation mode: it is not deterministic"),
    "dropout": (
        lambda y, m: torch.nn.functional.dropout(y, 0.5, m.training),
        "in training mode: it is not deterministic .*train=False",
    ),
}


@pytest.mark.parametrize("case", MISBEHAVED)
def test_a_module_that_cannot_be_compared_is_refused_in_one_paragraph(case):
    change, message = MISBEHAVED[case]
    torch.manual_seed(0)  # else two small masks are equal now and then
    torch_module, flax_module = linear_pair()
    with pytest.raises(InputError, match=message) as caught:
        compare(_Returns(torch_module[0], change), flax_module, X, state_map=ACTIVATION)
    assert "\n" not in str(caught.value)


def test_inputs_that_do_not_fit_are_refused():
    for bad, message in (
        (X[:, :4], r"refuses an input of shape \[4, 4\]"),
        (X[0, 0], "refuses an input"),
        (np.where(X > 0, X, np.nan), "not finite, first at index"),
    ):
        with pytest.raises(InputError, match=message):
            compare(*linear_pair(), bad, state_map=ACTIVATION)
    with pytest.raises(InputError, match="choose among float64, float32, tf32, bfloat16"):
        compare(*linear_pair(), X, state_map=ACTIVATION, precisions=("float16",))
    with pytest.raises(InputError, match="slot 'act' is said to be the PyTorch module 'nowhere'"):
        compare(*linear_pair(), X, state_map=ACTIVATION, slots={"act": ("nowhere", "layers.0")})


@pytest.fixture
def network(tmp_path, monkeypatch):
    config = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=3)
    torch.save(
        ReferencePair.random(config).torch(PRECISIONS["float32"]).state_dict(), tmp_path / "net.pth"
    )
    monkeypatch.chdir(tmp_path)
    return "net.pth"


INPUTS = {
    "rank": (np.zeros((8, 8, 3)) + 0.3, "has the shape [8, 8, 3]; the network takes (N, H, W, 3)"),
    "channels": (np.ones((2, 8, 8, 5)), "has the shape [2, 8, 8, 5]"),
    "NCHW": (np.ones((2, 3, 8, 8)), "They look like NCHW"),
    "not finite": (np.full((1, 8, 8, 3), np.inf), "not finite"),
    "words": (np.array(["a", "b"]), "an array of numbers is needed"),
    "objects": (np.array([{}, []], dtype=object), "cannot be read as a .npy array"),
}


def test_images_of_ones_own_that_do_not_fit_are_bad_input(network, capsys):
    for array, message in INPUTS.values():
        np.save("images.npy", array, allow_pickle=True)
        assert run(["verify", network, "--input", "images.npy"]) == 2
        assert message in capsys.readouterr().err


FLAGS = {
    "no such device": (["--device", "tpu"], "'tpu', which is not there"),
    "no such torch device": (["--torch-device", "cuda:3"], "'cuda:3', which is not there"),
    "negative steps": (["--steps", "-1"], "must not be negative"),
    "training in evaluation mode": (["--steps", "2", "--eval-only"], "leave one of them out"),
    "a negative tolerance": (["--rtol", "-1"], "not negative"),
    "three subjects": (
        ["--torch", "a.py:B", "--certificate", "nowhere.json"],
        "give one of CKPT and --torch and --certificate",
    ),
    "a port alone": (["--flax", "a.py:B"], "compared with your own PyTorch module"),
    "no images": (["--batch", "0"], "must be positive"),
    "no certificate": (["--certificate", "nowhere.json"], "give one of CKPT and --certificate"),
}


def test_flags_that_make_no_sense_are_bad_input(network, capsys):
    for flags, message in FLAGS.values():
        command = ["verify", network, *flags, "--json", "out.json", "--html", "out.html"]
        assert run(command) == 2, flags
        error = capsys.readouterr().err
        assert message in " ".join(error.split())
        assert len(error.strip().splitlines()) == 1


def test_the_command_writes_both_reports_and_replaces_none(network, tmp_path, capsys):
    np.save("images.npy", np.random.default_rng(0).normal(0.2, 1, (2, 9, 8, 3)))
    flags = "--input images.npy --eval-only --isolated --json out.json --html out.html"
    command = ["verify", network, *flags.split()]
    assert run(command) == 0
    facts = json.loads((tmp_path / "out.json").read_text())
    expected = {"batch": 2, "height": 9, "width": 8, "channels": 3, "seed": 0}
    assert facts["provenance"]["input"] == expected
    assert len(facts["provenance"]["checkpoint_sha256"]) == 64
    assert facts["provenance"]["compared_with"] == REFERENCE
    assert f"within the criterion, compared with {REFERENCE}" in capsys.readouterr().out
    assert facts["histogram"]["edges"] == sorted(facts["histogram"]["edges"])
    assert sum(facts["histogram"]["flax"]) > 0
    page = (tmp_path / "out.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    assert page.count(REFERENCE) == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    before = (tmp_path / "out.json").stat().st_mtime_ns
    assert run(command) == 2
    assert "exists" in capsys.readouterr().err
    assert (tmp_path / "out.json").stat().st_mtime_ns == before
    assert run([*command, "--precision", "float64", "--force"]) == 0


@pytest.mark.slow
def test_an_architecture_by_name_has_random_weights_and_norms(capsys):
    arguments = "verify resnet20 --height 8 --width 9 --eval-only --precision float64"
    assert run(arguments.split()) == 0
    output = capsys.readouterr().out
    assert "random weights, seed 0" in output
    assert run(["verify", "--architecture", "resnet7"]) == 2
    assert run(["verify"]) == 2


@pytest.mark.slow
def test_the_battery_verifies_every_kind_of_block(capsys, monkeypatch):
    from flax_resblock.parity import battery

    few = dict(list(battery.BATTERY.items())[:: len(battery.BATTERY) - 4])
    monkeypatch.setattr(battery, "BATTERY", few)
    arguments = "verify --all --precision float64 --steps 1 --optimizer sgd"
    assert run(arguments.split()) == 0
    assert capsys.readouterr().out.count("equal") == len(few)


@pytest.mark.accelerator
def test_blocks_on_the_accelerator(accelerator_device, monkeypatch):
    from flax_resblock.parity import battery

    few = {name: battery.BATTERY[name] for name in ("basic block", "basic block, stride 2")}
    monkeypatch.setattr(battery, "BATTERY", few)
    kind = (
        "gpu"
        if accelerator_device.platform in ("gpu", "cuda", "rocm")
        else accelerator_device.platform
    )
    assert run(["verify", "--all", "--steps", "1", "--device", kind]) == 0
