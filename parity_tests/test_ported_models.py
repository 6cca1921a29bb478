"""A module that no configuration describes comes out of from_torch as a port of it, and a ported
model is saved, converted and verified like any other."""

import json
import shlex
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from torch import nn

import flax_resblock
from flax_resblock import InputError, PortedWarning, checkpoint, from_torch, to_torch
from flax_resblock.cli import run
from flax_resblock.nn.variables import set_values
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.port.network import ported_of
from parity_tests.support import assert_same_bits, fast_only, spoil
from parity_tests.test_forward_check import WRONG
from parity_tests.test_port import Recurrent


class Gated(nn.Module):
    """No residual network: a strided convolution, a gate of its own, and two kinds of pools."""

    def __init__(self, slope=0.3):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(6, momentum=0.2)
        self.gate = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(12, 4)
        self.slope = slope

    def forward(self, x):
        x = F.leaky_relu(self.norm(self.first(x)), self.slope)
        x = x * torch.sigmoid(self.gate(x))
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def trained(module):
    """With statistics as after training; one layer is frozen."""
    generator = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
            layer.num_batches_tracked.fill_(7)
    next(module.parameters()).requires_grad_(False)
    return module


def arrays(module):
    return {key: value.detach().numpy() for key, value in module.state_dict().items()}


def difference(module, model, size=(37, 30)):
    """Of the outputs in float64, relative."""
    images = np.random.default_rng(5).normal((0.5, 0.0, -1.0), 1, (3, *size, 3))
    with torch.no_grad():
        truth = module(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()
    with jax.enable_x64(True):
        return relative_l2(np.asarray(model(jnp.asarray(images))), truth)


@pytest.fixture(scope="module")
def gated():
    torch.manual_seed(0)
    module = trained(Gated()).double().eval()
    with pytest.warns(PortedWarning) as caught:
        model = from_torch(module)
    return module, model, [str(one.message) for one in caught]


def test_a_module_that_no_configuration_describes_is_ported(gated):
    module, model, (said,) = gated
    assert "Gated is no residual network in any known naming scheme" in said
    assert "flax_resblock.port(module).source" in said
    assert isinstance(model, nnx.Module)
    assert difference(module, model) <= FLOAT64_LIMIT
    other = Gated(slope=0.31).double().eval()
    other.load_state_dict(module.state_dict())
    assert difference(other, model) > 1e-6  # the control


def test_its_state_dict_returns_bit_for_bit_after_split_and_merge(gated):
    module, model, _ = gated
    assert_same_bits(to_torch(model), arrays(module))
    graphdef, state = nnx.split(model)
    copy = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf + 1, state))
    moved = to_torch(nnx.clone(copy))
    for key, value in arrays(module).items():
        np.testing.assert_array_equal(moved[key], value + 1, strict=True)
    with pytest.raises(InputError, match=r"names the tensors of a ResNet.*Leave out naming"):
        to_torch(model, "timm")
    with pytest.raises(InputError, match="Linear is no network of flax_resblock, and carries"):
        to_torch(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))


def test_it_is_saved_as_a_port_and_as_a_state_dict(gated, tmp_path, monkeypatch):
    module, model, _ = gated
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    flax_resblock.save(model, "saved_gated")
    flax_resblock.save(model, "state.pth")
    assert_same_bits(checkpoint.read("state.pth").tensors, arrays(module))
    from saved_gated.gated import Gated as Emitted  # pyright: ignore[reportMissingImports]

    again = flax_resblock.load_ported("saved_gated", Emitted)
    assert difference(module, again) <= FLOAT64_LIMIT
    assert_same_bits(flax_resblock.ported_state_dict(again, "saved_gated"), arrays(module))
    with pytest.raises(InputError, match=r"load_ported\('saved_gated', Net\)"):
        flax_resblock.load("saved_gated")
    with pytest.raises(InputError, match="exists"):
        flax_resblock.save(model, "saved_gated")


HIDDEN = "another activation hidden by branches of zero"
LOOKS = (HIDDEN, "reflecting padding")


