"""`flax-resblock port`: what it writes is right, complete, and says what it was compared with."""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import io
import json
import re
import shutil
import sys
import tokenize
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from safetensors.torch import load_file
from torch import nn

import flax_resblock
import torch_ref
from flax_resblock import InputError
from flax_resblock.cli import run
from flax_resblock.parity.certificate import recheck
from flax_resblock.port import porting, proof
from flax_resblock.port.network import executed, filled
from flax_resblock.port.random_layers import stochastic_depth
from parity_tests.support import REPOSITORY, import_torchvision, python, spoil
from parity_tests.wide_resnet import WideResNet

CODE = '''
import torch
import torch.nn.functional as F
from torch import nn


class Gate(nn.Module):
    """Squeezes an image to a number for each channel."""

    def __init__(self, planes):
        super().__init__()
        self.fc1 = nn.Linear(planes, 4)
        self.fc2 = nn.Linear(4, planes)

    def forward(self, x):
        n, c = x.shape[:2]
        y = torch.sigmoid(self.fc2(F.leaky_relu(self.fc1(x.mean((2, 3))), 0.2)))
        return x * y.view(n, c, 1, 1).expand_as(x)


class Net(nn.Module):
    def __init__(self, classes=5, kernel=3):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, kernel, padding=kernel // 2)
        self.norm = nn.BatchNorm2d(6, eps=1e-3)
        self.gates = nn.ModuleList([Gate(6), Gate(6)])
        self.never_used = Gate(3)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = F.gelu(self.norm(self.stem(x)))
        for gate in self.gates:
            x = F.dropout(gate(x) + x, 0.5, self.training)
        return self.head(F.max_pool2d(x, 2).amax((2, 3)))
'''


@pytest.fixture(scope="module")
def origin(tmp_path_factory):
    """A folder with the file of a network, its weights, and what the command makes of them; the
    module, and what the command said."""
    folder = tmp_path_factory.mktemp("origin")
    (folder / "gated.py").write_text(CODE)
    module = imported(folder / "gated.py").Net()
    module.norm.running_mean.copy_(torch.randn(6))
    torch.save({"epoch": 3, "model": module.state_dict()}, folder / "gated.pth")
    with pytest.MonkeyPatch.context() as here, redirect_stdout(io.StringIO()) as said:
        here.chdir(folder)
        assert run(["port", "gated.py:Net", "gated.pth", "out"]) == 0
    return folder, module, said.getvalue()


