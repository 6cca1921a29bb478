"""Hostile files are refused with one error before anything is allocated, run or followed."""

import gzip
import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
import torch

from flax_resblock import CheckpointError, InputError, checkpoint
from flax_resblock.checkpoint import Limits
from flax_resblock.checkpoint.bounded import read_npz
from flax_resblock.checkpoint.limits import check_content
from flax_resblock.checkpoint.orbax_folder import write_orbax
from flax_resblock.checkpoint.safetensors_file import write_safetensors
from flax_resblock.checkpoint.torch_file import with_tensors
from flax_resblock.checkpoint.torch_pickle import read_torch_pickle
from flax_resblock.config import ResNetConfig
from flax_resblock.training.data.idx import read_idx
from parity_tests.fuzz import pickles, samples, targets
from parity_tests.support import REPOSITORY, assert_same_bits, fast_only, python

FRAME = b"\x80\x02}(X\x05\x00\x00\x00stateK\x01%su."
"""A pickle of a dictionary, with a place for more of it."""


def zip_of(records):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, method in records:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def records_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [
            (info.filename, archive.read(info), zipfile.ZIP_STORED) for info in archive.infolist()
        ]


@pytest.fixture(scope="module")
def healthy():
    return samples.saved(with_tensors(samples.state()))


def refused(path, data, match, **limits):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.read(path, limits=Limits(**limits))


WHY = {
    "system": "posix.system to be imported and run",
    "os.system": "os.system to be imported and run",
    "environ": "builtins.exec to be imported and run",
    "eval by stack": "instruction STACK_GLOBAL",
    "inst": "instruction INST",
    "obj": "instruction OBJ",
    "obj of a class": "instruction OBJ",
    "method of a class": "builtins.getattr to be imported and run",
    "numpy load": "numpy.load to be imported and run",
    "torch load": "torch.load to be imported and run",
    "bytearray": "builtins.bytearray to be imported and run",
    "encode chain": "codecs.encode to be imported and run",
    "encode to hex": "calls _codecs.encode with arguments",
    "encode again and again": "bytes of copies; the limit",
    "copy again and again": "bytes of copies; the limit",
    "key of shared tuples": "has a tuple as a key",
    "long key": "has a tuple as a key",
    "endless product": "arguments that no checkpoint needs",
    "tensor class": "torch.FloatTensor to be imported and run",
    "storage": "torch.FloatStorage to be imported and run",
    "deep tuples": "65 levels of nesting",
    "deep key": "65 levels of nesting",
    "deep lists": "65 levels of nesting",
    "huge string": "its pickle cannot be read",
    "expanded tensor": "arguments that no checkpoint needs, or a tensor larger than the limit",
    "negative size": "arguments that no checkpoint needs",
    "beyond its record": "arguments that no checkpoint needs, or a tensor larger|two sizes",
    "overflow": "arguments that no checkpoint needs",
    "dtype of any size": "calls numpy.dtype with arguments",
    "extension": "instruction EXT1",
    "memo": "keeps a value as number 4,294,967,295",
    "state of a class": "gives a state to a collections.OrderedDict",
    "state of a function": "gives a state to a torch._utils._rebuild_tensor_v2",
    "state of a list": "gives a state to a list",
    "state again and again": "bytes of copies; the limit",
    "items of a class": "sets items of what is no dictionary",
    "items of a tensor": "sets items of what is no dictionary",
    "extend by name": "appends to what is no list",
    "protocol": "unsupported pickle protocol",
}


