"""A network of one's own trains in JAX, goes on where PyTorch stopped, and returns."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import InputError
from flax_resblock.cli import run as run_command
from flax_resblock.nn.variables import fill, flat_arrays
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT
from flax_resblock.port.folder import read_ported
from flax_resblock.port.table import Table
from flax_resblock.runs.tensors import tensors_of
from flax_resblock.training import TrainConfig, fit
from flax_resblock.training.data import Splits, batches
from flax_resblock.training.pace import new_run
from flax_resblock.training.randomness import drawn, random_state, step_key
from flax_resblock.training.run_folder import RunFolder
from parity_tests import runs
from parity_tests.support import fast_only, python, worst
from parity_tests.test_without_torch import BLOCK_TORCH

CODE = """
import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 10)
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.PReLU())
        self.mix = nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight
        self.never_used = nn.Linear(3, 2)
        self.drop = nn.Dropout(0.0)
        self.gain = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.frozen = nn.Parameter(torch.rand(1, 8, 1, 1) + 0.5, requires_grad=False)

    def forward(self, x):
        x = torch.tanh(self.mix(self.body(x))) * self.gain + self.frozen
        x = self.right(F.silu(self.left(self.drop(x.mean((2, 3))))))
        return self.head(x)
"""


class Plain(nnx.Module):
    """A network that knows nothing of this library."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(1, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.place = nnx.Param(jax.numpy.ones((1, 8, 8, 6)))
        self.head = nnx.Linear(6, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(self.norm(self.conv(x))) * self.place
        return self.head(self.drop(x.mean((1, 2))))


def imported(path: Path):
    spec = importlib.util.spec_from_file_location(f"at_{abs(hash(path))}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ported(tmp_path_factory) -> Path:
    """The folder with ``own.py``, and ``out``, which it was ported to."""
    folder = tmp_path_factory.mktemp("ported")
    (folder / "own.py").write_text(CODE)
    torch.manual_seed(0)
    code = f"{folder / 'own.py'}:Net"
    assert run_command(["port", code, str(folder / "out"), "--image-size", "8", "8"]) == 0
    return folder


@pytest.fixture
def here(ported, tmp_path, monkeypatch):
    """An empty current folder, few images, and afterwards jax's mode as it was."""
    monkeypatch.chdir(tmp_path)
    data = runs.few_digits()
    monkeypatch.setattr("flax_resblock.training.data.opening.digits", lambda: Splits(data, data))
    wide = jax.config.read("jax_enable_x64")
    yield ported / "out"
    jax.config.update("jax_enable_x64", wide)


def in_torch(folder: Path, optimizer) -> runs.TorchRun:
    """A run of the module in PyTorch, float64, one epoch of five steps long."""
    torch.manual_seed(1)
    module = imported(folder.parent / "own.py").Net().double()
    made = optimizer(module)
    schedule = torch.optim.lr_scheduler.StepLR(made, 3, 0.5)
    return runs.TorchRun(module, made, schedule, per_epoch=False).epochs(1)


def saved(run: runs.TorchRun, path: str) -> None:
    content = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scheduler": run.scheduler.state_dict(),
        "epoch": run.epoch,
        "step": run.step,
    }
    torch.save(content, path)


def sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)


def adamw(module: torch.nn.Module) -> torch.optim.Optimizer:
    """Of what asks for a gradient, in two groups."""
    trained = [one for one in module.parameters() if one.requires_grad]
    kernels, rest = ([p for p in trained if (p.ndim > 1) is wide] for wide in (True, False))
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": kernels}], lr=1e-2)