@pytest.fixture
def network(origin, tmp_path, monkeypatch):
    """The module; the current folder is a copy of its own."""
    shutil.copytree(origin[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return copy.deepcopy(origin[1])


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(f"at_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_command_writes_code_weights_and_certificate(network, origin, tmp_path):
    said = origin[2]
    assert "out/gated.py" in said
    assert "training gradients" in said
    assert "never_used.fc1.weight" in said

    model = flax_resblock.load_ported("out", imported(tmp_path / "out" / "gated.py").Net)
    images = torch.randn(3, 3, 19, 26) + 1
    with torch.no_grad():
        theirs = network.eval()(images).numpy()
    ours = np.asarray(model(jnp.asarray(images.permute(0, 2, 3, 1).numpy())))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    certificate = json.loads((tmp_path / "out" / "parity.json").read_text())
    entry = certificate["outputs"]["weights.safetensors"]
    assert entry["verification"]["compared_with"] == "gated.py:Net, your own module"
    assert re.fullmatch("[0-9a-f]{64}", entry["source"]["module"]["sha256"])
    assert re.fullmatch("[0-9a-f]{64}", entry["source"]["sha256"])
    assert [one.status for one in recheck(tmp_path / "out" / "parity.json")] == ["unchanged"] * 2

    code = tmp_path / "out" / "gated.py"
    code.write_text(code.read_text().replace("slope=0.2", "slope=0.1"))
    found = {one.output: one.status for one in recheck(tmp_path / "out" / "parity.json")}
    assert found == {"weights.safetensors": "unchanged", "gated.py": "changed"}


def test_names_that_look_like_a_wrappers_are_the_networks_own(network, tmp_path):
    """As Ultralytics' networks have them: every tensor is one of the attribute ``model``."""
    more = """
class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Net()

    def forward(self, x):
        return self.model(x)
"""
    (tmp_path / "whole.py").write_text(CODE + more)
    state = {f"model.{key}": value for key, value in network.state_dict().items()}
    torch.save(state, tmp_path / "whole.pth")
    assert run(["port", "whole.py:Whole", "whole.pth", "whole"]) == 0
    model = flax_resblock.load_ported("whole", imported(tmp_path / "whole" / "whole.py").Whole)
    for name in ("back.pth", "back.safetensors"):
        flax_resblock.save(model, name)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    for found in (back, load_file(tmp_path / "back.safetensors")):
        assert all(torch.equal(found[key], value) for key, value in state.items())


def test_the_state_dict_returns_bit_for_bit(network, tmp_path):
    assert run(["convert", "out", "back.pth"]) == 0
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(network.state_dict())
    for key, value in network.state_dict().items():
        assert torch.equal(back[key], value), key
    fresh = imported(tmp_path / "gated.py").Net()
    fresh.load_state_dict(back, strict=True)

    model = flax_resblock.load_ported("out", imported(tmp_path / "out" / "gated.py").Net)
    model.head.bias.set_value(model.head.bias[...] + 1)
    trained = flax_resblock.ported_state_dict(model, "out")
    np.testing.assert_array_equal(trained["head.bias"], network.head.bias.detach().numpy() + 1)
    np.testing.assert_array_equal(
        trained["never_used.fc1.bias"], network.never_used.fc1.bias.detach()
    )


@pytest.mark.slow
def test_what_was_written_needs_no_torch(network, tmp_path):
    code = """
import sys
sys.modules["torch"] = None
import jax.numpy as jnp, flax_resblock
from out.gated import Net
model = flax_resblock.load_ported("out", Net)
print(model(jnp.ones((2, 20, 20, 3))).shape)
"""
    done = python("-c", code, cwd=tmp_path, env=None)
    assert done.stdout.strip() == "(2, 5)", done.stderr


def test_an_edited_network_does_not_get_the_weights(network, tmp_path):
    code = tmp_path / "out" / "gated.py"
    code.write_text(code.read_text().replace("nn.Linear(6, 5", "nn.Linear(6, 4"))
    with pytest.raises(InputError, match=r"not those of Net: head.bias, head.kernel differ"):
        flax_resblock.load_ported("out", imported(code).Net)


@pytest.mark.parametrize(
    ("written", "instead", "quantity"),
    [
        ("eps=0.001", "eps=0.001002", "evaluation mode the output"),
        ("eps=0.001", "eps=0.001, momentum=0.2", "training mode running statistics of norm"),
        (") + x)", ") + jax.lax.stop_gradient(x))", "training mode gradients"),
    ],
)
def test_a_wrong_translation_is_never_handed_out(network, monkeypatch, written, instead, quantity):
    genuine = porting.source_of

    def spoilt(*arguments, **options):
        source = genuine(*arguments, **options)
        changed = source.replace(written, instead)
        assert changed != source
        return changed

    monkeypatch.setattr(porting, "source_of", spoilt)
    with pytest.raises(InputError, match=f"cannot be ported: in {quantity}"):
        flax_resblock.port(network)


class LogarithmicGain(nn.Module):
    """NaN with random weights, half of which are negative."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.gain = nn.Parameter(torch.full((4, 1, 1), 2.0))

    def forward(self, x):
        return (self.conv(x) * torch.log(self.gain)).mean((2, 3))


def test_weights_that_hide_everything_are_not_compared_with(monkeypatch):
    assert flax_resblock.port(LogarithmicGain()).figures["float64 training gradients"]
    spoil(monkeypatch, "jnp.log(", "jnp.log1p(")
    with pytest.raises(InputError, match="in evaluation mode the output differs"):
        flax_resblock.port(LogarithmicGain())


class OtherwiseInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        x = self.conv(x)
        return (x * 2 if self.training else x).mean((2, 3))


class ModeUnderAnotherName(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.factor = 2

    def train(self, mode=True):
        self.factor = 2 if mode else 1
        return super().train(mode)

    def forward(self, x):
        return (self.conv(x) * self.factor).mean((2, 3))


class DropPath(nn.Module):
    """Drops a branch at random, as people write it themselves."""

    def forward(self, x):
        if not self.training:
            return x
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.8) / 0.8


class RandomBranch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.drop_path = DropPath()

    def forward(self, x):
        return (x + self.drop_path(self.conv(x))).mean((2, 3))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.lstm = nn.LSTM(4, 5)

    def forward(self, x):
        return self.lstm(self.conv(x).mean((2, 3))[None])[0][0]


class Volume(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.volume = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.volume(self.conv(x)[:, None])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (RandomBranch, r"draws random numbers of its own at .*test_port.py:\d+ \(.*\(aten\."),
        (Recurrent, "LSTM.*recurrent layers are not supported"),
        (Volume, "Conv3d.*three spatial axes are not supported"),
    ],
)
def test_what_cannot_be_ported_is_refused_by_name(kind, text):
    with pytest.raises(InputError, match=text):
        flax_resblock.port(nn.Sequential(kind()))


def test_a_refusal_writes_nothing_and_ends_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(["port", f"{__file__}:Recurrent", "out"]) == 2
    assert "recurrent layers are not supported" in capsys.readouterr().err
    assert run(["port", f"{__file__}:RandomBranch", "out"]) == 2
    assert list(tmp_path.iterdir()) == []


class InAnyMode(nn.Module):
    """Its code does not ask for the mode; its layers do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.layers = nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(self.conv(x)).mean((2, 3))


def test_a_module_is_traced_in_training_mode_only_if_its_code_asks_for_the_mode(monkeypatch):
    traced = []

    def trace_training(one, _):
        traced.append(type(one.live))
        return one, None

    monkeypatch.setattr(porting, "trace_training", trace_training)
    monkeypatch.setattr(porting, "prove", lambda *_, **__: proof.Proof())
    for module in (InAnyMode(), OtherwiseInTraining(), ModeUnderAnotherName()):
        flax_resblock.port(module)
    assert traced == [OtherwiseInTraining, ModeUnderAnotherName]
    assert "training" not in vars(nn.Module)


class KeepsItsStreams(nnx.Module):
    """Draws from the streams that it was created with, which an edited port may do."""

    def __init__(self, *, rngs):
        self.rngs = rngs
        self.weight = nnx.Param(rngs.params.normal((2,)))


def test_streams_of_a_model_that_is_filled_never_repeat_a_number():
    model = filled(KeepsItsStreams, {("weight",): np.ones(2, np.float32)})
    assert type(model.rngs.default) is nnx.RngStream
    draws = [float(model.rngs.noise.normal()) for _ in range(3)]
    assert len(set(draws)) == 3
    np.testing.assert_array_equal(model.weight[...], 1)


class Head(nn.Module):
    """An auxiliary head."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(F.dropout(self.norm(x).mean((2, 3)), 0.5, self.training))


class Supervised(nn.Module):
    """Has an auxiliary head, which runs in training mode alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.conv = nn.Conv2d(5, 4, 3)
        self.fc = nn.Linear(4, 3)
        self.aux = Head()

    def forward(self, x):
        x = self.stem(x)
        y = self.fc(F.relu(self.conv(x)).mean((2, 3)))
        return (y, self.aux(x)) if self.training else y


def test_an_auxiliary_head_is_compared_in_training_mode_and_its_module_stays_as_it_was(monkeypatch):
    module = Supervised().train()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    state = torch.get_rng_state()
    ported = flax_resblock.port(module)
    assert module.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert ported.unused == {}
    assert ported.figures["float64 training gradients"]["tensors"] == 10
    assert ported.figures["float64 training running statistics"]["tensors"] == 2
    model = ported.create()
    images = jnp.ones((2, 9, 9, 3))
    assert model(images).shape == (2, 3)
    model.train()
    assert [one.shape for one in model(images)] == [(2, 3), (2, 3)]

    spoil(monkeypatch, "self.aux(x)", "self.aux(-x)")
    with pytest.raises(InputError, match="in training mode the output differs"):
        flax_resblock.port(Supervised())


class SamePadding(nn.Module):
    """Pads as TensorFlow does, by numbers that follow from the size of the image."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x):
        pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[-2:]]
        x = F.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return self.conv(x).mean((2, 3))


def test_numbers_that_follow_from_the_size_bind_the_network_to_it():
    ported = flax_resblock.port(SamePadding())
    assert "images of 64x64 only: its code has numbers that follow from" in ported.notes[0]
    model = ported.create()
    assert model(jnp.ones((1, 64, 64, 3))).shape == (1, 4)
    with pytest.raises(ValueError, match=r"ported for images of 64x64, not \(65, 65\)"):
        model(jnp.ones((1, 65, 65, 3)))


class Sizes(nn.Module):
    """Asks for the size of its maps in every way."""

    def __init__(self, window=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2)
        self.side = nn.Conv2d(6, 4, 1)
        self.window = window
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        n, _, height, width = x.shape
        y = torch.relu(self.conv(x))
        shares = torch.softmax(self.side(y).view(n, 4, -1), dim=-1)
        back = shares.view(n, 4, *y.shape[2:])
        large = F.interpolate(back, size=(height, width))
        pooled = F.max_pool2d(y, self.window or y.shape[2:]).amax((2, 3))
        means = y.flatten(2).mean(-1)
        return self.fc(torch.cat([pooled, means, large.amax((2, 3))], dim=1))


@pytest.mark.slow
def test_sizes_that_follow_from_the_images_do_not_bind_the_network(monkeypatch):
    torch.manual_seed(0)
    module = Sizes().eval()
    images = torch.randn(2, 3, 41, 30)
    found = flax_resblock.port(module)
    assert found.notes == ()
    with torch.no_grad():
        np.testing.assert_allclose(
            found.create()(jnp.asarray(images.permute(0, 2, 3, 1).numpy())),
            module(images).numpy(),
            rtol=1e-4,
            atol=1e-5,
        )

    # a window that only happens to be as large as the map stays what it is
    fixed = flax_resblock.port(Sizes(15), image_size=(32, 32))
    assert fixed.notes == ()
    assert "nn.max_pool(relu, 15)" in fixed.source
    monkeypatch.setattr(porting.Conditions, "following", lambda *_: ((), set(), set()))
    assert "images of 64x64 only" in str(flax_resblock.port(Sizes()).notes)


class Survival(nn.Module):
    """Drops whole branches, as many people write it."""

    def __init__(self, survival=0.8, scaled=True, whole=True):
        super().__init__()
        self.survival, self.scaled, self.whole = survival, scaled, whole

    def forward(self, x):
        if not self.training:
            return x
        shape = (x.shape[0], *((1,) * (x.ndim - 1) if self.whole else x.shape[1:]))
        keep = (torch.rand(shape) < self.survival).to(x.dtype)
        return x * keep / (self.survival if self.scaled else 1)


class Branch(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.drop = Survival(**options)

    def forward(self, x):
        x = self.first(x)
        return x + self.drop(self.second(x))


def test_a_module_that_drops_whole_images_is_known_by_what_it_does():
    found = flax_resblock.port(Branch())
    assert "nn.StochasticDepth(0.2" in found.source.replace("0.19999999999999996", "0.2")
    assert "training gradients" in str(found.figures)
    model: Any = found.create()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((500, 6, 6, 3)), jnp.float32)
    branch = np.abs(np.asarray(model(x) - model.first(x))).max((1, 2, 3))
    model.train()
    dropped = np.abs(np.asarray(model(x) - model.first(x))).max((1, 2, 3))
    gone = dropped < 1e-5
    assert 0.1 < gone.mean() < 0.3
    np.testing.assert_allclose(dropped[~gone], branch[~gone] / 0.8, rtol=1e-4)
    unscaled = flax_resblock.port(Branch(survival=0.7, scaled=False))
    assert "scale_by_keep=False" in unscaled.source
    with pytest.raises(InputError, match=r"draws random numbers of its own at .*aten\.rand"):
        flax_resblock.port(Branch(whole=False))


class Leaky(nn.Module):
    """Has a small number as an attribute, and leaves positive numbers alone."""

    def __init__(self):
        super().__init__()
        self.slope = 0.001

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


def test_a_module_that_drops_nothing_is_no_stochastic_depth():
    assert stochastic_depth(Leaky()) is None
    assert stochastic_depth(nn.LeakyReLU(0.001)) is None
    assert stochastic_depth(Survival(0.999, scaled=False)) is not None  # the control


class Doubled(torch.autograd.Function):
    factor = 2.0

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @classmethod
    def backward(cls, ctx, gradient):
        return gradient * Doubled.factor


class OwnGradient(nn.Module):
    def __init__(self, trains=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.trains = trains

    def forward(self, x):
        if self.training and not self.trains:
            raise RuntimeError("this network is not trained any more")
        return Doubled.apply(self.conv(x))


def test_a_gradient_written_by_hand_has_to_be_that_of_the_forward_pass(monkeypatch):
    found = flax_resblock.port(OwnGradient())
    assert "Doubled at" in str(found.notes)
    assert "training gradients" in str(found.figures)
    with pytest.raises(InputError, match=r"Doubled at .*does not run in training mode"):
        flax_resblock.port(OwnGradient(trains=False))
    monkeypatch.setattr(Doubled, "factor", 2.0 + 1e-9)
    with pytest.raises(InputError, match=r"gradients of .* Doubled at .*written by hand"):
        flax_resblock.port(OwnGradient())


def test_a_frozen_parameter_is_compared_and_named():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    module[1].bias.requires_grad_(False)
    found = flax_resblock.port(module)
    assert found.notes == (
        "1.bias: frozen in PyTorch (requires_grad=False); fit and `train` keep them, and keep them "
        "from an optimizer of your own in JAX too",
    )
    assert found.figures["float64 training gradients"]["tensors"] == 4
    assert not module[1].bias.requires_grad


class Amplifying(nn.Module):
    """Loses five digits."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return torch.sin(300000.0 * self.conv(x).mean((2, 3)))


def test_where_pytorch_itself_is_uncertain_its_uncertainty_is_the_limit(monkeypatch):
    found = flax_resblock.port(Amplifying())
    assert "differ by more than the usual limit" in str(found.notes)
    errors = [of["error"] for name, of in found.figures.items() if name.startswith("float64")]
    assert max(errors) > 1e-12
    spoil(monkeypatch, "300000.0", "300000.01")
    with pytest.raises(InputError, match=r"differs? by"):
        flax_resblock.port(Amplifying())


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.by_channel = nn.Dropout2d(0.25)

    def forward(self, x):
        return F.dropout(self.by_channel(self.conv(x)), 0.4, self.training)


def test_dropout_has_the_rate_and_the_scale_of_the_module():
    module = WithDropout()
    nn.init.zeros_(module.conv.weight)
    nn.init.ones_(module.conv.bias)
    model = flax_resblock.port(module).create()
    images = jnp.zeros((64, 16, 16, 3))
    assert np.all(model(images) == 1)
    model.train()
    once, again = np.asarray(model(images)), np.asarray(model(images))
    assert not np.array_equal(once, again)
    kept = once != 0
    np.testing.assert_allclose(once[kept], 1 / (0.75 * 0.6), rtol=1e-6)
    channels = kept.any((1, 2))
    assert abs(channels.mean() - 0.75) < 0.06
    assert abs(kept.mean((1, 2))[channels].mean() - 0.6) < 0.02


@pytest.mark.slow
def test_nothing_is_transposed_without_a_flattened_map():
    """A transpose of an image batch would be paid for at every step."""

    def transposes(module: nn.Module) -> int:
        model = flax_resblock.port(module).create()
        images = jnp.ones((2, 64, 64, 3))
        with flax_resblock.conv_lowering("xla"):
            text = jax.jit(lambda x: model(x)).lower(images).as_text()
        return len(re.findall(r"stablehlo.transpose", text))

    assert transposes(WideResNet(depth=10, width=1)) == 0
    flattening = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(31), nn.Flatten(), nn.Linear(16, 2))
    assert transposes(flattening) == 1


class Flattens(nn.Module):
    """Two heads of flattened maps; that of the second goes through a norm as well."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)
        self.pool = nn.MaxPool2d((9, 7))
        self.head = nn.Sequential(nn.Dropout(), nn.Linear(48, 7), nn.ReLU(), nn.Linear(7, 2))
        self.other = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 3))

    def forward(self, x):
        x = self.pool(torch.relu(self.conv(x)))
        return self.head(F.relu(torch.flatten(x, 1))), self.other(x)


def test_a_linear_layer_takes_a_flattened_map_as_it_is():
    """Its weight has the order; a norm in between keeps the transpose that it needs."""
    torch.manual_seed(4)
    module = Flattens()

    def transposes(ported) -> int:
        model = ported.create()
        with flax_resblock.conv_lowering("xla"):
            text = jax.jit(lambda x: model(x)).lower(jnp.ones((2, 64, 64, 3))).as_text()
        return len(re.findall(r"stablehlo.transpose", text))

    plain = flax_resblock.port(module)
    folded = flax_resblock.port(module, fold_layout=True)
    assert (transposes(plain), transposes(folded)) == (2, 1)
    assert folded.figures["float64 training gradients"]["tensors"] == len([*module.parameters()])
    kernel = folded.values["head", "layers", 1, "kernel"]
    weight = module.head[1].weight.detach().numpy()
    np.testing.assert_array_equal(
        kernel.reshape(3, 4, 4, 7).transpose(3, 2, 0, 1).reshape(7, 48), weight
    )
    assert not np.array_equal(kernel.T, weight)  # the control


@pytest.mark.slow
def test_the_command_folds_layouts_and_the_state_dict_returns_bit_for_bit(tmp_path, monkeypatch):
    module = Flattens()
    monkeypatch.chdir(tmp_path)
    torch.save(module.state_dict(), "net.pth")
    assert run(["port", f"{__file__}:Flattens", "net.pth", "out", "--fold-layout"]) == 0
    assert run(["convert", "out", "back.pth"]) == 0
    back = torch.load("back.pth", weights_only=True)
    assert all(torch.equal(back[key], value) for key, value in module.state_dict().items())


class Keywords(nn.Module):
    """Its modules are called like keywords of Python and methods of nnx; it looks at the names."""

    def __init__(self):
        super().__init__()
        self.add_module("lambda", nn.Conv2d(3, 4, 3))
        self.add_module("lambda_", nn.Conv2d(4, 4, 1))
        self.set_attributes = nn.Sequential(nn.Conv2d(4, 5, 1))
        self.heads = nn.ModuleDict({"class": nn.Linear(5, 3), "None": nn.Linear(5, 2)})

    def forward(self, x):
        x = self.set_attributes(self.lambda_(getattr(self, "lambda")(x))).mean((2, 3))
        return {name: self.heads[name](x) for name in ("class", "None") if name in self.heads}


def test_modules_may_be_called_like_keywords():
    torch.manual_seed(5)
    module = Keywords()
    ported = flax_resblock.port(module)
    assert set(ported.slots) == {
        *("lambda", "lambda_", "set_attributes.0", "heads.class", "heads.None")
    }
    assert "self.lambda__ = nn.Conv(3, 4, 3" in ported.source
    back = ported.to_torch(ported.create())
    assert list(back) == list(module.state_dict())
    assert all(np.array_equal(back[key], value) for key, value in module.state_dict().items())
    module.register_parameter("with", nn.Parameter(torch.ones(3)))
    with pytest.raises(InputError, match="cannot have a parameter called 'with'"):
        flax_resblock.port(module)


@pytest.mark.slow
def test_figures_name_the_precision_and_the_steps(network):
    figures = flax_resblock.port(network, exact=True).figures
    assert figures["float64 training gradients"]["error"] <= 1e-12
    assert figures["float64 weights after 5 steps of SGD"]["error"] <= 1e-10
    assert 1e-9 < figures["float32 evaluation output"]["error"] < 1e-5
    assert "float64 weights after 5 steps of SGD" not in flax_resblock.port(network).figures


class Casts(nn.Module):
    """Computes its head in float32, whatever comes in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x).float().mean((2, 3))


def test_a_module_that_is_bound_to_float32_is_compared_in_it():
    ported = flax_resblock.port(Casts())
    assert "does not compute in float64" in ported.notes[0]
    assert all(name.startswith("float32") for name in ported.figures)


def small_resnet():
    return torch_ref.ResNet(depths=(1, 1), widths=(6, 8), num_classes=3, stem="cifar")


@pytest.mark.slow
def test_a_network_that_the_library_has_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = f"{REPOSITORY}/parity_tests/test_port.py:small_resnet"
    assert run(["port", spec, "out"]) == 0
    written = imported(tmp_path / "out" / "test_port.py")
    model = flax_resblock.load_ported("out", written.ResNet)
    assert model.config.widths == (6, 8)
    back = flax_resblock.ported_state_dict(model, "out")
    assert back.keys() == small_resnet().state_dict().keys()
    assert "class BasicBlock" in flax_resblock.port(small_resnet(), expand=True).source


@pytest.mark.slow
def test_dropout_is_not_lost_in_a_network_that_the_library_has():
    """Its own networks have none."""
    module = small_resnet()
    module.fc = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 3))
    assert "nn.Dropout(0.3" in flax_resblock.port(module).source


