"""A single flipped bit that changes a tensor is noticed, and the tensor is named."""

import json
import random
import re
import shutil

import numpy as np
import pytest
import torch

from flax_resblock import CheckpointError, checkpoint, from_torch, save
from flax_resblock.checkpoint.record import sidecar_of
from flax_resblock.checkpoint.safetensors_file import write_safetensors
from flax_resblock.cli import run
from flax_resblock.convert.opening import open_checkpoint
from parity_tests.fuzz import samples
from parity_tests.support import flip, healthy, python

FLIPS = 500


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same network in three formats."""
    model, folder = from_torch(healthy()), tmp_path_factory.mktemp("saved")
    for name in ("net.safetensors", "net.pth", "net"):
        save(model, folder / name)
    return folder


@pytest.fixture
def written(saved, tmp_path):
    """A copy of them for one test."""
    return shutil.copytree(saved, tmp_path, dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.safetensors", "net.pth", "net"])
def test_no_flipped_bit_changes_a_tensor_unnoticed(name, written):
    """Over all bits of all files: a third of the flips lie in what describes the tensors."""
    truth = checkpoint.digests(checkpoint.read(written / name).tensors)
    files = [
        path
        for path in (sorted((written / name).rglob("*")) if name == "net" else [written / name])
        if path.is_file() and path.stat().st_size
    ]
    sizes = [8 * path.stat().st_size for path in files]
    rng = random.Random(name)
    exact = named = refused = 0
    for _ in range(FLIPS // 3 + 1):
        path = rng.choices(files, sizes)[0]
        place = rng.randrange(8 * path.stat().st_size)
        flip(path, place)
        try:
            record = checkpoint.read(written / name)
            assert checkpoint.digests(record.tensors) == truth
            exact += 1
        except CheckpointError as error:
            named += any(key in str(error) for key in truth)
            refused += 1
        flip(path, place)
    assert refused > FLIPS // 10
    assert exact + refused == FLIPS // 3 + 1
    assert named > FLIPS // 20
    assert checkpoint.digests(checkpoint.read(written / name).tensors) == truth


@pytest.mark.parametrize("name", ["net.safetensors", "net.pth"])
def test_a_flipped_bit_in_a_tensor_is_named(name, written):
    """Flips within the bytes of tensors: each is refused with the name of the very tensor."""
    tensors = checkpoint.read(written / name).tensors
    content = (written / name).read_bytes()
    rng = random.Random(name)
    for key in rng.choices([key for key, value in tensors.items() if value.nbytes >= 16], k=40):
        stored = np.ascontiguousarray(tensors[key]).tobytes()
        bit = 8 * content.index(stored) + rng.randrange(8 * len(stored))
        flip(written / name, bit)
        with pytest.raises(
            CheckpointError, match=rf"is damaged: {re.escape(key)} differs from the SHA-256"
        ):
            checkpoint.read(written / name)
        flip(written / name, bit)


def test_a_flipped_bit_in_an_orbax_folder_is_named(written):
    """Small tensors share compressed groups; a damaged group names all that it takes along."""
    truth = checkpoint.read(written / "net").tensors
    root = written / "net" / "state"
    (group,) = (root / "d").iterdir()
    flip(group, 8 * 300)
    with pytest.raises(
        CheckpointError, match=r"Of its tensors, head\.bias, .* and \d+ more cannot be read"
    ):
        checkpoint.read(written / "net")
    flip(group, 8 * 300)
    key, stored = "stage2.0.conv2.kernel", truth["stage2.0.conv2.kernel"].tobytes()
    (file,) = (path for path in root.rglob("*") if path.is_file() and stored in path.read_bytes())
    for place in random.Random(0).choices(range(8 * len(stored)), k=10):
        bit = 8 * file.read_bytes().index(stored) + place
        flip(file, bit)
        with pytest.raises(CheckpointError, match=rf"is damaged: {key} differs from the SHA-256"):
            checkpoint.read(written / "net")
        flip(file, bit)


@pytest.mark.parametrize("name", ["net.safetensors", "net"])
def test_what_lies_beside_the_tensors_is_covered_too(name, written):
    """Configuration, eps and momentum change what is computed as much as a weight does."""
    file = written / name if name.endswith("safetensors") else written / name / "flax_resblock.json"
    content = file.read_bytes()
    assert content.count(b"1e-05") == 1
    file.write_bytes(content.replace(b"1e-05", b"2e-05"))
    with pytest.raises(CheckpointError, match="what it says beside its tensors differs"):
        checkpoint.read(written / name)


def test_an_optimizer_in_a_pth_is_covered(tmp_path):
    (tmp_path / "run.pth").write_bytes(samples.saved(samples.training()))
    arguments = (
        f"convert {tmp_path / 'run.pth'} {tmp_path / 'out.pth'} --with-optimizer --no-certificate"
    )
    assert run(arguments.split()) == 0
    record = checkpoint.read(tmp_path / "out.pth", run=True)
    moment = record.extras["optimizer"]["state"][0]["exp_avg"]
    content = (tmp_path / "out.pth").read_bytes()
    flip(tmp_path / "out.pth", 8 * content.index(moment.tobytes()) + 5)
    with pytest.raises(CheckpointError, match="is damaged: /optimizer/state/0/exp_avg differs"):
        checkpoint.read(tmp_path / "out.pth")
    (tmp_path / "out.pth").write_bytes(
        content.replace(b"G?h\x93t\xbcj~\xfa", b"G?h\x93t\xbcj~\xfb")
    )  # the learning rate, 3e-3, in the pickle
    if (tmp_path / "out.pth").read_bytes() != content:
        with pytest.raises(CheckpointError):
            checkpoint.read(tmp_path / "out.pth")


def test_without_its_sidecar_a_pth_still_loads_unchecked(written):
    """The negative control: it is the sidecar that notices."""
    kernel = healthy()["fc.weight"].tobytes()
    flip(written / "net.pth", 8 * (written / "net.pth").read_bytes().index(kernel) + 3)
    with pytest.raises(CheckpointError, match=r"is damaged: fc.weight differs"):
        checkpoint.read(written / "net.pth")
    sidecar_of(written / "net.pth").unlink()
    assert checkpoint.read(written / "net.pth").tensors["fc.weight"].tobytes() != kernel


def test_an_old_sidecar_beside_a_newer_file_is_no_alarm_but_a_note(written, capsys):
    """The file was saved again by something that knows nothing of digests."""
    state = {
        key: torch.from_numpy(value * 2 if value.dtype == np.float32 else value)
        for key, value in healthy().items()
    }
    torch.save(state, written / "net.pth")
    record = checkpoint.read(written / "net.pth")
    assert record.tensors["fc.weight"].tobytes() == state["fc.weight"].numpy().tobytes()
    assert any("net.pth.sha256.json, which describes another file" in note for note in record.notes)
    assert run(["inspect", str(written / "net.pth")]) == 0
    assert "which describes another file" in " ".join(capsys.readouterr().out.split())
    arguments = (
        f"convert {written / 'net.safetensors'} {written / 'net.pth'} --force --no-certificate"
    )
    assert run(arguments.split()) == 0
    assert not any("another file" in note for note in checkpoint.read(written / "net.pth").notes)


def test_a_file_that_moved_with_its_sidecar_is_still_checked(written):
    (written / "copy").mkdir()
    for path in (written / "net.pth", sidecar_of(written / "net.pth")):
        shutil.copy(path, written / "copy")
    assert not open_checkpoint(written / "copy" / "net.pth").notes


@pytest.mark.parametrize(
    "text",
    ["", '{"kind": "flax-resblock digests", "identity": 3, "tensors": {}}', "[" * 100_000],
)
def test_a_damaged_sidecar_is_refused_with_a_way_out(text, written):
    sidecar_of(written / "net.pth").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"net\.pth\.sha256\.json .* remove it to read net\.pth without"
    ):
        checkpoint.read(written / "net.pth")


def test_a_file_of_another_kind_where_the_sidecar_goes_is_never_replaced(written, capsys):
    (written / "new.pth.sha256.json").write_text(json.dumps({"precious": 1}))
    arguments = ["convert", str(written / "net.safetensors"), str(written / "new.pth"), "--force"]
    assert run(arguments) == 2
    assert "is something else" in " ".join(capsys.readouterr().err.split())
    assert not (written / "new.pth").exists()
    assert (written / "new.pth.sha256.json").read_text() == '{"precious": 1}'


def test_a_damaged_orbax_folder_gives_one_line_and_no_traceback(written):
    """Orbax reads all tensors at once; others must not fill the terminal when one fails."""
    index = max((written / "net" / "state" / "d").iterdir(), key=lambda path: path.stat().st_size)
    index.write_bytes(index.read_bytes()[: index.stat().st_size // 2])
    code = "import sys; from flax_resblock.cli import run; sys.exit(run(['inspect', sys.argv[1]]))"
    result = python("-c", code, written / "net")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(
        r"flax-resblock: .*net is not an Orbax checkpoint, or a damaged one \(.*\)\. Copy it "
        r"again\. Of its tensors, .* cannot be read\.\n",
        result.stderr,
    )


def test_other_reports_still_arrive():
    code = """
from flax_resblock.checkpoint import orbax_folder
orbax_folder._orbax()
class Fails:
    def __del__(self):
        raise RuntimeError("in a destructor")
Fails()
"""
    assert "RuntimeError: in a destructor" in python("-c", code, check=True).stderr


def test_without_digests_a_flipped_bit_would_pass(tmp_path):
    """The negative control: it is the SHA-256 that notices."""
    state = healthy()
    write_safetensors(tmp_path / "net.safetensors", state, {})
    flip(tmp_path / "net.safetensors", -40)
    back = checkpoint.read(tmp_path / "net.safetensors").tensors
    assert any(back[key].tobytes() != value.tobytes() for key, value in state.items())