@pytest.mark.parametrize("name", WHY)
def test_what_a_pickle_tries_is_named_without_doing_it(name):
    with pytest.raises(CheckpointError, match=WHY[name]):
        read_torch_pickle(
            FRAME % (b"X\x01\x00\x00\x00a" + pickles.PIECES[name]), Limits(max_bytes=1 << 26)
        )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_no_piece_gets_through_a_file(legacy, tmp_path, monkeypatch):
    """Beside healthy weights each is refused, or left out without a change to the weights."""
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": with_tensors(samples.state()), "odd": "here"}
    data = samples.saved(content, legacy=legacy)
    old = b"X\x04\x00\x00\x00here"
    records = [] if legacy else records_of(data)
    left_out = set()
    for name, piece in pickles.PIECES.items():
        (tmp_path / "net.pth").write_bytes(
            data.replace(old, piece)
            if legacy
            else zip_of([(n, c.replace(old, piece), m) for n, c, m in records])
        )
        try:
            found = checkpoint.read(tmp_path / "net.pth", limits=Limits(max_bytes=1 << 26)).tensors
        except CheckpointError as error:
            assert len(str(error)) < 1500, name  # noqa: PT017
        else:
            left_out.add(name)
            assert_same_bits(dict(found), samples.state())
        assert [p.name for p in tmp_path.iterdir()] == ["net.pth"], name
    assert left_out <= {"device", "counter"}


def test_the_laughs_would_be_endless():
    """The control: what is refused has, in a few hundred bytes, more values than can be visited."""
    value = ["x"]
    for _ in range(50):
        value = [value, value]
    with pytest.raises(CheckpointError, match="more than 100 values for each"):
        check_content(value, Limits(max_tensors=1000), lambda _: None, "it")
    value.append(value)
    with pytest.raises(CheckpointError, match=r"levels of nesting|values"):
        check_content(value, Limits(max_tensors=1000), lambda _: None, "it")
    check_content(value[0][0:0], Limits(), lambda _: None, "it")


def test_a_compressed_record_is_refused_and_the_same_stored_is_read(healthy, tmp_path):
    stored = records_of(healthy)
    (tmp_path / "net.pth").write_bytes(zip_of(stored))
    assert_same_bits(dict(checkpoint.read(tmp_path / "net.pth").tensors), samples.state())
    refused(
        tmp_path / "net.pth",
        zip_of([(n, c, zipfile.ZIP_DEFLATED if "data/0" in n else m) for n, c, m in stored]),
        r"compressed to .* could fill any memory",
    )


ARCHIVES = {
    "two records of one name": (
        lambda r: [*r, (r[0][0].replace("data.pkl", "DATA.PKL"), b"x", 0)],
        "two records called",
    ),
    "a record outside": (lambda r: [*r, ("../evil", b"x", 0)], "a record called '../evil'"),
    "an absolute record": (
        lambda r: [*r, ("/etc/passwd", b"x", 0)],
        "a record called '/etc/passwd'",
    ),
    "a record of another folder": (
        lambda r: [*r, ("other/data/0", b"x", 0)],
        "a record called 'other/data/0'",
    ),
    "a name with an escape": (
        lambda r: [*r, (r[0][0] + "\x1b[2J", b"x", 0)],
        r"a record called '.*\\x1b\[2J'",
    ),
    "no pickle": (lambda r: [row for row in r if "data.pkl" not in row[0]], "it has no data.pkl"),
    "a program": (
        lambda r: [*r, (r[0][0].replace("data.pkl", "constants.pkl"), b"x", 0)],
        "TorchScript archive, a program",
    ),
    "a storage cut short": (
        lambda r: [(n, c[:-4] if "/data/0" in n else c, m) for n, c, m in r],
        "declares .* bytes for storage '0', and has",
    ),
    "a storage that is not there": (
        lambda r: [row for row in r if not row[0].endswith("/data/0")],
        "declares .* bytes for storage '0', and has 0",
    ),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_out_of_order_is_refused(case, healthy, tmp_path):
    change, match = ARCHIVES[case]
    refused(tmp_path / "net.pth", zip_of(change(records_of(healthy))), match)


def test_overlapping_records_are_refused(healthy, tmp_path):
    """The directory's second entry points at the first record: one byte range, two names."""
    data = bytearray(healthy)
    start = struct.unpack("<L", data[-6:-2])[0]
    first = start
    second = (
        first
        + 46
        + struct.unpack("<H", data[first + 28 : first + 30])[0]
        + sum(struct.unpack("<2H", data[first + 30 : first + 34]))
    )
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    refused(
        tmp_path / "net.pth",
        bytes(data),
        "overlaps another, or is not where|not what its directory says",
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d + b"x",
        lambda d: b"x" + d[1:],
        lambda d: d[:-22] + d[-40:-22] + d[-22:],
        lambda d: d[:-3] + b"\x05\0\0",
    ],
)
def test_readers_that_could_find_another_directory_are_not_asked(change, healthy, tmp_path):
    refused(
        tmp_path / "net.pth",
        change(healthy),
        "damaged or truncated PyTorch zip archive|neither a PyTorch checkpoint",
    )


