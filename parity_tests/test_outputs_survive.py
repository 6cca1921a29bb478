"""Kills, full disks and concurrent writers leave the old output or the new one, whole."""

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from flax_resblock import checkpoint, from_torch, save, to_torch
from flax_resblock.checkpoint import atomic
from flax_resblock.checkpoint.record import sidecar_of
from flax_resblock.cli import run
from flax_resblock.errors import InputError, OutputError
from parity_tests import kills
from parity_tests.support import assert_same_bits, healthy, mounted
from torch_ref import ResNet

NAMES = ("net.safetensors", "net.pth", "net")


@pytest.mark.slow
def test_a_kill_leaves_the_old_output_or_the_new_one_whole(tmp_path):
    """Six of the two hundred kills of `make stress`."""
    outcomes, _, wrong = kills.kill_many(tmp_path, 6, random.Random(0))
    assert not wrong
    assert sum(outcomes.values()) == 6


def test_the_look_at_what_is_left_sees_damage(tmp_path):
    """The negative control of the kills."""
    save(from_torch(healthy()), tmp_path / "net.safetensors")
    truth = checkpoint.digests(checkpoint.read(tmp_path / "net.safetensors").tensors)
    assert kills.left(tmp_path / "net.safetensors", truth, {}) == "old"
    content = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(content[:-9])
    assert kills.left(tmp_path / "net.safetensors", truth, {}).startswith("DAMAGED")
    (tmp_path / ".net.safetensors.1.x.partial").mkdir()
    assert kills.temporaries(tmp_path / "net.safetensors")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of 2.5 MB in a file of its own."""
    torch.manual_seed(0)
    sizes = {"depths": (1, 1, 1), "widths": (64, 96, 128), "stem": "cifar", "num_classes": 10}
    file = tmp_path_factory.mktemp("large") / "large.pth"
    torch.save(ResNet(**sizes).state_dict(), file)
    return file


@pytest.mark.parametrize(
    ("name", "size"),
    [("net.safetensors", "1m"), ("net.pth", "300k"), ("net", "1m"), ("net", "300k")],
)
def test_a_full_disk_leaves_the_old_output_and_no_trace(name, size, large, tmp_path, capfd):
    with mounted(tmp_path / "disk", f"size={size}") as disk:
        assert run(["convert", str(large), str(disk / name), "--no-certificate"]) == 2
        assert list(disk.iterdir()) == []
        save(from_torch(healthy()), disk / name)
        before = sorted(path.name for path in disk.iterdir())
        capfd.readouterr()
        assert run(["convert", str(large), str(disk / name), "--force", "--no-certificate"]) == 2
        error = capfd.readouterr().err
        assert f"{disk / name} could not be written" in error
        assert "Traceback" not in error
        assert len(error.splitlines()) == 1
        assert sorted(path.name for path in disk.iterdir()) == before
        assert_same_bits(to_torch(from_torch(disk / name)), healthy())


def test_what_a_background_thread_writes_after_a_failure_is_removed_too(tmp_path):
    """As Orbax's threads do on a full disk: they make the folder again when it is gone."""

    def late(folder):
        while folder.exists():
            time.sleep(0.001)
        folder.mkdir()
        (folder / "array").write_bytes(b"late")

    def failing():
        with atomic.replacing(tmp_path / "net") as temporary:
            threads.append(threading.Thread(target=late, args=(temporary.parent,)))
            threads[0].start()
            raise OSError(28, "No space left on device")

    threads: list[threading.Thread] = []
    with pytest.raises(OutputError, match="No space left"):
        failing()
    threads[0].join()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["facts.json", "report.json"])
