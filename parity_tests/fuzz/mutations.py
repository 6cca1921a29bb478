"""Valid files changed with knowledge of their formats.

Every choice is taken from a generator, which hypothesis draws from the bytes it is given."""

from __future__ import annotations

import gzip
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from flax_resblock.config import to_json
from parity_tests.fuzz import pickles, samples
from parity_tests.fuzz.samples import Files, saved, training
from parity_tests.support import SMALL

NUMBERS = pickles.NUMBERS
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**64, 1e308, float("nan"), float("inf")),
    *("", "\x1b[31m", "\u202e", "../../x", "/etc/passwd", [], {}, [[]], "F32"),
)


def some_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bits, numbers and stretches changed, moved, repeated or cut off, half of them near an end."""
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        length = len(changed)
        edge = rng.random()
        place = (
            rng.randrange(min(length, 400))
            if edge < 0.4
            else length - 1 - rng.randrange(min(length, 400))
            if edge < 0.6
            else rng.randrange(length)
        )
        how = rng.randrange(8)
        if how <= 1:
            changed[place] ^= 1 << rng.randrange(8)
        elif how == 2:
            changed[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 0x1B, 0x5B, 0x7B))
        elif how == 3:
            code = rng.choice(("<I", ">I", "<Q", ">Q", "<H"))
            size = struct.calcsize(code)
            changed[place : place + size] = struct.pack(
                code, rng.choice((*NUMBERS, length, length - 1)) % (1 << 8 * size)
            )
        elif how == 4:
            del changed[place : place + rng.choice((1, 2, 8, 64, length))]
        elif how == 5:
            changed[place:place] = changed[rng.randrange(length) :][: rng.choice((1, 8, 64, 512))]
        elif how == 6:
            changed[place:place] = rng.randbytes(rng.choice((1, 4, 16)))
        else:
            other = rng.randrange(length)
            changed[place : place + 16], changed[other : other + 16] = (
                changed[other : other + 16],
                changed[place : place + 16],
            )
        if not changed:
            changed = bytearray(b"\0")
    return bytes(changed)


def some_json(value: Any, rng: random.Random) -> Any:
    """A JSON value with something in it replaced, removed, repeated or added."""
    if rng.random() < 0.02:
        deep: Any = 1
        for _ in range(rng.choice((70, 500, 900))):
            deep = [deep] if rng.random() < 0.5 else {"a": deep}
        return deep
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        how = rng.randrange(6)
        if how <= 2:
            return {**value, key: some_json(value[key], rng)}
        if how == 3:
            return {k: v for k, v in value.items() if k != key}
        if how == 4:
            return {
                **value,
                rng.choice((*pickles.NAMES, *value)): rng.choice((value[key], rng.choice(VALUES))),
            }
        return {(rng.choice(pickles.NAMES) if k == key else k): v for k, v in value.items()}
    if isinstance(value, list) and value and rng.random() < 0.7:
        place = rng.randrange(len(value))
        return [*value[:place], some_json(value[place], rng), *value[place + rng.randrange(2) :]]
    if isinstance(value, int) and rng.random() < 0.6:
        return rng.choice(NUMBERS) * rng.choice((1, -1))
    return rng.choice(VALUES)


def json_text(value: Any) -> bytes:
    """JSON, with what JSON has no place for as Python writes it."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _in_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return some_bytes(data, rng)
    if rng.random() < 0.02:
        nests = (b"[" * 100_000, b'{"a":' * 100_000)
        return rng.choice((*nests, b"\xef\xbb\xbf{}", b"\xff\xfe{", b'{"kind":1,"kind":2}'))
    return json_text(some_json(json.loads(data), rng))


def _zip(records: list[tuple[str, bytes, int]], comment: bytes = b"") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content, method in records:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, content)
        archive.comment = comment
    return buffer.getvalue()


