"""The command line: good input, bad input, exit statuses, nothing half-written."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flax_resblock
from flax_resblock import checkpoint
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.cli import run
from parity_tests.support import SHARED, needs_real_checkpoints, with_trained_norms
from torch_ref import ResNet

NETWORK = {"depths": (1, 1), "widths": (8, 12), "stem": "cifar", "stem_width": 8, "num_classes": 4}


def network(seed=0):
    torch.manual_seed(seed)
    return with_trained_norms(ResNet(**NETWORK))


@pytest.fixture
def checkpoint_file(folder):
    torch.save(
        {
            "epoch": 3,
            "state_dict": {f"module.{key}": value for key, value in network().state_dict().items()},
        },
        "net.pth",
    )
    return "net.pth"


def test_convert_there_and_back_is_exact(checkpoint_file, capsys):
    for line in (
        f"{checkpoint_file} flax_folder",
        "flax_folder again.safetensors --to-naming kuangliu",
        "again.safetensors back.pth --to-naming torchvision",
    ):
        assert run(["convert", *line.split(), "--no-certificate"]) == 0
    back, truth = torch.load("back.pth", weights_only=True), network().state_dict()
    assert list(back) == list(truth)
    assert all(torch.equal(back[key], truth[key]) for key in truth)
    network(1).load_state_dict(back, strict=True)
    output = capsys.readouterr().out
    assert "the weights are those of entry 'state_dict'" in output
    assert "removed the prefix 'module.'" in output


def test_inspect_says_what_it_is_and_writes_json(checkpoint_file, capsys):
    assert run(["inspect", checkpoint_file, "--json-file", "facts.json"]) == 0
    output = capsys.readouterr().out
    assert "torchvision" in output
    assert "epoch: 3" in output
    facts = json.loads(Path("facts.json").read_text())
    assert facts["config"]["widths"] == [8, 12]
    assert facts["parameters"] == sum(p.numel() for p in network().parameters())


@pytest.mark.slow
def test_verify_passes_and_writes_json(checkpoint_file, capsys):
    assert run(["verify", checkpoint_file, "--gradients", "--json", "report.json"]) == 0
    facts = json.loads(Path("report.json").read_text())
    assert facts["passed"]
    assert facts["schema"] == 2
    assert {row["mantissa_bits"] for row in facts["precision_found"]} == {52, 23}
    expected = {"eval forward", "train forward", "running statistics", "parameter gradient"}
    assert {m["quantity"] for m in facts["measurements"]} >= expected
    assert set(facts["provenance"]["sha256"]) == set(network().state_dict())
    assert "equal: all" in capsys.readouterr().out


def test_verify_exits_with_1_and_names_the_slot_when_something_differs(
    checkpoint_file, capsys, monkeypatch
):
    from flax_resblock.parity.reference import ReferencePair

    original = ReferencePair.flax

    def tampered(self, precision):
        model = original(self, precision)
        model.stage2[0].conv2.kernel.set_value(model.stage2[0].conv2.kernel[...] * (1 + 1e-3))
        return model

    monkeypatch.setattr(ReferencePair, "flax", tampered)
    assert run(["verify", checkpoint_file, "--eval-only", "--precision", "float64"]) == 1
    output = capsys.readouterr().out
    assert "first at stage2.0.conv2" in output
    assert "differ" in output


def test_predict_classifies_image_files_and_archives(checkpoint_file, capsys, monkeypatch):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    np.savez(
        "images.npz",
        images=pixels,
        labels=np.array([0, 1, 2]),
        mean=[0.4, 0.5, 0.6],
        std=[0.2, 0.3, 0.25],
    )
    Image.fromarray(pixels[0]).save("a.png")
    Path("names.txt").write_text("cat\ndog\nant\nbee\n")
    assert run(["predict", checkpoint_file, "images.npz", "--logits", "l.npy"]) == 0
    assert "of 3 right" in capsys.readouterr().out
    normalised = (pixels / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.25]
    module = network().double().eval()
    truth = module(torch.from_numpy(np.moveaxis(normalised, -1, 1).copy())).detach().numpy()
    np.testing.assert_allclose(np.load("l.npy"), truth, rtol=1e-4, atol=1e-5)
    few = np.load("l.npy")
    monkeypatch.setattr("flax_resblock.cli.predict.AT_ONCE", 2)  # three images are many now
    assert run(["predict", checkpoint_file, "images.npz", "--logits", "l.npy", "--force"]) == 0
    np.testing.assert_allclose(np.load("l.npy"), truth, rtol=1e-4, atol=1e-5)
    assert not np.array_equal(np.load("l.npy"), few)  # another program computed them
    flags = "--class-names names.txt --logits one.npy --mean 0.4 0.5 0.6 --std 0.2 0.3 0.25"
    assert run(["predict", checkpoint_file, "a.png", *flags.split()]) == 0
    np.testing.assert_allclose(np.load("one.npy")[0], truth[0], rtol=1e-4, atol=1e-5)
    assert any(name in capsys.readouterr().out for name in ("cat", "dog", "ant", "bee"))


def _broken(change):
    def write():
        state = dict(network().state_dict())
        change(state)
        torch.save(state, "bad.pth")

    return write


def _poison(key, value):
    return _broken(lambda state: state[key].view(-1).__setitem__(0, value))


# Whatever else is no checkpoint or does not fit is refused with the words of test_bad_input.py and
# test_identification.py.
BAD = {
    "--num-classes 7": (_broken(lambda s: None), r"fc.weight \[4, 12\], expected \[7, 12\]"),
    "not finite": (
        _poison("layer1.0.conv1.weight", float("nan")),
        r"layer1.0.conv1.weight \(1 of 576 values not finite\).*--allow-nonfinite",
    ),
    "negative variance": (
        _poison("bn1.running_var", -0.5),
        r"bn1.running_var \(negative variance -0.5\).*--allow-nonfinite",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gives_one_paragraph_and_status_2_and_writes_nothing(case, folder, capsys):
    write, message = BAD[case]
    write()
    flags = case.split() if case.startswith("--") else []
    before = sorted(path.name for path in folder.iterdir())
    for command in (["convert", "bad.pth", "out.safetensors"], ["verify", "bad.pth"]):
        assert run([*command, *flags]) == 2, command
        error = capsys.readouterr().err
        assert error.startswith("flax-resblock: ")
        assert "\n\n" not in error
        assert "Traceback" not in error
        assert re.search(message, " ".join(error.split())), error
        assert sorted(path.name for path in folder.iterdir()) == before


def test_allow_nonfinite_carries_the_bits(folder, capsys):
    _poison("layer1.0.conv1.weight", float("nan"))()
    assert run(["convert", "bad.pth", "out.safetensors", "--allow-nonfinite"]) == 0
    tensors = checkpoint.read("out.safetensors").tensors
    truth = state_to_numpy(torch.load("bad.pth", weights_only=True))
    assert all(tensors[key].tobytes() == truth[key].tobytes() for key in truth)


def test_no_class_is_told_from_logits_that_are_not_finite(folder, capsys):
    _poison("fc.weight", 3e38)()
    np.savez(
        "two.npz", images=np.full((2, 32, 32, 3), 9, np.uint8), mean=[0.4] * 3, std=[0.001] * 3
    )
    command = ["predict", "bad.pth", "two.npz", "--logits", "l.npy"]
    assert run(command) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "logits are not finite for 2 of 2 images: two.npz[0], two.npz[1]. No class" in error
    assert not Path("l.npy").exists()
    assert run([*command, "--allow-nonfinite"]) == 0
    assert not np.isfinite(np.load("l.npy")).all()


def test_a_file_in_the_place_of_a_folder_is_kept_unless_forced(checkpoint_file, capsys):
    """As test_bad_input.py shows of every format."""
    Path("out").write_text("precious")
    command = ["convert", checkpoint_file, "out", "--no-certificate"]
    assert run(command) == 2
    assert "exists" in capsys.readouterr().err
    assert Path("out").read_text() == "precious"
    assert run([*command, "--force"]) == 0
    assert flax_resblock.load("out").config.widths == (8, 12)


def test_force_never_replaces_a_folder_that_is_no_checkpoint(checkpoint_file, capsys):
    Path("thesis").mkdir()
    Path("thesis/chapter.tex").write_text("years of work")
    assert run(["convert", checkpoint_file, "thesis", "--force"]) == 2
    assert "is a folder of something else" in capsys.readouterr().err
    assert Path("thesis/chapter.tex").read_text() == "years of work"


def test_usage_errors_exit_with_2_and_help_with_0(capsys):
    for arguments, status in (
        (["convert"], 2),
        (["frobnicate"], 2),
        (["--help"], 0),
        (["convert", "--help"], 0),
    ):
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(run(arguments))
        assert stop.value.code == status
    assert run(["--version"]) == 0
    assert flax_resblock.__version__ in capsys.readouterr().out


def test_traceback_flag_shows_where_an_error_came_from(folder):
    with pytest.raises(flax_resblock.CheckpointError):
        run(["inspect", "nowhere.pth", "--traceback"])


def test_temporaries_of_a_killed_process_are_removed_and_those_of_a_live_one_kept(checkpoint_file):
    """Alive is who holds the lock; a number says nothing: it may be another process's by now."""
    for process in (os.getppid(), os.getpid()):
        Path(f".out.{process}.abc.partial").mkdir()
        Path(f".out.{process}.abc.partial/half").write_text("x")
    live = os.open(f".out.{os.getpid()}.abc.partial", os.O_RDONLY)
    fcntl.flock(live, fcntl.LOCK_EX)
    command = ["convert", checkpoint_file, "out", "--no-certificate"]
    assert run(command) == 0
    assert not Path(f".out.{os.getppid()}.abc.partial").exists()
    assert Path(f".out.{os.getpid()}.abc.partial/half").exists()
    os.close(live)
    assert run([*command, "--force"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == [checkpoint_file, "out"]


def test_a_folder_that_was_moved_aside_by_a_killed_process_comes_back(checkpoint_file, capsys):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    command = ["convert", checkpoint_file, "out", "--no-certificate"]
    assert run(command) == 0
    Path(f".out.{dead.pid}.abc.partial").mkdir()
    Path("out").rename(f".out.{dead.pid}.abc.partial/replaced")
    assert run(command) == 2
    assert "out exists" in capsys.readouterr().err
    assert flax_resblock.load("out").config.widths == (8, 12)
    assert not Path(f".out.{dead.pid}.abc.partial").exists()


@pytest.mark.slow
def test_interrupt_while_writing_leaves_no_trace(folder):
    torch.save(ResNet(widths=(64, 128, 256, 512)).state_dict(), "big.pth")
    for delay in (0.3, 0.9, 1.4, 1.7):
        process = subprocess.Popen(
            [sys.executable, "-m", "flax_resblock", "convert", "big.pth", "out"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert {path.name for path in folder.iterdir()} <= {"big.pth", "out"}
        if (folder / "out").exists():
            assert flax_resblock.load("out").config.depths == (2, 2, 2, 2)
            assert run(["convert", "big.pth", "out", "--force"]) == 0


@pytest.mark.slow
@needs_real_checkpoints
@pytest.mark.parametrize(
    ("file", "name"),
    [("resnet20-12fca82f.th", "resnet20"), ("resnet56-4bfd9763.th", "resnet56")],
)
def test_real_checkpoints_work_with_no_flags(file, name, folder, capsys):
    path = str(SHARED / file)
    assert run(["inspect", path]) == 0
    assert run(["convert", path, "out.safetensors"]) == 0
    assert run(["verify", path]) == 0
    output = capsys.readouterr().out
    assert name in output
    assert "naming scheme 'akamaster'" in output