@pytest.mark.parametrize("case", fast_only(LOOKS[1:2], LOOKS))
def test_what_only_looks_like_a_residual_network_is_ported_or_refused(case):
    """Never anything between: equal in float64, in spite of weights that hide what differs."""
    module = trained(WRONG[case]()).double().eval()
    if case == "reflecting padding":  # by a forward pass that changes the module
        with pytest.raises(InputError, match=r"Mirrored cannot be ported: .*\(relative\)"):
            from_torch(module)
        return
    with pytest.warns(
        PortedWarning, match="does not compute what the Flax network built from it computes"
    ):
        model = from_torch(module)
    assert_same_bits(to_torch(model), arrays(module))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)  # its own hide what differs
    ported = ported_of(model)
    assert ported is not None
    set_values(model, ported.table.to_flax(arrays(module)))
    assert difference(module, model, (64, 96)) <= FLOAT64_LIMIT


class TwoHeads(Gated):
    """Several outputs, random layers in modules and in functions, and a block of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.4), nn.ReLU())
        self.drop = nn.Dropout2d(0.3)

    def forward(self, x):
        x = self.drop(self.stem(x))
        return {"logits": super().forward(F.dropout(x, 0.2, self.training)), "map": x}


@pytest.mark.slow
def test_verify_ports_what_no_configuration_describes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = f"{__file__}:TwoHeads"
    torch.save(trained(TwoHeads()).state_dict(), "net.pth")
    assert run(["verify", "--torch", spec, "--gradients", "--json", "a.json"]) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["provenance"]["compared_with"] == f"{spec}, your own module"
    rows = {(row["quantity"], row["slot"]): row for row in report["measurements"]}
    places = {"first", "norm", "gate", "head", "stem.0", "output"}
    assert {slot for quantity, slot in rows if quantity == "train forward"} == places
    assert rows["parameter gradient", "stem.0/kernel"]["passed"]
    assert ("running statistics after 5 batches", "norm/var") in rows
    assert {row["precision"] for row in report["measurements"]} == {"float64", "float32"}
    assert run(["verify", "net.pth", "--torch", spec, "--eval-only", "--precision", "float64"]) == 0
    assert "equal: all" in capsys.readouterr().out


@pytest.mark.slow
def test_edited_code_is_verified_against_the_module(tmp_path, monkeypatch, capsys):
    """One operator or one number changed: the first slot that differs is a module of the user's."""
    monkeypatch.chdir(tmp_path)
    spec = f"{__file__}:TwoHeads"
    assert run(["port", spec, "out"]) == 0
    (file,) = (tmp_path / "out").glob("*.py")
    command = ["verify", "--torch", spec, "--flax", f"out/{file.name}:TwoHeads"]
    command += ["--eval-only", "--precision", "float64"]
    assert run(command) == 0
    code = file.read_text()
    for written, instead, first in (
        ("nn.sigmoid(", "jnp.tanh(", "head"),
        ("slope=0.3", "slope=0.31", "gate"),
        ("padding=1", "padding=1, padding_mode='reflect'", "first"),
    ):
        file.write_text(code.replace(written, instead, 1))
        assert file.read_text() != code
        capsys.readouterr()
        assert run(command) == 1
        said = " ".join(capsys.readouterr().out.split())
        assert f"differ, first at {first} (" in said
    file.write_text(code.replace("nn.Linear(12, 4", "nn.Linear(12, 5"))
    assert run(command) == 2
    assert run(["verify", "out", "--torch", spec]) == 2
    assert "--flax out/FILE.py:NAME" in capsys.readouterr().err


class WithFacts(nn.Module):
    """Takes an image and what is known about it; returns a mapping."""

    def __init__(self):
        super().__init__()
        self.image = nn.Conv2d(3, 6, 3, stride=2)
        self.facts = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, image, facts):
        x = torch.relu(self.image(image)).mean((2, 3)) * torch.sigmoid(self.facts(facts))
        return {"score": self.head(x), "sum": x.sum(-1)}