@pytest.mark.parametrize("bits", fast_only([(0, 5)], [(0, 5), (1, 2, 3, 4, 6, 7)]), ids=str)
def test_no_bit_of_the_directory_makes_readers_disagree(bits, healthy, tmp_path):
    """Its last entry and its end, bit by bit: refused, or read as torch reads it."""
    outcomes = set()
    for place in range(healthy.rindex(b"PK\x01\x02"), len(healthy)):
        for bit in bits:
            data = bytearray(healthy)
            data[place] ^= 1 << bit
            (tmp_path / "net.pth").write_bytes(data)
            outcomes.add(targets.open_one("pth zip", tmp_path))
    assert outcomes == {"exact", "refused"}


def test_limits_are_checked_and_their_flags_named(healthy, tmp_path):
    tensors = {f"t{i}": np.random.default_rng(i).random(1000, np.float32) for i in range(9)}
    write_safetensors(tmp_path / "net.safetensors", tensors, {"note": "n" * 5000})
    torch.save(
        {key: torch.from_numpy(value) for key, value in tensors.items()}, tmp_path / "net.pth"
    )
    torch.save(
        {"a": {"b": {"c": {"d": with_tensors(tensors)}}}, "e": with_tensors(tensors)},
        tmp_path / "deep.pth",
    )
    write_orbax(tmp_path / "net", tensors, {})
    for name in ("net.safetensors", "net.pth", "net"):
        with pytest.raises(CheckpointError, match=r"the limit is 20,000.*Limits\(max_bytes=\d+\)"):
            checkpoint.read(tmp_path / name, limits=Limits(max_bytes=20_000))
        with pytest.raises(CheckpointError, match=r"the limit is 8\..*Limits\(max_tensors=\d+\)"):
            checkpoint.read(tmp_path / name, limits=Limits(max_tensors=8))
        with pytest.raises(
            CheckpointError, match=r"the limit is 300\..*Limits\(max_header_bytes=\d+\)"
        ):
            checkpoint.read(tmp_path / name, limits=Limits(max_header_bytes=300))
    with pytest.raises(CheckpointError, match=r"the limit is 3\..*`Limits\(max_nesting=\d+\)"):
        checkpoint.read(tmp_path / "deep.pth", limits=Limits(max_nesting=3))
    with pytest.raises(InputError, match=r"`Limits\(max_bytes=0\)` must be positive"):
        Limits(max_bytes=0)


def test_one_storage_under_many_names_counts_every_time(tmp_path):
    """Nine kilobytes of a file as a hundred megabytes of tensors, by a stride of 0."""
    torch.save(
        {"conv1.weight": torch.rand(3).as_strided((3000, 10_000), (0, 0))}, tmp_path / "net.pth"
    )
    with pytest.raises(
        CheckpointError, match="120,000,000 bytes of tensors; the limit is 100,000,000"
    ):
        checkpoint.read(tmp_path / "net.pth", limits=Limits(max_bytes=10**8))