def test_reports_on_a_full_disk_are_whole_or_absent(name, large, tmp_path, capfd):
    with mounted(tmp_path / "disk", "size=64k") as disk:
        (disk / "filler").write_bytes(bytes(64 << 10))
        command = (
            ["inspect", str(large), "--json-file"]
            if name == "facts.json"
            else ["verify", str(large), "--eval-only", "--precision", "float64", "--json"]
        )
        assert run([*command, str(disk / name)]) == 2
        assert (
            f"{name} could not be written: No space left on device" in capfd.readouterr().err
            or not (disk / name).exists()
        )
        assert [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_read_only_folder_is_refused_in_one_line(name, large, tmp_path, capfd):
    with mounted(tmp_path / "disk", "size=9m") as disk:
        save(from_torch(healthy()), disk / name)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = sorted(path.name for path in disk.iterdir())
        assert run(["convert", str(large), str(disk / name), "--force", "--no-certificate"]) == 2
        assert "cannot be written to: Read-only file system" in capfd.readouterr().err
        assert sorted(path.name for path in disk.iterdir()) == before
        assert_same_bits(to_torch(from_torch(disk / name)), healthy())


def test_output_to_a_full_device_is_one_line():
    code = "import sys; from flax_resblock.cli import main; sys.argv[1:] = ['--version']; main()"
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert result.returncode != 0
    assert "flax-resblock: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr


RIVAL = """
import sys
from pathlib import Path
import numpy as np
from flax_resblock import InputError, checkpoint
out, number, force = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "force"
tensors = {f"t{i}": np.full(20_000, number * 100 + i, np.float32) for i in range(6)}
sys.stdin.readline()
try:
    checkpoint.write(out, tensors, force=force)
    print("won")
except InputError as error:
    print("lost", error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("force", ["force", "careful"])
def test_of_rivals_for_one_destination_one_wins_whole(name, force, tmp_path):
    if force == "force":
        checkpoint.write(tmp_path / name, {"old": healthy()["fc.weight"]})
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", RIVAL, str(tmp_path / name), str(n), force],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(1, 6)
    ]
    for rival in rivals:
        rival.stdin.write("\n")
        rival.stdin.flush()
    said = [rival.communicate(timeout=120)[0] for rival in rivals]
    record = checkpoint.read(tmp_path / name)
    numbers = {int(value[0]) // 100 for value in record.tensors.values()}
    assert len(numbers) == 1
    assert all(int(value[0]) % 100 == int(key[1:]) for key, value in record.tensors.items())
    assert said[numbers.pop() - 1].startswith("won")
    assert not record.notes, "file and sidecar are of one writer"
    if force == "careful":
        assert sum(text.startswith("won") for text in said) == 1
        assert all(text.startswith("won") or "exists" in text for text in said), said
    assert not kills.temporaries(tmp_path / name)


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "moved aside"])
def test_a_folder_is_replaced_whole_with_and_without_an_exchange(exchange, tmp_path, monkeypatch):
    save(from_torch(healthy()), tmp_path / "net")
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda new, path: False)
    other = from_torch({key: value + 1 for key, value in healthy().items()})
    save(other, tmp_path / "net", force=True)
    assert_same_bits(to_torch(from_torch(tmp_path / "net")), to_torch(other))
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


def test_a_reader_never_finds_a_folder_absent_while_it_is_replaced(tmp_path):
    """Where the system can exchange two names in one step."""
    save(from_torch(healthy()), tmp_path / "net")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    missing, over = [], threading.Event()

    def look():
        while not over.is_set():
            if not os.path.lexists(tmp_path / "net"):
                missing.append(1)

    looker = threading.Thread(target=look)
    looker.start()
    for _ in range(20):
        with atomic.replacing(
            tmp_path / "net", force=True, replaceable=checkpoint.is_orbax
        ) as temporary:
            temporary.mkdir()
            (temporary / "_CHECKPOINT_METADATA").write_text("{}")
    over.set()
    looker.join()
    assert not missing


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    def write():
        with atomic.replacing(tmp_path / "net.json") as temporary:
            temporary.write_text("mine")
            (tmp_path / "net.json").write_text("theirs")

    with pytest.raises(InputError, match="exists"):
        write()
    assert (tmp_path / "net.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["net.json"]


def test_a_sidecar_takes_its_place_before_its_file(tmp_path, monkeypatch):
    """A kill between the two leaves the old file with a note, never a new file without one."""
    save(from_torch(healthy()), tmp_path / "net.pth")
    monkeypatch.setattr(
        atomic, "_place", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    with pytest.raises(OutputError, match="Input/output error"):
        save(
            from_torch({key: value + 1 for key, value in healthy().items()}),
            tmp_path / "net.pth",
            force=True,
        )
    record = checkpoint.read(tmp_path / "net.pth")
    assert_same_bits(dict(record.tensors), healthy())
    assert any("describes another file" in note for note in record.notes)
    expected = [tmp_path / "net.pth", sidecar_of(tmp_path / "net.pth")]
    assert sorted(Path(tmp_path).iterdir()) == expected
