"""Pickles changed instruction by instruction, and pieces that attack whoever follows them."""

from __future__ import annotations

import pickletools
import random
import struct

from parity_tests.fuzz.guard import CANARY

NUMBERS = (
    *(0, 1, 2, 255, 256, 65535, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1),
)


def _text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def _int(value: int) -> bytes:
    data = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def call(module: str, name: str, *arguments: bytes) -> bytes:
    """A global, called with arguments that are instructions."""
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


NAMES = (
    "conv1.weight\x1b[31m",
    "\x1b]0;taken over\x07",
    "a\u202eb",
    "\udc80",
    "<script>alert(1)</script>",
    "../../etc/passwd",
    "\0",
    "x" * 5000,
    "",
    "conv1\nok",
)


def _tensor(count: int, offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    sizes, strides = (b"(" + b"".join(map(_int, values)) + b"t" for values in (size, stride))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + (b"(" + _text("storage") + b"ctorch\nFloatStorage\n")
        + (_text("0") + _text("cpu") + _int(count) + b"tQ")
        + (_int(offset) + sizes + strides + b"\x89ccollections\nOrderedDict\n)RtR")
    )


def _laughs(depth: int) -> bytes:
    return b"]q\xf0" + b"".join(b"](h\xf0h\xf0eq\xf0" for _ in range(depth))


PIECES: dict[str, bytes] = {
    "system": call("posix", "system", _text(f"touch {CANARY}")),
    "os.system": call("os", "system", _text(f"touch {CANARY}")),
    "environ": call("builtins", "exec", _text(f"import os; os.environ['{CANARY}'] = '1'")),
    "eval by stack": _text("builtins")
    + _text("eval")
    + b"\x93"
    + _text(f"__import__('os').system('touch {CANARY}')")
    + b"\x85R",
    "inst": b"(" + _text(f"touch {CANARY}") + b"iposix\nsystem\n",
    "obj of a class": b"(ccollections\nOrderedDict\no",
    "obj": b"(cposix\nsystem\n" + _text(f"touch {CANARY}") + b"o",
    "method of a class": call(
        "builtins", "getattr", b"ccollections\nOrderedDict\n", _text("fromkeys")
    ),
    "numpy load": call("numpy", "load", _text(CANARY)),
    "torch load": call("torch", "load", _text(CANARY)),
    "bytearray": call("builtins", "bytearray", _int(2**33)),
    "encode chain": b"ccodecs\nencode\n"
    + _text("a")
    + call("_codecs", "encode", _text("a" * 99), _text("hex")),
    "encode to hex": call("_codecs", "encode", _text("a" * 99), _text("hex")),
    "encode again and again": b"]"
    + _text("a" * 100_000)
    + b"q\xf2a("
    + 100 * call("_codecs", "encode", b"h\xf2", _text("latin1"))
    + b"e",
    "copy again and again": b"]]("
    + b"K\x01" * 20_000
    + b"eq\xf2a("
    + 100 * call("torch", "Size", b"h\xf2")
    + b"e",
    "key of shared tuples": b"}" + b")q\xf2" + 60 * b"h\xf2\x86q\xf2" + b"K\x01s",
    "long key": b"}(" + b"K\x01" * 100 + b"tK\x01s",
    "endless product": _tensor(16, 0, (2**62,) * 3000, (0,) * 3000),
    "tensor class": call("torch", "FloatTensor", _int(2**33)),
    "deep tuples": b")" + b"\x85" * 200_000,
    "deep key": b"}" + b")" + b"\x85" * 200_000 + b"K\x01s",
    "deep lists": b"]" * 90_000 + b"a" * 89_999,
    "laughs": _laughs(60),
    "cycle": b"]q\xf1h\xf1a",
    "cycle in dict": b"}q\xf1" + _text("model") + b"h\xf1s",
    "attribute": b"ccollections\nOrderedDict\n)R}" + _text("items") + b"K\x05sb",
    "class": b"ccollections\nOrderedDict\n)R}" + _text("__class__") + b"K\x05sb",
    "huge string": b"X" + struct.pack("<I", 2**32 - 1),
    "memo": b"K\x01r" + struct.pack("<I", 2**32 - 1),
    "expanded tensor": _tensor(16, 0, (2**30, 2**8), (0, 0)),
    "negative size": _tensor(16, 0, (-1, 2), (1, 1)),
    "beyond its storage": _tensor(16, 8, (4, 4), (4, 1)),
    "beyond its record": _tensor(2**40, 0, (2**40,), (1,)),
    "overflow": _tensor(16, 2**62, (2**62, 2**62), (2**62, 2**62)),
    "empty and endless": _tensor(16, 0, (0, 2**62), (1, 1)),
    "dtype of any size": call(
        "numpy._core.multiarray", "scalar", call("numpy", "dtype", _text("V2000000000"))
    ),
    "counter": call("collections", "Counter", _text("a" * 99)),
    "device": call("torch", "device", _text("cuda:7")),
    "storage": call("torch", "FloatStorage", _int(2**33)),
    "state of a class": b"ccollections\nOrderedDict\nN}" + _text("items") + b"K\x05s\x86b",
    "state of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}" + _text("name") + b"K\x05sb",
    "state of a tensor": _tensor(16, 0, (2,), (1,)) + b"N}" + _text("shape") + b"K\x05s\x86b",
    "state of a list": b"]}b",
    "state again and again": b"]}("
    + b"".join(_text(str(i)) + b"N" for i in range(9999))
    + b"uq\xf2acargparse\nNamespace\nq\xf3a("
    + 100 * b"h\xf3)\x81h\xf2b"
    + b"e",
    "items of a class": b"ccollections\nOrderedDict\n" + _text("a") + b"K\x05s",
    "items of a tensor": _tensor(16, 0, (2,), (1,)) + b"K\x00K\x05s",
    "extend by name": b"cargparse\nNamespace\n)\x81}"
    + _text("append")
    + b"ctorch\ndevice\nsbK\x05a",
    "protocol": b"\x80\xc8N",
    "extension": b"\x82\x01",
    "marks": b"(" * 100_000,
}
"""By what it tries."""


def instructions(data: bytes) -> list[bytes]:
    """The bytes of each instruction."""
    places = [place for _, _, place in pickletools.genops(data)]
    return [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four changes to instructions, or a piece put in."""
    try:
        steps = instructions(data)
    except Exception:  # what was changed before is no whole pickle any more
        return data
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(1, len(steps))
        how = rng.randrange(7)
        if how == 0:
            steps.insert(place, PIECES[rng.choice(list(PIECES))] + rng.choice((b"", b"0")))
        elif how == 1:
            texts = [i for i, step in enumerate(steps) if step[:1] == b"X"]
            steps[rng.choice(texts or [place])] = _text(rng.choice(NAMES))
        elif how == 2:
            numbers = [i for i, step in enumerate(steps) if step[:1] in (b"K", b"M", b"J", b"\x8a")]
            steps[rng.choice(numbers or [place])] = _int(
                rng.choice(NUMBERS) * rng.choice((1, 1, -1))
            )
        elif how == 3:
            del steps[place]
        elif how == 4:
            steps.insert(place, steps[rng.randrange(len(steps))])
        elif how == 5:
            other = rng.randrange(1, len(steps))
            steps[place], steps[other] = steps[other], steps[place]
        else:
            step = bytearray(steps[place] or b".")
            step[rng.randrange(len(step))] = rng.randrange(256)
            steps[place] = bytes(step)
        if len(steps) < 2:
            break
    return b"".join(steps)