def st_file(header, data=b"", declared=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if declared is None else declared) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SAFETENSORS = {
    "an endless header": (
        st_file({"a": F32}, bytes(8), declared=2**63),
        "a header of 9,223,372,036,854,775,808",
    ),
    "a header beyond the limit": (
        st_file(b"{" + b" " * 2_000_000 + b"}"),
        "bytes of header; the limit is 1,048,576",
    ),
    "two tensors of one name": (
        st_file(b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
        "it has 'a' twice",
    ),
    "overlapping tensors": (
        st_file({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        "not a safetensors file",
    ),
    "offsets beyond the file": (
        st_file({"a": {**F32, "data_offsets": [0, 2**40]}}, bytes(8)),
        "not a safetensors file",
    ),
    "a hole": (
        st_file({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12)),
        "not a safetensors file",
    ),
    "a shape that overflows": (
        st_file({"a": {**F32, "shape": [2**62, 2**62]}}, bytes(8)),
        "not a safetensors file",
    ),
    "an empty tensor with an endless axis": (
        st_file({"a": {**F32, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}),
        "no array's|not a safetensors file",
    ),
    "a name that is no text": (
        st_file(b'{"\xff":%b}' % json.dumps(F32).encode(), bytes(8)),
        "not a safetensors file",
    ),
    "a name of half a character": (
        st_file({"\udc80": F32}, bytes(8)),
        "not a safetensors file|a tensor called",
    ),
    "a name that moves the cursor": (
        st_file({"a\x1b[2J": F32}, bytes(8)),
        r"a tensor called a\\x1b\[2J",
    ),
    "a name that reads backwards": (
        st_file({"a\u202eb": F32}, bytes(8)),
        r"a tensor called a\\u202eb",
    ),
    "a name without end": (st_file({"a" * 600: F32}, bytes(8)), "more than 512 of any kind"),
    "a nest": (st_file(b"[" * 100_000), "not a safetensors file"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused(case, tmp_path):
    data, match = SAFETENSORS[case]
    refused(tmp_path / "net.safetensors", data, match, max_bytes=1 << 26, max_header_bytes=1 << 20)


def test_a_pipe_and_a_device_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.pth")
    (tmp_path / "net.safetensors").symlink_to("/dev/zero")
    for name in ("net.pth", "net.safetensors"):
        with pytest.raises(CheckpointError, match="is no regular file"):
            checkpoint.read(tmp_path / name)


def test_links_are_followed_to_files_but_not_out_of_an_orbax_folder(tmp_path):
    """Caches of downloads consist of links; a link in an Orbax folder has no such reason."""
    write_safetensors(tmp_path / "blob", samples.state(), {})
    (tmp_path / "model.safetensors").symlink_to("blob")
    assert_same_bits(
        dict(checkpoint.read(tmp_path).tensors), dict(checkpoint.read(tmp_path / "blob").tensors)
    )
    write_orbax(tmp_path / "net", samples.state(), {})
    checkpoint.read(tmp_path / "net")
    (tmp_path / "net" / "state" / "extra").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="symbolic link that leads out"):
        checkpoint.read(tmp_path / "net")


def zarr_in(folder, shape, chunks, compressor=None):
    write_orbax(folder, samples.state(), {})
    (folder / "state" / "extra").mkdir()
    facts = {"shape": shape, "chunks": chunks, "dtype": "<f4", "compressor": compressor}
    facts |= {"filters": None, "order": "C", "zarr_format": 2, "fill_value": 0}
    (folder / "state" / "extra" / ".zarray").write_text(json.dumps(facts))


ORBAX = {
    "an array that is nothing but absent chunks": (
        ([2**40], [1024]),
        "bytes of tensors; the limit",
    ),
    "a chunk larger than its array": (([1], [2**40]), "bytes of tensors; the limit"),
    "a negative shape": (([-1], [1]), "has the shape"),
    "a codec that Orbax does not write": (([4], [4], {"id": "blosc"}), "with the codec blosc"),
}


@pytest.mark.parametrize("case", ORBAX)
def test_a_hostile_array_in_an_orbax_folder_is_refused(case, tmp_path):
    arguments, match = ORBAX[case]
    zarr_in(tmp_path / "net", *arguments)
    with pytest.raises(CheckpointError, match=match):
        checkpoint.read(tmp_path / "net", limits=Limits(max_bytes=1 << 26))


def test_what_a_zstd_frame_expands_to_is_known_without_expanding_it(tmp_path):
    """A frame of repeated blocks (RFC 8878): eight thousand blocks of four bytes are a gigabyte of
    zeros."""
    write_orbax(tmp_path / "net", samples.state(), {})
    header = b"\x28\xb5\x2f\xfd\x00\x58"
    block = (1 << 17 << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    (tmp_path / "net" / "state" / "d" / "chunk").write_bytes(
        header + block * 100 + (1 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    )
    checkpoint.read(tmp_path / "net", limits=Limits(max_bytes=1 << 26))
    (tmp_path / "net" / "state" / "d" / "chunk").write_bytes(header + block * 8192)
    with pytest.raises(
        CheckpointError,
        match=r"1,\d{3},\d{3},\d{3} bytes once its compressed data are expanded; the limit",
    ):
        checkpoint.read(tmp_path / "net", limits=Limits(max_bytes=1 << 26))


def test_a_compressed_data_file_expands_to_what_it_announces_only(tmp_path):
    bomb = gzip.compress(struct.pack(">2I", 0x801, 10) + bytes(5_000_000))
    (tmp_path / "labels.gz").write_bytes(bomb)
    with pytest.raises(InputError, match="has more than 18 bytes; its header announces 18"):
        read_idx(tmp_path / "labels.gz", 1)
    whole = gzip.compress(struct.pack(">2I", 0x801, 5_000_000) + bytes(5_000_000))
    (tmp_path / "labels.gz").write_bytes(whole)
    assert len(read_idx(tmp_path / "labels.gz", 1)) == 5_000_000
    with pytest.raises(InputError, match="its header announces 5,000,008"):
        read_idx(tmp_path / "labels.gz", 1, most=10**6)
    np.savez_compressed(tmp_path / "data.npz", images=np.zeros(3_000_000, np.uint8))
    assert read_npz(tmp_path / "data.npz")["images"].nbytes == 3_000_000
    with pytest.raises(InputError, match=r"expands to 3,000,\d+ bytes; at most 1,000,000"):
        read_npz(tmp_path / "data.npz", 10**6)


MEASURE = """
import resource, sys
from pathlib import Path
from flax_resblock import checkpoint
from flax_resblock.checkpoint import Limits, orbax_folder, torch_file

torch_file.import_torch()
orbax_folder._orbax()
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
before = peak()
try:
    record = checkpoint.read(sys.argv[1], limits=Limits(max_bytes=int(sys.argv[2])))
    checkpoint.digests(record.tensors)
    print("read", peak() - before)
except checkpoint.InputError as error:
    print("refused", peak() - before)
"""


def peak_of(path, limit):
    result = python("-c", MEASURE, str(path), str(limit), check=True, cwd=REPOSITORY)
    outcome, memory = result.stdout.split()
    return outcome, int(memory)


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.exists("/proc/self/status"), reason="needs Linux's /proc to measure memory"
)
@pytest.mark.parametrize("case", ["deflated", "legacy", "stride", "orbax", "healthy"])
def test_memory_stays_within_twice_the_limit_even_for_a_bomb(case, tmp_path, healthy):
    limit = 100_000_000
    path = tmp_path / "net.pth"
    if case == "deflated":
        records = [
            (n, bytes(4 * 10**8) if n.endswith("/data/0") else c, zipfile.ZIP_DEFLATED)
            for n, c, _ in records_of(healthy)
        ]
        path.write_bytes(zip_of(records))
        assert path.stat().st_size < 2_000_000
    elif case == "legacy":
        data = samples.saved({"a": torch.zeros(2)}, legacy=True)
        path.write_bytes(data.replace(b"K\x02Nt", b"J\xff\xff\xff\x7fNt"))
    elif case == "stride":
        torch.save({"conv1.weight": torch.rand(3).as_strided((30_000, 10_000), (0, 0))}, path)
    elif case == "orbax":
        path = tmp_path / "net"
        zarr_in(path, [2**30], [2**20])
    else:
        torch.save({"conv1.weight": torch.rand(24_000_000)}, path)
    outcome, memory = peak_of(path, limit)
    assert outcome == ("read" if case == "healthy" else "refused")
    assert memory < 2 * limit
    if case == "healthy":
        assert memory > 50_000_000, "the measure sees what is read"


def test_a_configuration_of_an_endless_network_is_refused():
    with pytest.raises(ValueError, match="more than 10,000 blocks"):
        ResNetConfig(depths=(10**9,), widths=(4,))
    with pytest.raises(ValueError, match="block 'x' is unknown"):
        ResNetConfig(block="x", depths=(1,), widths=(4,))