def test_several_inputs_are_traced_and_proved(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = f"{__file__}:WithFacts"
    assert run(["port", spec, "out", "--inputs", "2,3,32,24;2,4"]) == 0
    said = capsys.readouterr().out
    assert "float64 training gradient of the input" in said
    assert "inputs of 32x24" in said
    (file,) = (tmp_path / "out").glob("*.py")
    command = ["verify", "--torch", spec, "--flax", f"out/{file.name}:WithFacts"]
    command += ["--eval-only", "--precision", "float64"]
    assert run(command) == 0
    file.write_text(file.read_text().replace("nn.relu(", "nn.silu("))
    assert run(command) == 1  # the control

    module = WithFacts().double()
    inputs = {"image": torch.randn(2, 3, 20, 31).double(), "facts": torch.randn(2, 4).double()}
    ported = flax_resblock.port(module, example_inputs=inputs)
    truth = module(**inputs)
    with jax.enable_x64(True):
        found: Any = ported.create()
        image = jnp.asarray(inputs["image"].numpy().transpose(0, 2, 3, 1))
        found = found(image, jnp.asarray(inputs["facts"].numpy()))
    for name, value in truth.items():
        assert relative_l2(np.asarray(found[name]), value.detach().numpy()) <= FLOAT64_LIMIT

    for shapes, words in (("2,3,32", "raises on inputs"), ("2;3", "2,3,64,64;2,10")):
        assert run(["port", spec, "no", "--inputs", shapes]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    for wrong in ({"image": inputs["image"]}, [torch.zeros(3)], [[torch.zeros(2, 3)]]):
        with pytest.raises(InputError, match="example_inputs"):
            flax_resblock.port(module, example_inputs=wrong)
    with pytest.raises(InputError, match=r"example_inputs=.*no network of this"):
        from_torch(module)


def test_a_wrong_port_is_never_returned(monkeypatch):
    spoil(monkeypatch, "slope=0.3", "slope=0.2")
    with pytest.raises(InputError, match=r"(?s)^Gated cannot be ported: .*differs.*no network of"):
        from_torch(trained(Gated()))


REFUSED = {
    "recurrent": (
        Recurrent,
        r"^Recurrent cannot be ported: in module lstm, .*LSTM.*recurrent layers.* no network of "
        r"this library either: Recurrent is no residual network",
    ),
    "no image": (lambda: nn.LSTM(3, 4), r"^LSTM raises on images of .* no network of this"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_has_both_reasons_in_one_paragraph(case):
    make, words = REFUSED[case]
    with pytest.raises(InputError, match=words) as caught:
        from_torch(make())
    assert "\n" not in str(caught.value)


def test_wishes_that_a_port_cannot_fulfil_are_not_dropped():
    with pytest.raises(InputError, match=r"no residual network.*alone, without ignore= and eps="):
        from_torch(Gated(), ignore=["head.*"], eps=1e-3)


def test_convert_refuses_it_and_its_advice_ports_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = trained(Gated(slope=0.25))
    torch.save({"epoch": 3, "model": module.state_dict()}, "net.pth")
    spec = f"{__file__}:Gated"
    command = ["net.pth", "net.safetensors", "--torch", spec, "--kwargs", '{"slope": 0.25}']
    assert run(["convert", *command]) == 2
    said = capsys.readouterr().err
    assert "Gated is no residual network in any known naming scheme" in said
    advice = shlex.split(said.partition(" run: ")[2])
    assert advice[:2] == ["flax-resblock", "port"]
    assert run(advice[1:]) == 0
    assert run(["convert", "net", "back.pth"]) == 0
    assert_same_bits(checkpoint.read("back.pth").tensors, arrays(module))


class Versioned(torch.nn.Conv2d):
    """Refuses a state dict that does not say its version, as MNASNet of torchvision does."""

    _version = 3

    def _load_from_state_dict(self, state, prefix, local_metadata, *rest):
        if local_metadata.get("version") != self._version:
            raise ValueError("of another version")
        super()._load_from_state_dict(state, prefix, local_metadata, *rest)


def test_a_file_keeps_the_versions_of_modules(tmp_path):
    module = torch.nn.Sequential(torch.nn.Sequential(Versioned(3, 4, 3)))
    with pytest.warns(PortedWarning):
        model = from_torch(module)
    flax_resblock.save(model, tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    module.load_state_dict(back, strict=True)
    with pytest.raises(ValueError, match="of another version"):
        module.load_state_dict(dict(back), strict=True)