def test_a_pytorch_run_goes_on_in_jax_as_it_would_have_and_returns(here, capsys):
    run = in_torch(here, sgd)
    saved(run, "run.pth")
    train = f"train --data digits --model {here}/own.py:Net --batch-size {runs.BATCH} --epochs 2"
    assert run_command([*train.split(), "--resume", "run.pth", "--out", "on"]) == 0
    said = capsys.readouterr().out
    assert "StepLR at step 5, one per batch" in said
    assert "all parameters in the model's order" in said

    before = run.state()
    truth = run.epochs(1).state()
    assert run_command(["convert", "on", "back.pth", "--with-optimizer"]) == 0
    back = torch.load("back.pth", weights_only=True)
    ours = {key: value.numpy() for key, value in back["model"].items()}
    assert list(ours) == list(truth)
    assert worst(ours, truth) <= TRAJECTORY_LIMIT
    assert worst(before, truth) > 1e6 * TRAJECTORY_LIMIT
    for key in ("frozen", "never_used.weight"):
        np.testing.assert_array_equal(ours[key], before[key])

    again = in_torch(here, sgd)
    again.model.load_state_dict(back["model"], strict=True)
    again.optimizer.load_state_dict(back["optimizer"])
    again.scheduler.load_state_dict(back["lr_scheduler"])
    again.epoch = 2
    assert worst(again.epochs(1).state(), run.epochs(1).state()) <= TRAJECTORY_LIMIT

    spoilt = torch.load("run.pth", weights_only=True)
    for kept in spoilt["optimizer"]["state"].values():  # the control
        kept["momentum_buffer"].zero_()
    torch.save(spoilt, "spoilt.pth")
    assert run_command([*train.split(), "--resume", "spoilt.pth", "--out", "off"]) == 0
    wrong = flax_resblock.ported_state_dict(
        flax_resblock.load_ported("off", imported(here / "own.py").Net), "off"
    )
    assert worst(wrong, truth) > 1000 * TRAJECTORY_LIMIT


def test_moments_of_some_parameters_in_two_groups_move_in_python(here):
    jax.config.update("jax_enable_x64", True)
    run = in_torch(here, adamw)
    saved(run, "run.pth")
    model = flax_resblock.load_ported(here, imported(here / "own.py").Net)
    with pytest.warns(UserWarning, match="the weights are those of entry 'model'"):
        begun = flax_resblock.load_run_into(model, "run.pth")
    config = TrainConfig(epochs=2, batch_size=runs.BATCH)
    history = fit(model, runs.few_digits(), config, run=begun, progress=False)
    truth = run.epochs(1).state()
    assert worst(flax_resblock.to_torch(model), truth) <= TRAJECTORY_LIMIT
    flax_resblock.save(model, "back.pth", run=history.run)
    back = torch.load("back.pth", weights_only=True)
    run.optimizer.load_state_dict(back["optimizer"])
    flax_resblock.save(model, "back.safetensors", run=history.run)
    again = flax_resblock.load_run_into(model, "back.safetensors")
    assert [group.paths for group in again.optimizer.groups] == [
        group.paths for group in begun.optimizer.groups
    ]


def _dropping(here: Path) -> nnx.Module:
    model = flax_resblock.load_ported(here, imported(here / "own.py").Net)
    model.drop.rate = 0.3
    return model


@pytest.mark.parametrize("kind", fast_only(["ported"], ["ported", "plain"]))
def test_a_run_with_dropout_resumes_bit_for_bit(kind, here):
    def fresh() -> nnx.Module:
        return _dropping(here) if kind == "ported" else Plain(rngs=nnx.Rngs(0))

    data = runs.few_digits()
    config = TrainConfig(model=None, epochs=2, batch_size=runs.BATCH, ema=0.9, weight_decay=0.01)
    with RunFolder(Path("on"), config, every=3, keep=9) as folder:
        model = fresh()
        fit(model, data, config, progress=False, saver=folder, on_step=folder.record)
        folder.wait()
    again = fresh()
    run = flax_resblock.load_run_into(again, "on/checkpoints/step-00000003")
    assert run.steps == 3
    after = fit(again, data, config, run=run, progress=False)
    assert len(after.steps) == 7
    for path, value in flat_arrays(model).items():
        assert flat_arrays(again)[path].tobytes() == value.tobytes(), path
    assert {str(path) for path in run.ema} == {str(path) for path in flat_arrays(model)}
    if kind == "plain":
        with pytest.raises(InputError, match=r"Plain .* has no state dict\. .* Orbax folder"):
            flax_resblock.save(model, "on.pth")


def test_what_dropout_draws_depends_on_seed_step_and_piece():
    rest = random_state(Plain(rngs=nnx.Rngs(0)))
    assert rest is not None
    keys = [step_key(seed, step, piece) for seed in (0, 1) for step in (0, 1) for piece in (0, 1)]
    seen = {
        jax.random.key_data(leaf).tobytes()
        for key in keys
        for leaf in jax.tree.leaves(drawn(rest, key))
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    }
    assert len(seen) == len(keys)