TORCHVISION = {
    "squeezenet1_1": True,
    "shufflenet_v2_x0_5": True,
    "mobilenet_v3_small": False,
    "googlenet": False,
}
"""Whether both are trained as well, which takes as long again."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_classifiers_of_torchvision_are_ported(name):
    """Every named activation, running statistic and gradient, in float64; and the way back."""
    torchvision = import_torchvision()
    options = {"init_weights": False} if name == "googlenet" else {}
    module = getattr(torchvision.models, name)(weights=None, **options)
    ported = flax_resblock.port(module, exact=TORCHVISION[name])
    for quantity, figure in ported.figures.items():
        if quantity.startswith("float64"):
            assert figure["error"] <= (1e-10 if "steps" in quantity else 1e-12), quantity
    back = ported.to_torch(ported.create())
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in back.items()}
    module.load_state_dict(tensors, strict=True)
    assert all(torch.equal(tensors[key], value) for key, value in module.state_dict().items())


SHOWN = {
    "wide_resnet.py": (lambda: WideResNet(), "WRN-28-10"),
    "resnet18.py": (lambda: import_torchvision().models.resnet18(weights=None), "resnet18"),
    "mobilenet_v3_small.py": (
        lambda: import_torchvision().models.mobilenet_v3_small(weights=None), "mobilenet_v3_small",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.slow
def test_the_documentation_shows_what_is_written(name, monkeypatch):
    build, title = SHOWN[name]
    monkeypatch.setattr(porting, "prove", lambda *_, **__: proof.Proof())
    source = flax_resblock.port(build(), image_size=(64, 64), origin=title, expand=True).source
    shown = REPOSITORY / "docs" / "ported" / name
    assert source == shown.read_text(), f"write it anew with the code of this test: {shown}"


def code_lines(text):
    """Lines of Python that hold code: no comments, docstrings or blank lines."""
    tree = ast.parse(text)
    told = set()
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node):
            told |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    rows = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout and token.string:
            rows |= set(range(token.start[0], token.end[0] + 1))
    return len(rows - told)


def test_what_is_written_is_at_most_1_3_times_as_long_as_the_original():
    """Both counted in lines of code: of the original, the classes of the network and what builds
    it, with the imports of a file that is a network alone."""
    models = import_torchvision().models
    resnet, mobilenet = models.resnet, models.mobilenetv3
    misc = import_torchvision().ops.misc
    originals = {
        "wide_resnet": [inspect.getmodule(WideResNet)],
        "resnet18": [resnet.BasicBlock, resnet.ResNet, resnet.resnet18],
        "mobilenet_v3_small": [
            misc.ConvNormActivation, misc.Conv2dNormActivation, misc.SqueezeExcitation,
            mobilenet.InvertedResidual, mobilenet.MobileNetV3, mobilenet.mobilenet_v3_small,
        ],
    }  # fmt: skip
    for name, parts in originals.items():
        theirs = sum(code_lines(inspect.getsource(part)) for part in parts)
        ours = code_lines((REPOSITORY / "docs" / "ported" / f"{name}.py").read_text())
        assert ours <= 1.3 * theirs, f"{name}: {ours} lines for {theirs}"
    assert code_lines('"""Text."""\n\nx = [\n    1,  # one\n]\n# two\n') == 3


def test_a_ported_network_learns_with_optax():
    """Its loss falls as any nnx module's does."""
    import optax

    network = executed(
        (REPOSITORY / "docs" / "ported" / "wide_resnet.py").read_text(), "shown_wide_resnet"
    )
    assert issubclass(network.WideBlock, nnx.Module)
    model = network.WideBlock(4, rngs=nnx.Rngs(0, dropout=1))
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    images = jax.random.normal(jax.random.key(1), (8, 6, 6, 4))

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(images) - 3 * images) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(30)]
    assert losses[-1] < 0.9 * losses[0]
