"""Files that the fuzzer found to end in neither an exact load nor one clear error."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from flax_resblock import CheckpointError, InputError, checkpoint
from flax_resblock.checkpoint.bounded import read_npz
from flax_resblock.cli import run
from flax_resblock.convert.opening import ReadOptions, open_checkpoint
from flax_resblock.parity.certificate import recheck
from flax_resblock.runs.run_file import run_of
from flax_resblock.training.data.npz import npz_archive
from parity_tests.fuzz import samples


def test_a_member_of_an_npz_that_is_no_array_is_left_out(tmp_path):
    """numpy hands such a member out as bytes, which have no dtype."""
    buffer = io.BytesIO(samples.samples()["npz"]["data.npz"])
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("labels_note.txt", "hello")
    (tmp_path / "data.npz").write_bytes(buffer.getvalue())
    assert set(read_npz(tmp_path / "data.npz")) == {"images", "labels", "mean", "std"}
    with zipfile.ZipFile(io.BytesIO(samples.samples()["npz"]["data.npz"])) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for name, data in parts.items():
            archive.writestr(
                "labels" if name == "labels.npy" else name,
                data[3:] if name == "labels.npy" else data,
            )
    with pytest.raises(InputError, match="has the arrays images, mean, std; expected"):
        npz_archive(tmp_path / "data.npz")


DAMAGED_RUNS = {
    "a parameter that is no number": lambda run: run["optimizer"]["state"].update(
        {"conv1.weight\x1b[31m": run["optimizer"]["state"].pop(0)}
    ),
    "a group without parameters": lambda run: run["optimizer"]["param_groups"][0].pop("params"),
    "a group that is none": lambda run: run["optimizer"]["param_groups"].append(None),
}


@pytest.mark.parametrize("case", DAMAGED_RUNS)
def test_a_damaged_optimizer_is_one_clear_error(case, tmp_path):
    run = samples.training()
    (tmp_path / "net.pth").write_bytes(samples.saved(run))
    assert run_of(open_checkpoint(tmp_path / "net.pth", run=True)).optimizer.kind == "adamw"
    DAMAGED_RUNS[case](run)
    (tmp_path / "net.pth").write_bytes(samples.saved(run))
    source = open_checkpoint(tmp_path / "net.pth", run=True)
    with pytest.raises(CheckpointError, match=r"optimizer|training run") as error:
        run_of(source)
    assert "\x1b" not in str(error.value)


def test_a_certificate_with_a_name_that_no_file_system_takes_is_refused(tmp_path):
    content = samples.certificate()
    content["outputs"]["x" * 5000] = content["outputs"].pop("absent")
    (tmp_path / "parity.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not the plain name of a file or folder"):
        recheck(tmp_path / "parity.json")


def test_a_shard_with_a_name_that_no_file_system_takes_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"conv1.weight": "x" * 5000}})
    )
    with pytest.raises(CheckpointError, match="not a plain file name"):
        checkpoint.read(tmp_path / "model.safetensors.index.json")


METADATA = {
    "an endless eps": ({"eps": "[" * 9000}, "its stored eps or momentum is no number"),
    "a network without end": (
        {"config": json.dumps({"type": "ResNetConfig", "depths": [10**9], "widths": [4]})},
        "its stored configuration is damaged",
    ),
    "more blocks than tensors": (
        {"config": json.dumps({"type": "ResNetConfig", "depths": [999], "widths": [4]})},
        "999 blocks, and the file 12 tensors",
    ),
    "a block of no kind": (
        {"config": json.dumps({"type": "ResNetConfig", "block": "x"})},
        "block 'x' is unknown",
    ),
    "a nest": ({"config": "[" * 100_000}, "its stored configuration is damaged"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_of_no_network_are_one_short_error(case, tmp_path):
    metadata, match = METADATA[case]
    (tmp_path / "net.safetensors").write_bytes(
        safetensors.numpy.save(samples.state(), metadata=metadata)
    )
    with pytest.raises(CheckpointError, match=match) as error:
        open_checkpoint(tmp_path / "net.safetensors", ReadOptions())
    assert len(str(error.value)) < 600


def test_an_empty_tensor_of_any_shape_is_read_or_refused(tmp_path):
    """safetensors takes axes that numpy does not."""
    header = {
        "a": {"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "net.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + np.float32(3).tobytes()
    )
    with pytest.raises(CheckpointError):
        checkpoint.read(tmp_path / "net.safetensors")


def test_a_record_marked_as_a_folder_is_refused(tmp_path):
    """PyTorch's own reader, without memory mapping, then gives whatever was in memory before."""
    data = bytearray(samples.samples()["pth zip"]["net.pth"])
    place = data.rindex(b"PK\x01\x02", 0, data.rindex(b"archive/data/4"))
    data[place + 38] |= 0x10
    (tmp_path / "net.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="'archive/data/4' is marked as a folder"):
        checkpoint.read(tmp_path / "net.pth")


def test_param_groups_that_are_none_do_not_stop_inspect(tmp_path, capsys):
    (tmp_path / "net.pth").write_bytes(
        samples.saved({**samples.training(), "optimizer": {"param_groups": 1e308, "state": {}}})
    )
    assert run(["inspect", str(tmp_path / "net.pth")]) == 0
    assert "also has optimizer: dict of 2" in capsys.readouterr().out


def test_an_endless_message_of_zipfile_is_cut(tmp_path):
    data = samples.samples()["npz"]["data.npz"]
    (tmp_path / "data.npz").write_bytes(data[:26] + b"\xff\x0f" + data[28:])
    with pytest.raises(InputError, match=r"not an \.npz archive") as error:
        read_npz(tmp_path / "data.npz")
    assert len(str(error.value)) < 800


def test_an_array_that_declares_more_than_the_memory_is_damage(tmp_path):
    """numpy raises a MemoryError for it, which is not passed on."""
    buffer = io.BytesIO()
    np.save(buffer, np.ones(3, np.float32))
    short, long = b"'shape': (3,), }          ", b"'shape': (9000000000,), } "
    assert short in buffer.getvalue()
    large = buffer.getvalue().replace(short, long)
    for name, data in (("whole", buffer.getvalue()), ("large", large)):
        with zipfile.ZipFile(tmp_path / f"{name}.npz", "w") as archive:
            archive.writestr("labels.npy", data)
    assert set(read_npz(tmp_path / "whole.npz")) == {"labels"}
    with pytest.raises(InputError, match=r"large\.npz is not an \.npz archive"):
        read_npz(tmp_path / "large.npz")
    with pytest.raises(CheckpointError, match=r"large\.npz"):
        checkpoint.read(tmp_path / "large.npz")