def in_zip(
    data: bytes, rng: random.Random, change: Callable[[bytes, random.Random], bytes], part: str
) -> bytes:
    """An archive packed anew: records changed, compressed, renamed, repeated, removed, added."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = [
            (info.filename, archive.read(info), info.compress_type) for info in archive.infolist()
        ]
    how = rng.randrange(10)
    place = rng.randrange(len(records))
    name, content, method = records[place]
    comment = b""
    if how <= 4:
        records = [
            (n, change(c, rng), m) if n.endswith(part) and rng.random() < 0.7 else (n, c, m)
            for n, c, m in records
        ]
    elif how == 5:
        records[place] = (name, content, zipfile.ZIP_DEFLATED)
    elif how == 6:
        near = ("../" + name, "/" + name, name.upper(), name + "/")
        other = rng.choice((*near, "a\0b", "", "constants.pkl", "x/constants.pkl"))
        records[place] = (other, content, method)
    elif how == 7:
        records.insert(
            place,
            (
                rng.choice((name.upper(), "x/../y", "archive/data/0", "archive/constants.pkl")),
                rng.choice((content, bytes(3_000_000))),
                zipfile.ZIP_DEFLATED,
            ),
        )
    elif how == 8:
        del records[place]
    else:
        comment = rng.randbytes(30)
    packed = _zip(records, comment)
    return some_bytes(packed, rng) if rng.random() < 0.2 else packed


def _pth_zip(files: Files, rng: random.Random) -> Files:
    change = (
        some_bytes
        if rng.random() < 0.35
        else lambda data, rng: in_zip(data, rng, pickles.mutate, "data.pkl")
    )
    return {name: change(data, rng) for name, data in files.items()}


def _pth_legacy(files: Files, rng: random.Random) -> Files:
    ((name, data),) = files.items()
    if rng.random() < 0.4:
        return {name: some_bytes(data, rng)}
    first = data.index(b"cpu")
    start, end = data.rindex(b"\x80\x02}", 0, first), data.index(b".\x80\x02]", first) + 1
    return {name: data[:start] + pickles.mutate(data[start:end], rng) + data[end:]}


def _safetensors(files: Files, rng: random.Random) -> Files:
    ((name, data),) = list(files.items())[:1]
    rest = dict(list(files.items())[1:])
    if rng.random() < 0.35:
        return {name: some_bytes(data, rng), **rest}
    length = int.from_bytes(data[:8], "little")
    text = json_text(some_json(json.loads(data[8 : 8 + length]), rng))
    if rng.random() < 0.1:
        text = text[:-1] + b"," + text[1:]  # every key twice
    declared = len(text) if rng.random() < 0.95 else rng.choice(NUMBERS)
    return {name: struct.pack("<Q", declared % 2**64) + text + data[8 + length :], **rest}


def one_of(
    change: Callable[[bytes, random.Random], bytes], *only: str
) -> Callable[[Files, random.Random], Files]:
    """One of the files changed; with ``only``, those with these suffixes."""

    def mutate(files: Files, rng: random.Random) -> Files:
        name = rng.choice([name for name in files if not only or name.endswith(only)])
        if rng.random() < 0.03 and len(files) > 1:
            return {other: data for other, data in files.items() if other != name}
        return {**files, name: change(files[name], rng)}

    return mutate


def _orbax_file(data: bytes, rng: random.Random) -> bytes:
    return _in_json(data, rng) if data[:1] == b"{" and rng.random() < 0.6 else some_bytes(data, rng)


def _idx_file(data: bytes, rng: random.Random) -> bytes:
    compressed = data[:2] == b"\x1f\x8b"
    if rng.random() < 0.4:
        return some_bytes(data, rng)
    plain = gzip.decompress(data) if compressed else data
    if rng.random() < 0.15:
        plain = struct.pack(">I3I", 0x803, 50_000, 1000, rng.choice((10, 2**31))) + bytes(
            rng.choice((10, 3_000_000))
        )
    return gzip.compress(some_bytes(plain, rng), 9 if rng.random() < 0.5 else 1)


def npy(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return some_bytes(data, rng)
    header = {
        "descr": rng.choice(
            ("|u1", "<f8", "|O", "V2000000000", "<U99999999", "(9,9)<f4", [("a", "<i4")])
        ),
        "fortran_order": rng.random() < 0.5,
    }
    shape = rng.choice(((6, 5, 4, 1), (2**40,), (2**62, 4), (0, 2**62), (-1,), (6,), ()))
    text = repr({**header, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data[-120:]


def _npz(files: Files, rng: random.Random) -> Files:
    ((name, data),) = files.items()
    return {name: some_bytes(data, rng) if rng.random() < 0.3 else in_zip(data, rng, npy, ".npy")}


def _pickled(data: bytes, rng: random.Random) -> bytes:
    return some_bytes(data, rng) if rng.random() < 0.3 else pickles.mutate(data, rng)


_RUN = training()


def _optimizer(files: Files, rng: random.Random) -> Files:
    content = dict(_RUN)
    part = rng.choice(("optimizer", "optimizer", "lr_scheduler", "epoch", "step", "args"))
    content[part] = some_json(content.get(part, {"epochs": 3, "batch_size": 2}), rng)
    if rng.random() < 0.3:
        content = some_json(content, rng)
    try:
        return {**files, "net.pth": saved(content)}
    except RecursionError:  # pickle itself cannot write what is that deep
        return files


def _config(files: Files, rng: random.Random) -> Files:
    if rng.random() < 0.5:
        return {**files, "parity.json": _in_json(files["parity.json"], rng)}
    data = files["net.safetensors"]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(to_json(rng.choice((samples.CONFIG, SMALL))))
    run = {
        "optimizer": "sgd",
        "groups": [],
        "count": None,
        "schedule": None,
        "schedule_unit": "batch",
        "average": {"name": "model_ema", "prefix": "", "counters": {}},
        "kept": {},
        "steps": 1,
        "epochs": 0,
        "settings": {},
    }
    texts = {
        "config": config,
        "run": run,
        "sha256": {"conv1.weight": "ab" * 32},
        "eps": 1e-5,
        "momentum": 0.1,
    }
    part = rng.choice(list(texts))
    header["__metadata__"] = {
        part: json.dumps(some_json(texts[part], rng))
        if rng.random() < 0.8
        else str(rng.choice(VALUES))
    }
    text = json_text(header)
    return {"net.safetensors": struct.pack("<Q", len(text)) + text + data[8 + length :]}


MUTATIONS: dict[str, Callable[[Files, random.Random], Files]] = {
    "pth zip": _pth_zip,
    "pth legacy": _pth_legacy,
    "pth with sidecar": one_of(some_bytes),
    "optimizer": _optimizer,
    "safetensors": _safetensors,
    "safetensors with digests": one_of(some_bytes),
    "shard index": one_of(
        lambda data, rng: _in_json(data, rng) if data[:1] == b"{" else some_bytes(data, rng)
    ),
    "orbax": one_of(_orbax_file),
    "idx": one_of(_idx_file),
    "cifar binary": one_of(some_bytes),
    "cifar pickle": one_of(_pickled),
    "npz": _npz,
    "config json": _config,
}
"""By category of :func:`parity_tests.fuzz.samples.samples`."""
