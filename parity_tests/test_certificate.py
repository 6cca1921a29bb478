"""The certificate of a conversion: what it says is so, also after an interrupt."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from flax_resblock import checkpoint
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.cli import run
from flax_resblock.parity.certificate import (
    ITSELF,
    REFERENCE,
    certificate_of,
    read_certificate,
    recheck,
)
from flax_resblock.parity.certify import BATCH
from parity_tests.support import python, with_trained_norms
from parity_tests.test_without_torch import BLOCK_TORCH
from torch_ref import ResNet

PATH = Path("out.safetensors.parity.json")


def sha(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def write_network(seed=3):
    """net.pth, with batch norms as training leaves them."""
    torch.manual_seed(seed)
    module = ResNet(depths=(1, 1), widths=(8, 12), stem="cifar", stem_width=8, num_classes=4)
    torch.save(with_trained_norms(module).state_dict(), "net.pth")


@pytest.fixture(autouse=True)
def _a_network_is_there(folder):
    write_network()


def convert(out, *flags, source="net.pth"):
    assert run(["convert", source, out, *flags]) == 0
    path = certificate_of(Path(out))
    return next(iter(read_certificate(path).values())) if path.exists() else None


@pytest.mark.parametrize("out", ["net.safetensors", "net_flax"])
def test_a_conversion_is_certified(out, folder, capsys):
    entry, path = convert(out), certificate_of(Path(out))
    assert str(path) == ("net_flax/parity.json" if out == "net_flax" else f"{out}.parity.json")
    assert list(read_certificate(path)) == [ITSELF if out == "net_flax" else out]
    assert entry["source"] == {"path": "net.pth", "sha256": sha("net.pth")}
    files = (
        sorted(
            p.relative_to(out).as_posix()
            for p in Path(out).rglob("*")
            if p.is_file() and p.name != "parity.json"
        )
        if Path(out).is_dir()
        else None
    )
    assert entry["output"]["sha256"] == (
        sha(out) if files is None else {name: sha(Path(out) / name) for name in files}
    )
    written = checkpoint.read(out).tensors
    assert entry["tensors"] == {name: checkpoint.digest(value) for name, value in written.items()}
    verification = entry["verification"]
    assert verification["passed"] is True
    assert 0 < float(verification["worst"]["error"]) <= verification["worst"]["limit"] == 1e-12
    assert verification["tensors"] >= 16
    assert {"flax_resblock", "jax", "torch", "python"} <= set(entry["versions"])
    assert entry["naming"] == ("flax" if out == "net_flax" else "torchvision")
    assert str(folder) not in path.read_text()
    assert verification["compared_with"] == REFERENCE
    printed = capsys.readouterr().out
    assert f"wrote   {path}, the certificate: this result" in printed
    assert f"tensors of Flax agree with PyTorch, compared with {REFERENCE}" in printed
    assert "equal in both frameworks" not in printed
    for name in (out, f"moved{Path(out).suffix}") if out == "net_flax" else (out,):
        Path(out).rename(name)  # a folder brings its certificate along
        path = certificate_of(Path(name))
        found = [(c.output, c.status, c.details) for c in recheck(path)]
        assert found == [(name, "unchanged", ())]


def test_a_certificate_lists_what_was_assumed_and_left_out(folder, capsys):
    state = {f"backbone.{key}": value for key, value in torch.load("net.pth").items()}
    state["classifier.weight"] = state.pop("backbone.fc.weight")
    state["classifier.bias"] = state.pop("backbone.fc.bias")
    torch.save({"state_dict": state}, "tuned.pth")
    entry = convert("out.safetensors", source="tuned.pth")
    assert any(note.startswith("classifier is read as the class") for note in entry["notes"])
    assert "the weights are those of entry 'state_dict'" in entry["notes"]
    printed = " ".join(capsys.readouterr().out.split())
    assert all(note in printed for note in entry["notes"])


def test_the_stored_worst_is_what_the_comparison_measures(folder):
    from flax_resblock.convert.opening import open_checkpoint
    from flax_resblock.cpu.switch import conv_lowering
    from flax_resblock.parity.comparison import Plan, compare_pair
    from flax_resblock.parity.frugal import FrugalPair
    from flax_resblock.parity.inputs import adversarial_images

    verification = convert("net.safetensors")["verification"]
    source = open_checkpoint("net.safetensors")
    images = adversarial_images(source.config, batch=BATCH)
    with conv_lowering("xla"):
        rows = compare_pair(
            FrugalPair.of(source), images, Plan(train=False, precisions=("float64",))
        ).measurements
    assert verification["tensors"] == len(rows)
    assert verification["worst"]["error"] == max(row.verdict.error for row in rows)


def test_the_last_conversion_to_a_name_counts(folder):
    first = convert("out.safetensors")
    write_network(seed=9)
    last = convert("out.safetensors", "--force")
    assert last["source"]["sha256"] == sha("net.pth") != first["source"]["sha256"]
    assert [check.status for check in recheck(PATH)] == ["unchanged"]


def test_a_source_that_the_output_replaces_is_certified_as_it_was(folder):
    shutil.copy("net.pth", "same.pth")
    torch.save({"state_dict": torch.load("net.pth", weights_only=True)}, "same.pth")
    before = sha("same.pth")
    entry = convert("same.pth", "--force", source="same.pth")
    assert entry["source"]["sha256"] == before != sha("same.pth") == entry["output"]["sha256"]


def test_shards_and_folders_as_a_source_are_hashed_file_by_file(folder):
    state = state_to_numpy(torch.load("net.pth", weights_only=True))
    names = list(state)
    halves = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for file, keys in halves.items():
        safetensors.numpy.save_file({key: np.array(state[key], order="C") for key in keys}, file)
    Path("model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {key: file for file, keys in halves.items() for key in keys}})
    )
    entry = convert("joined.safetensors", source="model.safetensors.index.json")
    files = ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]
    assert entry["source"] == {
        "path": "model.safetensors.index.json",
        "sha256": {file: sha(file) for file in files},
    }
    convert("net_flax", "--no-certificate")
    assert set(convert("back.pth", source="net_flax")["source"]["sha256"]) >= {"flax_resblock.json"}


def test_frameworks_that_differ_give_status_1_and_are_recorded(folder, capsys, monkeypatch):
    from flax_resblock.parity.frugal import FrugalPair

    original = FrugalPair.flax

    def tampered(self, *arguments, **options):
        model = original(self, *arguments, **options)
        model.stage2[0].conv2.kernel.set_value(model.stage2[0].conv2.kernel[...] * (1 + 1e-6))
        return model

    monkeypatch.setattr(FrugalPair, "flax", tampered)
    assert run(["convert", "net.pth", "out.safetensors"]) == 1
    error = " ".join(capsys.readouterr().err.split())
    assert (
        "out.safetensors holds every tensor bit for bit, but PyTorch and Flax do not compute "
        "the same with it" in error
    )
    verification = read_certificate(PATH)["out.safetensors"]["verification"]
    assert verification["passed"] is False
    assert verification["worst"]["error"] > 100 * verification["worst"]["limit"]
    assert json.loads(PATH.read_text(), parse_constant=pytest.fail)
    assert recheck(PATH)[0].details == ("the frameworks differed on it when it was written",)
    truth = torch.load("net.pth", weights_only=True)
    assert all(
        np.array_equal(value, truth[key].numpy())
        for key, value in checkpoint.read("out.safetensors").tensors.items()
    )


def test_values_that_are_not_finite_are_certified_and_not_verified(folder, capsys):
    state = torch.load("net.pth", weights_only=True)
    state["fc.bias"][2] = float("nan")
    torch.save(state, "net.pth")
    entry = convert("out.safetensors", "--allow-nonfinite")
    assert list(entry["verification"]) == ["skipped"]
    assert "fc.bias (1 of 4 values not finite)" in entry["verification"]["skipped"]
    assert "not verified" in capsys.readouterr().out
    assert recheck(PATH)[0].status == "unchanged"


@pytest.mark.slow
def test_without_the_certificate_nothing_is_verified_or_written(folder):
    code = (
        "import sys; from flax_resblock.cli import run; print(run(['convert', *sys.argv[1:]]), "
        "{'jax', 'torch'} & set(sys.modules))"
    )
    safe = [sys.executable, "-c", code, "net.safetensors", "out.safetensors"]
    convert("net.safetensors", "--no-certificate")
    assert not PATH.exists()
    result = subprocess.run([*safe, "--no-certificate"], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 set()"
    assert not PATH.exists()
    result = subprocess.run([*safe, "--force"], capture_output=True, text=True, check=True)
    assert set(eval(result.stdout.splitlines()[-1][2:])) == {"jax", "torch"}
    assert PATH.exists()


@pytest.mark.slow
def test_without_torch_a_conversion_is_certified_and_not_verified(folder):
    convert("net.safetensors", "--no-certificate")
    code = BLOCK_TORCH + (
        "from flax_resblock.cli import run\nprint(run(['convert', 'net.safetensors', "
        "'flax.safetensors', '--to-naming', 'flax']))"
    )
    result = python("-c", code, check=True)
    assert result.stdout.splitlines()[-1] == "0", result.stderr
    path = Path("flax.safetensors.parity.json")
    assert read_certificate(path)["flax.safetensors"]["verification"] == {
        "skipped": "PyTorch is not installed"
    }


def _interrupt(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def _half(self, text, **_):
    self.write_bytes(text.encode()[: len(text) // 2])
    _interrupt()


@pytest.mark.parametrize("where", ["verifying", "writing the certificate"])
def test_an_interrupt_leaves_a_complete_output_and_no_half_certificate(
    where, folder, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        if where == "verifying":
            patch.setattr("flax_resblock.parity.certify.verify_written", _interrupt)
        else:
            patch.setattr(Path, "write_text", _half)
        assert run(["convert", "net.pth", "out.safetensors"]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not PATH.exists()
    assert_whole(folder)
    convert("out.safetensors", "--force")
    assert [check.status for check in recheck(PATH)] == ["unchanged"]


def assert_whole(folder):
    """The output is complete, and so is the certificate if there is one; nothing else is left."""
    expected = {"net.pth", "out.safetensors"}
    assert expected <= {path.name for path in folder.iterdir()} <= expected | {PATH.name}
    truth = torch.load("net.pth", weights_only=True)
    assert all(
        np.array_equal(value, truth[key].numpy())
        for key, value in checkpoint.read("out.safetensors").tensors.items()
    )
    assert not PATH.exists() or {check.status for check in recheck(PATH)} == {"unchanged"}


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.2, 0.5, 1.0, 1.5, 2.0])
def test_an_interrupt_at_any_time_after_the_output_is_written_does_no_harm(delay, folder):
    """jax's callbacks swallow an interrupt: then the conversion ends as if there had been none."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flax_resblock", "convert", "net.pth", "out.safetensors"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not Path("out.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0 or b"flax-resblock: interrupted" in error, error
    assert_whole(folder)
    assert PATH.exists() or process.returncode != 0
