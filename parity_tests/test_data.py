"""Data are read as they were written, here byte by byte, and every fault is one clear refusal."""

from __future__ import annotations

import contextlib
import gzip
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flax_resblock.errors import InputError
from flax_resblock.training.data import FolderDataset, digits, open_data
from flax_resblock.training.data.cifar_pickle import read_cifar_pickle
from flax_resblock.training.data.images import damage, decode
from parity_tests.support import import_torchvision

FASHION = Path("/usr/share/datasets/fashion-mnist")
RNG = np.random.default_rng(7)


def idx(array: np.ndarray, magic: int | None = None) -> bytes:
    return (
        struct.pack(
            f">I{array.ndim}I", 0x0800 | array.ndim if magic is None else magic, *array.shape
        )
        + array.tobytes()
    )


def idx_files(train: int = 11, test: int = 4) -> dict[str, np.ndarray]:
    return {
        "train-images-idx3-ubyte": RNG.integers(0, 256, (train, 5, 7), dtype=np.uint8),
        "train-labels-idx1-ubyte": (np.arange(train) % 4).astype(np.uint8),
        "t10k-images-idx3-ubyte": RNG.integers(0, 256, (test, 5, 7), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": (np.arange(test)[::-1] % 4).astype(np.uint8),
    }


def write_idx(folder: Path, files: dict[str, np.ndarray], compressed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in files.items():
        (folder / (name + ".gz" * compressed)).write_bytes(
            gzip.compress(idx(array)) if compressed else idx(array)
        )
    return folder


def python2_pickle(content: dict[str, object]) -> bytes:
    """What Python 2's cPickle wrote for strings, lists of integers or strings, and one array."""

    def string(value: bytes) -> bytes:
        return (
            b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
        ) + value

    def one(value: object) -> bytes:
        if isinstance(value, np.ndarray):
            made = (
                b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01btR(K\x01"
            )
            shape = b"".join(b"M" + struct.pack("<H", n) for n in value.shape)
            none = b"J\xff\xff\xff\xff"
            dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + 2 * none + b"K\x00tb"
            return made + b"(" + shape + b"t" + dtype + b"\x89" + string(value.tobytes()) + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(one(entry) for entry in value) + b"e"
        return b"K" + bytes([value]) if isinstance(value, int) else string(str(value).encode())

    return (
        b"\x80\x02}("
        + b"".join(string(key.encode()) + one(value) for key, value in content.items())
        + b"u."
    )


def cifar(folder: Path, kind: str, per_file: int = 3) -> dict[str, tuple[np.ndarray, list[int]]]:
    """Writes a CIFAR folder; the planes ``(N, 3, 32, 32)`` and labels of each part."""
    hundred, binary = kind.startswith("cifar-100"), kind.endswith(("bin", "binary"))
    suffix = ".bin" if binary else ""
    train = ["train"] if hundred else [f"data_batch_{i}" for i in range(1, 6)]
    names = [f"class_{i}" for i in range(100 if hundred else 10)]
    written: dict[str, tuple[np.ndarray, list[int]]] = {}
    (folder / kind).mkdir(parents=True)
    for name in [*train, "test" if hundred else "test_batch"]:
        planes = RNG.integers(0, 256, (per_file, 3, 32, 32), dtype=np.uint8)
        labels = RNG.integers(0, len(names), per_file).tolist()
        coarse = [label // 5 for label in labels]
        if binary:
            heads = [
                bytes([c, f]) if hundred else bytes([f])
                for c, f in zip(coarse, labels, strict=True)
            ]
            data = b"".join(
                head + image.tobytes() for head, image in zip(heads, planes, strict=True)
            )
        else:
            by_name = (
                {"fine_labels": labels, "coarse_labels": coarse} if hundred else {"labels": labels}
            )
            data = python2_pickle(
                {
                    "data": planes.reshape(per_file, -1),
                    "batch_label": name,
                    **by_name,
                    "filenames": [f"{i}.png" for i in range(per_file)],
                }
            )
        (folder / kind / (name + suffix)).write_bytes(data)
        part = "test" if name.startswith("test") else "train"
        before = written.get(part, (planes[:0], []))
        written[part] = (np.concatenate([before[0], planes]), before[1] + labels)
    if binary:
        (folder / kind / ("fine_label_names.txt" if hundred else "batches.meta.txt")).write_text(
            "\n".join(names) + "\n\n"
        )
    else:
        (folder / kind / ("meta" if hundred else "batches.meta")).write_bytes(
            python2_pickle({"fine_label_names" if hundred else "label_names": names})
        )
    return written


def image_files(
    root: Path, parts: dict[str, dict[str, int]], held_out: str = "val"
) -> dict[str, np.ndarray]:
    """Writes PNG files, below each class in a further folder too; path below ``root`` -> pixels."""
    written = {}
    for part, classes in parts.items():
        for name, count in classes.items():
            for i in range(count):
                file = (
                    root
                    / (held_out if part == "test" else part)
                    / name
                    / ("deeper" if i % 2 else "")
                    / f"{i}.PNG"
                )
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = RNG.integers(0, 256, (9 + i, 13 - i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file, "PNG")
                written[file.relative_to(root).as_posix()] = pixels
    return written


@pytest.mark.parametrize("compressed", [False, True])
def test_an_idx_folder_is_read_as_written(tmp_path, compressed):
    files = idx_files()
    train, test = open_data(write_idx(tmp_path / "things", files, compressed))
    expected = ("things/train", "things/test", 4, (5, 7, 1))
    assert (train.name, test.name, train.num_classes, train.shape) == expected
    for part, stem in ((train, "train"), (test, "t10k")):
        assert np.array_equal(part.fitted()[..., 0], files[f"{stem}-images-idx3-ubyte"])
        assert np.array_equal(part.labels, files[f"{stem}-labels-idx1-ubyte"])
    pixels = files["train-images-idx3-ubyte"] / 1.0
    assert np.allclose([*train.mean, *train.std], [pixels.mean(), pixels.std()], rtol=1e-12)
    assert (test.mean, test.std) == (train.mean, train.std)


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_fashion_mnist_is_read():
    train, test = open_data(FASHION)
    expected = ((0, 28, 28, 1), 60000, 10000, 10)
    assert (train.fitted(slice(0)).shape, len(train), len(test), train.num_classes) == expected
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert test.labels[:4].tolist() == [9, 2, 1, 1]
    # the figures that everyone uses
    assert np.allclose([train.mean[0] / 255, train.std[0] / 255], [0.2860, 0.3530], atol=1e-4)


@pytest.mark.parametrize(
    "kind", ["cifar-10-batches-bin", "cifar-10-batches-py", "cifar-100-binary", "cifar-100-python"]
)
def test_cifar_is_read_as_written(tmp_path, kind):
    written = cifar(tmp_path, kind)
    for place in (tmp_path, tmp_path / kind):
        for part, name in zip(open_data(place), ("train", "test"), strict=True):
            planes, labels = written[name]
            assert np.array_equal(part.fitted(), planes.transpose(0, 2, 3, 1))
            assert part.labels.tolist() == labels
            assert part.class_names is not None
            assert (part.class_names[3], len(part.class_names)) == ("class_3", part.num_classes)
            pixels = written["train"][0] / 1.0
            assert np.allclose(
                [part.mean, part.std],
                [pixels.mean(axis=(0, 2, 3)), pixels.std(axis=(0, 2, 3))],
                rtol=1e-12,
            )


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_pickled_again_by_python_3_is_read(tmp_path, protocol):
    written = cifar(tmp_path, "cifar-10-batches-py")
    for file in (tmp_path / "cifar-10-batches-py").iterdir():
        file.write_bytes(pickle.dumps(pickle.loads(file.read_bytes(), encoding="bytes"), protocol))
    assert np.array_equal(
        open_data(tmp_path).train.fitted(), written["train"][0].transpose(0, 2, 3, 1)
    )


EMPTY_ARRAY = b"\x80\x02}(U\x01acnumpy.core.multiarray\n_reconstruct\n)R(K\x01"
MALICE = {
    "a call": b"cposix\nsystem\n(S'touch CANARY'\ntR.",
    "a call inside the dictionary": b"}(U\x04datacposix\nsystem\n(S'touch CANARY'\ntRu.",
    "a gigantic memo": b"\x80\x02}r\xff\xff\xff\x7f.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"(iposix\nsystem\n.",
    "a built-in": b"\x80\x02cbuiltins\neval\nX\x02\x00\x00\x001+\x85R.",
    "another function of an allowed module": b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
    "an attribute of an allowed name": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__base__\x93.",
    "a change of a reconstructor": b"\x80\x02}(U\x01acnumpy\ndtype\n}(U\x05_makeK\x01ubu.",
    "tuples hashed without end": b"\x80\x02})q\x01" + 60 * b"h\x01\x86q\x01" + b"K\x01s.",
    "a text encoded ten thousand times": b"\x80\x02}(U\x01aX\x00\x00\x01\x00"
    + b"x" * 65536
    + b"q\x01U\x01b]("
    + 3 * b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R"
    + b"eu.",
    "an array of objects": EMPTY_ARRAY + b"K\x01\x85cnumpy\ndtype\n(U\x01OtR\x89U\x01atbu.",
    "an array larger than its bytes": EMPTY_ARRAY
    + b"K\x63\x85cnumpy\ndtype\n(U\x02u1tR\x89U\x01atbu.",
}


@pytest.mark.parametrize("what", MALICE)
def test_a_pickle_that_is_no_plain_data_is_refused_and_not_run(tmp_path, what):
    canary = tmp_path / "canary"
    data = MALICE[what].replace(b"CANARY", str(canary).encode())
    with pytest.raises(
        InputError,
        match=(
            r"data_batch_1 cannot be read as plain data: it (asks for|gives a "
            r"state|holds|keeps|has|calls)"
        ),
    ):
        read_cifar_pickle(data, "data_batch_1")
    assert not canary.exists()
    if b"touch" in data:
        pickle.loads(data, encoding="bytes")  # the file does run where nothing stops it
        assert canary.exists()


@settings(max_examples=150)
@given(st.integers(0, 300), st.integers(0, 255), st.booleans())
def test_a_damaged_pickle_is_read_or_refused_and_nothing_else(position, byte, cut):
    data = bytearray(
        python2_pickle(
            {
                "data": np.arange(12, dtype=np.uint8).reshape(2, 6),
                "labels": [3, 9],
                "filenames": ["a", "b"],
            }
        )
    )
    data[position % len(data)] = byte
    # any other error, and a crash, fails the test
    with contextlib.suppress(InputError):
        assert isinstance(
            read_cifar_pickle(bytes(data[: position + 1] if cut else data), "file"), dict
        )


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_an_archive_is_read_as_written(tmp_path, names):
    arrays = [
        RNG.random((6, 4, 5, 2)),
        np.arange(6)[:, None] % 3,
        RNG.random((2, 4, 5, 2)),
        np.array([[2], [0]]),
    ]
    np.savez(tmp_path / "a.npz", **dict(zip(names, arrays, strict=True)))
    train, test = open_data(tmp_path / "a.npz")
    assert np.array_equal(train.fitted(), arrays[0])
    assert np.array_equal(test.fitted(), arrays[2])
    expected = ([0, 1, 2, 0, 1, 2], [2, 0], 3, ())
    assert (train.labels.tolist(), test.labels.tolist(), train.num_classes, train.notes) == expected
    assert np.allclose(
        [train.mean, train.std],
        [arrays[0].mean(axis=(0, 1, 2)), arrays[0].std(axis=(0, 1, 2))],
        rtol=1e-12,
    )


def test_an_archive_without_test_images_is_split_in_proportion_and_says_so(tmp_path):
    images, labels = RNG.integers(0, 256, (50, 4, 3), dtype=np.uint8), np.arange(50) % 2
    np.savez(
        tmp_path / "a.npz",
        images=images,
        labels=labels,
        mean=np.float32([0.5]),
        std=np.float32([0.25]),
    )
    train, test = open_data(tmp_path / "a.npz")
    expected = ([20, 20], [5, 5])
    assert (np.bincount(train.labels).tolist(), np.bincount(test.labels).tolist()) == expected
    assert {image.tobytes() for part in (train, test) for image in part.fitted()} == {
        image.tobytes() for image in images
    }
    assert train.notes == (
        "a.npz has no test images of its own: 20% of the images of each class, 10 in all, "
        "are set aside.",
    )
    # given for pixels from 0 to 1, as `flax-resblock predict` takes them
    assert (train.mean, train.std) == ((127.5,), (63.75,))


@pytest.mark.parametrize("held_out", ["val", "test"])
def test_an_image_folder_is_read_in_torchvisions_order(tmp_path, held_out):
    written = image_files(
        tmp_path, {"train": {"b": 3, "a": 4, "c": 1}, "test": {"c": 2, "a": 1}}, held_out
    )
    train, test = open_data(tmp_path, image_size=8)
    assert isinstance(train, FolderDataset)
    assert isinstance(test, FolderDataset)
    expected = (("a", "b", "c"), 3, (8, 8, 3), 8, 3)
    assert (train.class_names, train.num_classes, train.shape, len(train), len(test)) == expected
    assert test.labels.tolist() == [0, 2, 2]
    for part in (train, test):
        for i, file in enumerate(part.files):
            assert np.array_equal(part.raw(i), written[Path(file).relative_to(tmp_path).as_posix()])
    assert (train.notes, test.notes) == ((), ())
    assert np.allclose(train.mean, np.multiply(255, (0.485, 0.456, 0.406)))
    assert train.normalised(np.array([5, 0])).shape == (2, 8, 8, 3)
    import_torchvision()
    from torchvision.datasets import ImageFolder

    theirs = ImageFolder(str(tmp_path / "train"))
    assert list(zip(train.files, train.labels.tolist(), strict=True)) == theirs.samples


def damage_some(root: Path) -> None:
    image_files(root, {"train": {"a": 3, "b": 3}, "test": {"a": 1, "b": 1}})
    file = root / "train/b/0.PNG"
    file.write_bytes(file.read_bytes()[:-30])
    (root / "train/a/page.jpg").write_text("<html>not found</html>")
    (root / "train/a/list.txt").write_text("0.PNG")
    (root / "train/a/.DS_Store").write_text("")


def test_damaged_images_are_left_out_and_counted_or_refused(tmp_path):
    damage_some(tmp_path)
    seen: list[str] = []
    train, test = open_data(tmp_path, on_progress=seen.append)
    name = tmp_path.name
    assert (len(train), train.labels.tolist(), len(test), test.notes) == (5, [0, 0, 0, 1, 1], 2, ())
    assert (
        train.notes[0] == f"{name}/train: files left out because they are no JPEG or PNG: 1 (.txt)."
    )
    assert train.notes[1].startswith(
        f"{name}/train: 2 of 7 images cannot be decoded and are left out: train/a/page.jpg (no "
        f"format that can be recognised), "
    )
    assert "train/b/0.PNG (" in train.notes[1]
    assert seen == [f"{name}/train: 7 of 7 images checked", f"{name}/val: 2 of 2 images checked"]
    refused = (
        r"/train: 2 of 7 images cannot be decoded: train/a/page\.jpg \(no format.*Remove or "
        "replace them, or read without strict"
    )
    with pytest.raises(InputError, match=refused):
        open_data(tmp_path, strict=True)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["JPEG", "PNG"]), st.booleans())
def test_the_quick_check_finds_exactly_what_decoding_finds(
    tmp_path_factory, position, byte, kind, cut
):
    file = tmp_path_factory.getbasetemp() / f"check.{kind}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 51, 3), dtype=np.uint8)).save(
        file, kind
    )
    data = bytearray(file.read_bytes())
    data[position % len(data)] = byte
    file.write_bytes(data[: position % len(data)] if cut else data)
    found = damage(str(file))
    with (
        contextlib.nullcontext()
        if found is None
        else pytest.raises(InputError, match=re.escape(found))
    ):
        decode(str(file))


def save(**arrays: object):
    return lambda root: np.savez(root / "a.npz", **arrays)  # type: ignore[arg-type]


IMAGES, LABELS = np.zeros((5, 4, 4), np.uint8), np.arange(5)


def idx_with(**changes: bytes | None):
    def build(root: Path) -> None:
        write_idx(root, idx_files())
        for name, data in changes.items():
            file = next(root.glob(name.replace("_", "-") + "*"))
            file.unlink() if data is None else file.write_bytes(data)

    return build


def cifar_with(kind: str, name: str, change):
    def build(root: Path) -> None:
        cifar(root, kind)
        file = root / kind / name
        file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))

    return build


def folder_with(**parts: dict[str, int]):
    return lambda root: image_files(root, parts)


def empty_class(root: Path) -> None:
    image_files(root, {"train": {"a": 1}, "test": {"a": 1}})
    (root / "train/b").mkdir()


REFUSED = {
    "nothing there": (
        lambda root: None,
        r"missing does not exist\. Data are 'digits'; an IDX folder .*cifar-10.*npz.*train/CLASS",
        "missing",
    ),
    "an empty folder": (
        lambda root: None,
        r"holds no data of a known kind; it has nothing\. Looked for 'digits'; an IDX folder",
    ),
    "a packed archive": (
        lambda root: (root / "c.tar.gz").write_bytes(b"\x1f\x8b"),
        r"Unpack it first: tar xf c\.tar\.gz\.",
        "c.tar.gz",
    ),
    "an IDX file missing": (
        idx_with(t10k_labels=None),
        r"is an IDX folder without t10k-labels-idx1-ubyte",
    ),
    "an IDX file with another magic": (
        idx_with(train_images=idx(IMAGES[0])),
        r"train-images-idx3-ubyte begins with 0x00000802; .* begins with 0x00000803",
    ),
    "an IDX file cut off": (
        idx_with(train_images=idx(IMAGES)[:-1]),
        r"has 95 bytes; its header announces 96, an array \(5, 4, 4\)",
    ),
    "an IDX file cut off in its header": (
        idx_with(train_images=idx(IMAGES)[:9]),
        "has 9 bytes; its header alone takes 16",
    ),
    "a huge IDX header": (
        idx_with(train_images=struct.pack(">I3I", 0x803, *[2**32 - 1] * 3)),
        "has 16 bytes; its header announces",
    ),
    "compression cut off": (
        idx_with(train_images=gzip.compress(idx(IMAGES))[:-9]),
        r"cannot be read \(.*It may be cut off or damaged",
    ),
    "IDX labels for other images": (
        idx_with(train_labels=idx(np.zeros(9, np.uint8))),
        r"has 11 images, but .*train-labels-idx1-ubyte has 9 labels",
    ),
    "IDX images without pixels": (
        idx_with(train_images=idx(np.zeros((11, 0, 3), np.uint8))),
        r"has no pixels: its header says \(11, 0, 3\)",
    ),
    "IDX test labels out of range": (
        idx_with(t10k_labels=idx(np.uint8([1, 2, 3, 200]))),
        r"/test: labels reach from 1 to 200; with 4 classes, 0 to 3",
    ),
    "IDX test images of another size": (
        idx_with(t10k_images=idx(np.zeros((4, 6, 7), np.uint8))),
        "5x7 pixels in 1 channel and .*/test of 6x7 pixels",
    ),
    "a CIFAR file missing": (
        cifar_with("cifar-10-batches-bin", "data_batch_3.bin", None),
        r"is cifar-10 without data_batch_3\.bin",
    ),
    "a CIFAR file cut off": (
        cifar_with("cifar-10-batches-bin", "data_batch_1.bin", lambda d: d[:-5]),
        r"has 9,214 bytes; .* a multiple of 3,073",
    ),
    "a CIFAR label out of range": (
        cifar_with("cifar-100-binary", "train.bin", lambda d: d[:1] + b"\xc8" + d[2:]),
        "image 0 of train.bin has label 200",
    ),
    "CIFAR class names of another data set": (
        cifar_with("cifar-10-batches-bin", "batches.meta.txt", lambda d: b"a b"),
        "does not name the 10 classes",
    ),
    "a CIFAR pickle with other data": (
        cifar_with("cifar-10-batches-py", "test_batch", lambda d: python2_pickle({"labels": [1]})),
        r"test_batch: 'data' is NoneType; cifar-10 has an array \(N, 3072\)",
    ),
    "a CIFAR pickle with too few labels": (
        cifar_with(
            "cifar-10-batches-py",
            "test_batch",
            lambda d: python2_pickle({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}),
        ),
        r"test_batch: 'labels' is 1 entries; expected a list of 2 whole numbers",
    ),
    "two CIFARs": (
        lambda root: (cifar(root, "cifar-10-batches-bin"), cifar(root, "cifar-100-python")),
        "cifar-10-batches-bin, cifar-100-python. Say which",
    ),
    "no archive": (
        lambda root: (root / "a.npz").write_bytes(b"PK"),
        r"a\.npz is not an \.npz archive of plain arrays",
        "a.npz",
    ),
    "an archive with objects": (
        save(images=np.array([{}, 1]), labels=LABELS),
        r"is not an \.npz archive of plain arrays \(Object arrays cannot",
        "a.npz",
    ),
    "an archive with other names": (
        save(x=IMAGES),
        r"has the arrays x; expected one of these sets: x_train, y_train",
        "a.npz",
    ),
    "an archive of other shapes": (
        save(images=IMAGES, labels=LABELS[:4]),
        r"images is uint8 \(5, 4, 4\) and labels is int64 \(4,\); expected",
        "a.npz",
    ),
    "an archive with negative labels": (
        save(images=IMAGES, labels=LABELS - 1),
        r"labels reaches from -1 to 3; labels count",
        "a.npz",
    ),
    "an archive with one image": (
        save(images=IMAGES[:1], labels=LABELS[:1]),
        "has 1 image; at least one training and one test image",
        "a.npz",
    ),
    "an archive with NaN": (
        save(images=np.full((5, 4, 4), np.nan), labels=LABELS),
        "images holds NaN or infinities",
        "a.npz",
    ),
    "an archive with a mean in words": (
        save(images=IMAGES, labels=LABELS, mean=np.array("a"), std=np.array("b")),
        "must be numbers, one per channel",
        "a.npz",
    ),
    "an image folder without test images": (
        folder_with(train={"a": 1}),
        r"no test images below val/ or test/",
    ),
    "a class that training lacks": (
        folder_with(train={"a": 1, "b": 1}, test={"A": 1}),
        r"val has A, which .*train does not; it has a, b",
    ),
    "an empty class": (
        empty_class,
        r"train has no image \(\.jpg, \.jpeg, \.png\) for b\. Add images, or remove the folder\.",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what, tmp_path):
    build, message, *place = REFUSED[what]
    build(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        open_data(tmp_path.joinpath(*place))
    assert "\n" not in str(caught.value)


def test_a_class_of_damaged_images_alone_is_refused(tmp_path):
    image_files(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1}})
    (tmp_path / "train/b/0.PNG").write_bytes(b"\x89PNG")
    with pytest.raises(InputError, match="train has no image that can be decoded for b"):
        open_data(tmp_path)


def test_digits_are_the_embedded_default_and_keep_their_size():
    train, test = open_data("digits")
    assert np.array_equal(train.fitted(), digits().train.images)
    assert open_data("digits", image_size=8).test.shape == test.shape == (8, 8, 1)
    with pytest.raises(
        InputError,
        match="image_size=32 is for image folders; digits/train has images of 8x8 pixels in 1",
    ):
        open_data("digits", image_size=32)
    with pytest.raises(InputError, match="image_size=0 must be a positive"):
        open_data("digits", image_size=0)


def test_an_image_damaged_after_opening_is_refused_by_name(tmp_path):
    image_files(tmp_path, {"train": {"a": 2}, "test": {"a": 1}})
    train = open_data(tmp_path).train
    (tmp_path / "train/a/0.PNG").unlink()
    with pytest.raises(
        InputError,
        match=r"train/a/0\.PNG cannot be decoded \(.*Remove or replace it, and start again",
    ):
        train.normalised()


def test_files_must_fit_their_labels():
    with pytest.raises(
        InputError, match=r"tiny: 2 files and int64 labels \(3,\); expected an integer for each"
    ):
        FolderDataset(
            name="tiny", files=("a", "b"), labels=np.zeros(3, np.int64), class_names=("a",)
        )
    with pytest.raises(InputError, match="tiny: labels reach from 0 to 1; with 1 classes, 0 to 0"):
        FolderDataset(name="tiny", files=("a", "b"), labels=np.arange(2), class_names=("a",))