def test_the_table_has_the_parameters_in_pytorchs_order_and_what_training_changes(here):
    table = read_ported(here).table
    module = imported(here.parent / "own.py").Net()
    assert [one.torch_key for one in table.parameters] == [n for n, _ in module.named_parameters()]
    assert [one.torch_key for one in table.parameters if one.frozen] == ["frozen"]
    still = {one.torch_key for one in table.parameters if not one.trained}
    assert still == {"frozen", "never_used.weight", "never_used.bias"}
    content = json.loads((here / "port.json").read_text())
    assert Table.of_content(content).with_content(unused=table.unused) == table
    content["tensors"][0]["parameter"] = 1
    with pytest.raises(InputError, match="rows are damaged"):
        Table.of_content(content)


@pytest.mark.slow
def test_the_command_trains_and_evaluates_without_torch(here):
    code = f"""
import flax_resblock
from flax_resblock.cli import run
flags = ["--data", "digits", "--model", "{here}/own.py:Net"]
assert run(["train", *flags, "--init", "{here}", "--steps", "2", "--warmup-steps", "1"]) == 0
done = "runs/digits-resnet8"
assert run(["train", "--model", done + "/own.py:Net", "--eval-only", done + "/best"]) == 0
sys.path.insert(0, done)
from own import Net
model = flax_resblock.load_ported(done, Net)
print(len(flax_resblock.to_torch(model)), "torch" in sys.modules)
"""
    done = python("-c", BLOCK_TORCH + code)
    assert done.stdout.endswith("19 False\n"), done.stderr
    assert "accuracy" in done.stdout


@pytest.mark.slow
def test_bad_input_ends_with_one_true_paragraph(here, capsys):
    module = imported(here.parent / "own.py").Net()
    torch.save(module.state_dict(), "weights.pth")
    torch.save({"conv.weight": torch.randn(2, 1, 3, 3)}, "other.pth")
    run = in_torch(here, sgd)
    run.optimizer.state[run.model.never_used.bias] = {"momentum_buffer": torch.ones(2).double()}
    saved(run, "more.pth")
    edited = (here / "own.py").read_text().replace("nn.Linear(8, 10", "nn.Linear(8, 9")
    Path("edited.py").write_text(edited)
    Path("plain.py").write_text("from parity_tests.test_port_training import Plain\n")
    Path("taken").mkdir()
    (Path("taken") / "own.py").write_text("# other code\n")
    mine = f"--data digits --model {here}/own.py:Net"
    for line, message in {
        "--model gone.py:Net --init out": "--model gone.py:Net: the file gone.py does not exist",
        f"--model {here}/own.py:Gone": "no class or function 'Gone'",
        f"--model {here.parent}/own.py:Net": "a PyTorch module is ported first",
        mine: f"Begin with weights: --init {here}",
        f"{mine} --init other.pth": "The tensors of other.pth are not those of Net.",
        f"{mine} --resume other.pth": "unexpected  conv.weight",
        f"{mine} --resume weights.pth": "holds no optimizer that could go on",
        f"{mine} --resume {here}": "holds no optimizer that could go on",
        f"{mine} --resume more.pth": "has trained never_used.bias, which training the Flax network",
        f"{mine} --resume taken": "is not the code that taken was begun with",
        f"{mine} --init weights.pth --architecture resnet18": "--architecture has no place beside",
        f"{mine} --init weights.pth --dtype bfloat16": "--dtype bfloat16 is for the networks of",
        f"{mine} --init weights.pth --freeze stem": "--freeze stem must be some of",
        f"--data digits --model edited.py:Net --init {here}": "head.bias, head.kernel differ",
    }.items():
        assert run_command(["train", *line.split(), "--out", "never"]) == 2, line
        assert message in capsys.readouterr().err, line
        assert not Path("never").exists()

    class WithFeatures(Plain):
        def __call__(self, x: jax.Array) -> tuple[jax.Array, ...] | jax.Array:
            logits = super().__call__(x)
            return logits if self.drop.deterministic else (logits, logits[:, :3])

    with pytest.raises(InputError, match=r"WithFeatures returns .* in training mode"):
        fit(WithFeatures(rngs=nnx.Rngs(0)), runs.few_digits(), TrainConfig(), progress=False)

    done = "train --model plain.py:Plain --steps 1 --warmup-steps 0 --out plain"
    assert run_command(done.split()) == 0
    again = "train --model plain.py:Plain --resume auto --steps 2 --out plain"
    assert run_command(again.split()) == 0
    for line, message in {
        "inspect plain": "is a checkpoint of Plain, which is no network of this library",
        "train --resume plain --out never": "`flax-resblock train --model FILE.py:Plain`",
        "convert plain plain.pth": "is a checkpoint of Plain",
    }.items():
        assert run_command(line.split()) == 2, line
        assert message in capsys.readouterr().err, line


