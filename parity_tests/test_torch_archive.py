"""Files of torch.save, read without torch: in value, type, shape and bits what torch makes."""

import argparse
import collections
import io
import math
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_resblock import CheckpointError, checkpoint
from flax_resblock.checkpoint import LIMITS, Limits, torch_archive, torch_file
from flax_resblock.checkpoint.torch_file import plain
from parity_tests.fuzz import samples
from parity_tests.support import SHARED, needs_real_checkpoints, same

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.complex64, torch.complex128),
)


def tensor_of(dtype, shape, view, seed):
    """Random bits, as one of the views that a state dict can hold."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    raw = torch.randint(
        0,
        2 if dtype == torch.bool else 256,
        (count * dtype.itemsize + 64 * dtype.itemsize,),
        generator=generator,
        dtype=torch.uint8,
    )
    flat = raw.view(dtype)
    whole = (
        flat[5 : 5 + count].view(shape) if view == "offset" else flat[:count].clone().view(shape)
    )
    if view == "transposed":
        return whole.transpose(0, -1) if shape else whole
    if view == "channels last" and len(shape) == 4:
        return whole.contiguous(memory_format=torch.channels_last)
    if view == "every other" and shape:
        return whole[::2]
    if view == "expanded":
        return whole[None].expand(3, *shape)
    return (
        torch.nn.Parameter(whole, requires_grad=dtype.is_floating_point)
        if view == "parameter"
        else whole
    )


tensors = st.builds(
    tensor_of,
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 4), max_size=5).map(tuple),
    st.sampled_from(
        ["whole", "offset", "transposed", "channels last", "every other", "expanded", "parameter"]
    ),
    st.integers(0, 2**31),
)
numbers = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=9),
    st.binary(min_size=1, max_size=9),
)
oddities = st.one_of(
    st.builds(np.float64, st.floats()),
    st.builds(np.float32, st.floats(width=32)),
    st.builds(np.int64, st.integers(-(2**63), 2**63 - 1)),
    st.builds(np.bool_, st.booleans()),
    st.builds(
        collections.Counter, st.dictionaries(st.integers(0, 99), st.integers(0, 9), max_size=3)
    ),
    st.sets(st.one_of(st.integers(), st.text(max_size=3)), max_size=3),
    st.lists(st.integers(0, 9), max_size=4).map(torch.Size),
    st.dictionaries(st.sampled_from("abc"), st.integers(), max_size=3).map(
        lambda values: argparse.Namespace(**values)
    ),
)
keys = st.one_of(
    st.text(max_size=5),
    st.integers(-5, 300),
    st.booleans(),
    st.tuples(st.integers(), st.text(max_size=2)),
)
contents = st.recursive(
    st.one_of(tensors, numbers, oddities),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=3).map(collections.OrderedDict),
    ),
    max_leaves=12,
)


def theirs(path):
    with torch.serialization.safe_globals(torch_file._harmless(torch)):
        return plain(torch.load(path, map_location="cpu", weights_only=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("archive") / "net.pth"


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=contents, legacy=st.booleans())
def test_whatever_a_checkpoint_holds_is_what_torch_load_makes_of_it(content, legacy, place):
    place.write_bytes(samples.saved({"it": content, "again": content}, legacy=legacy))
    found = torch_archive.read_archive(place, LIMITS)
    assert found.foreign is None
    assert same(plain(found.content), theirs(place))


def test_a_difference_is_seen(place):
    """The negative control: one bit, one type, one key."""
    place.write_bytes(samples.saved({"a": torch.arange(3.0), "b": (1, [2.0])}))
    found = torch_archive.read_archive(place, LIMITS).content
    assert same(found, theirs(place))
    for change in (
        {"a": torch.tensor([0.0, 1.0, np.nextafter(np.float32(2), np.float32(3))])},
        {"a": torch.arange(3.0, dtype=torch.float64)},
        {"a": torch.arange(3.0)[None]},
        {"b": (1, [2])},
        {"b": [1, [2.0]]},
        {"b": (True, [2.0])},
    ):
        assert not same(found, plain({"a": torch.arange(3.0), "b": (1, [2.0])} | change))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_training_checkpoint_needs_no_torch(legacy, place):
    content = samples.training() | {
        "args": argparse.Namespace(lr=0.1, milestones=[1, 2]),
        "best": np.float64(0.91),
        "torch": torch.torch_version.TorchVersion("2.1"),
    }
    place.write_bytes(samples.saved(content, legacy=legacy))
    found = torch_archive.read_archive(place, LIMITS)
    assert found.foreign is None
    expected = theirs(place)
    expected["torch"] = str(expected["torch"])
    assert same(plain(found.content), expected)


FOREIGN = {
    "a device": lambda: torch.device("cuda:1"),
    "a dtype": lambda: torch.float16,
    "a memory layout": lambda: torch.strided,
    "a complex number": lambda: 1 + 2j,
    "a sparse tensor": lambda: torch.eye(3).to_sparse(),
    "a quantised tensor": lambda: torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
    "a meta tensor": lambda: torch.empty(3, device="meta"),
    "a conjugate view": lambda: torch.randn(3, dtype=torch.complex64).conj(),
    "a tensor of float8": lambda: torch.randn(3).to(torch.float8_e4m3fn),
    "a storage": lambda: torch.arange(3.0).untyped_storage(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", FOREIGN)
def test_what_only_pytorch_can_make_is_left_to_it(what, place):
    """Beside healthy weights, which are read all the same; and the rest is what it was."""
    value = FOREIGN[what]()
    place.write_bytes(samples.saved({"state_dict": {"weight": torch.arange(3.0)}, "odd": [value]}))
    assert torch_archive.read_archive(place, LIMITS).foreign
    assert torch_file.read_torch(place).tensors["weight"].tolist() == [0, 1, 2]
    loaded = torch_file.load_torch(place)["odd"][0]
    expected = torch.load(place, weights_only=True)["odd"][0]
    assert type(loaded) is type(expected)
    if isinstance(value, torch.Tensor):
        assert loaded.dtype == value.dtype
        assert loaded.layout == value.layout


@pytest.mark.parametrize("what", ["a sparse tensor", "a quantised tensor", "a meta tensor"])
@pytest.mark.filterwarnings("ignore")
def test_among_the_weights_it_is_refused_by_name(what, place):
    place.write_bytes(samples.saved({"conv1.weight": torch.ones(3), "odd": FOREIGN[what]()}))
    kind = {
        "a sparse tensor": "sparse",
        "a quantised tensor": "quantised",
        "a meta tensor": r"empty \(meta\)",
    }[what]
    with pytest.raises(CheckpointError, match=f"odd is a {kind} tensor"):
        torch_file.read_torch(place)


def repacked(data, change=lambda name, content: content, folder="archive"):
    """The same records, one directly after the other: not where they should lie."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as other:
        for info in archive.infolist():
            other.writestr(
                zipfile.ZipInfo(f"{folder}/{info.filename.partition('/')[2]}"),
                change(info.filename, archive.read(info)),
            )
    return buffer.getvalue()