class Supervised(torch.nn.Module):
    """Returns the logits of an auxiliary head too while it trains, and first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(1, 6, 3), torch.nn.BatchNorm2d(6))
        self.aux, self.fc = torch.nn.Linear(6, 10), torch.nn.Linear(6, 10)

    def forward(self, x):
        x = self.body(x)
        found = {"out": self.fc(torch.relu(x).mean((2, 3)))}
        return {"aux": self.aux(x.square().mean((2, 3))), **found} if self.training else found


def test_auxiliary_heads_train_with_their_weight(here):
    jax.config.update("jax_enable_x64", True)
    torch.manual_seed(0)
    module = Supervised()
    ported, data = flax_resblock.port(module, image_size=(8, 8)), runs.few_digits()
    module = module.double()
    optimizer = sgd(module)
    for batch in batches(data, runs.BATCH, seed=0, epoch=0):
        images = torch.from_numpy(np.moveaxis(batch.images, -1, 1).astype(np.float64))
        labels = torch.from_numpy(batch.labels.astype(np.int64))
        found = module(images)
        loss = [torch.nn.functional.cross_entropy(found[name], labels) for name in ("out", "aux")]
        optimizer.zero_grad()
        (loss[0] + 0.4 * loss[1]).backward()
        optimizer.step()
    truth = {key: value.numpy() for key, value in module.state_dict().items()}

    def trained(aux_weight: float) -> dict[str, np.ndarray]:
        config = TrainConfig(
            model=None, epochs=1, batch_size=runs.BATCH, learning_rate=0.1, nesterov=False,
            weight_decay=1e-2, decay=("kernel", "scale", "bias"), warmup_epochs=0.0,
            aux_weight=aux_weight, dtype="float64",
        )  # fmt: skip
        model = ported.create()
        values = {k: v.astype(np.float64) for k, v in flat_arrays(model).items() if v.dtype == "f4"}
        fill(model, values)
        run = replace(new_run(config, runs.STEPS, tensors_of(model)), schedule=None)
        fit(model, data, config, run=run, progress=False)
        return flax_resblock.to_torch(model)

    assert worst(trained(0.4), truth) <= TRAJECTORY_LIMIT
    assert worst(trained(0.3), truth) > 1e6 * TRAJECTORY_LIMIT


def test_predict_and_export_take_a_ported_network(here, capsys):
    pixels = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 1), dtype=np.uint8)
    np.savez("x.npz", images=pixels)
    code = ["--model", f"{here}/own.py:Net"]
    assert run_command(["predict", str(here), "x.npz", *code, "--logits", "own.npy"]) == 0
    assert run_command(["export", str(here), "exported", *code, "--platforms", "cpu"]) == 0
    assert run_command(["predict", "exported", "x.npz", "--logits", "exported.npy"]) == 0
    model = flax_resblock.load_ported(here, imported(here / "own.py").Net)
    truth = np.asarray(model(pixels.astype(np.float32) / 255))
    for file in ("own.npy", "exported.npy"):
        np.testing.assert_allclose(np.load(file), truth, rtol=1e-5, atol=1e-6)
    assert np.abs(truth - np.asarray(model(1 - pixels.astype(np.float32) / 255))).max() > 1e-3
    capsys.readouterr()
    assert run_command(["predict", str(here), "x.npz"]) == 2
    assert "--model" in capsys.readouterr().err