@pytest.mark.parametrize("folder", ["a", "ab", "abc"])
def test_records_may_lie_anywhere(folder, place):
    content = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3, dtype=torch.float64),
        "c": torch.arange(9)[::2],
    }
    place.write_bytes(repacked(samples.saved(content), folder=folder))
    found = torch_archive.read_archive(place, LIMITS).content
    assert all(array.flags.aligned for array in found.values())
    assert same(found, theirs(place))


def test_another_byte_order_is_left_to_pytorch(place):
    data = samples.saved({"state_dict": {"a": torch.randn(5)}})
    swapped = repacked(
        data, lambda name, content: b"big" if name.endswith("byteorder") else content
    )
    place.write_bytes(swapped)
    assert "byte order" in (torch_archive.read_archive(place, LIMITS).foreign or "")
    place.write_bytes(data)
    right = np.array(checkpoint.read(place).tensors["a"])
    place.write_bytes(swapped)
    assert checkpoint.read(place).tensors["a"].tobytes() == right.byteswap().tobytes()


def test_an_alignment_that_is_no_number_is_refused_as_by_pytorch(place):
    data = samples.saved({"state_dict": {"a": torch.randn(5)}})
    place.write_bytes(
        repacked(data, lambda name, content: b"6<" if name.endswith("alignment") else content)
    )
    with pytest.raises(ValueError, match="6<"):
        torch.load(place)
    with pytest.raises(CheckpointError, match="6<"):
        checkpoint.read(place)
    place.write_bytes(
        repacked(data, lambda name, content: b"32" if name.endswith("alignment") else content)
    )
    assert set(checkpoint.read(place).tensors) == {"a"}


def test_tensors_that_share_memory_share_it(place):
    base = torch.randn(6)
    place.write_bytes(samples.saved({"a": base, "b": base[2:], "c": base.view(2, 3).T}))
    found = torch_archive.read_archive(place, LIMITS).content
    assert np.shares_memory(found["a"], found["b"])
    assert np.shares_memory(found["a"], found["c"])
    assert not any(array.flags.writeable for array in found.values())


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_cut_short_anywhere_is_refused(legacy, place):
    data = samples.saved({"a": torch.randn(5, 7), "b": [1, "two"]}, legacy=legacy)
    for length in [*range(2, len(data) - 1, 37), len(data) - 1]:
        place.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            torch_archive.read_archive(place, LIMITS)


def test_the_same_memory_under_many_names_is_copied_once(place):
    """Ten thousand tensors in one record that lies as it should not: one copy, not ten thousand."""
    base = torch.randn(100_000)
    place.write_bytes(repacked(samples.saved({f"t{i}": base[i:] for i in range(500)}), folder="ab"))
    found = torch_archive.read_archive(place, Limits()).content
    memories = set()
    for array in found.values():
        while array.base is not None:
            array = array.base
        memories.add(id(array))
    assert len(memories) == 1


@needs_real_checkpoints
@pytest.mark.parametrize("path", sorted(SHARED.glob("*.th")), ids=lambda path: path.name)
def test_real_checkpoints_are_what_torch_load_makes_of_them(path):
    found = torch_archive.read_archive(path, LIMITS)
    assert found.foreign is None
    assert same(plain(found.content), theirs(path))
