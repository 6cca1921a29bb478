"""The same search guided by coverage: atheris changes bytes so that they reach new branches of this
library's own parsers.

Only parsers in Python can guide it: the scan of pickles, the zip directory, safetensors headers,
IDX, CIFAR pickles, configurations."""

from __future__ import annotations

import json
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax_resblock import config as architecture
from flax_resblock.checkpoint import Limits, safetensors_file
from flax_resblock.checkpoint.pickle_calls import called
from flax_resblock.checkpoint.unpickling import _run, unpickle
from flax_resblock.checkpoint.zip_directory import records
from flax_resblock.errors import InputError
from flax_resblock.training.data.idx import read_idx
from flax_resblock.training.data.inert_pickle import load_inert
from parity_tests.fuzz.samples import samples

LIMITS = Limits(max_bytes=64 << 20, max_header_bytes=1 << 20)


def _config(text: bytes) -> None:
    try:
        architecture.from_json(text.decode("utf-8", "replace"))
    except (ValueError, TypeError, RecursionError):
        return


def parsers(place: Path) -> dict[str, Callable[[bytes], Any]]:
    """What is fed, by name; a first byte chooses. ``place`` is where those that read files find
    one.
    """

    def from_file(read: Callable[[], Any]) -> Callable[[bytes], None]:
        def feed(data: bytes) -> None:
            place.write_bytes(data)
            read()

        return feed

    return {
        "pickle": lambda data: unpickle(data, LIMITS),
        "zip": from_file(lambda: records(place, LIMITS)),
        "safetensors": from_file(lambda: safetensors_file._header(place, LIMITS)),
        "idx": from_file(lambda: read_idx(place, 3, 1 << 20)),
        "cifar": lambda data: load_inert(data, "it"),
        "config": _config,
    }


def feed(fed: dict[str, Callable[[bytes], Any]], data: bytes) -> None:
    """One input; anything but an InputError comes out. JSON's own errors are what
    `safetensors_file.read` turns into one.
    """
    if not data:
        return
    name = list(fed)[data[0] % len(fed)]
    try:
        fed[name](data[1:])
    except InputError:
        return
    except (ValueError, RecursionError):
        if name != "safetensors":
            raise


def corpus(folder: Path) -> None:
    """Valid inputs to begin with."""
    files = samples()
    pickle = files["cifar pickle"]["data_batch_1"]
    config = json.dumps({"type": "ResNetConfig", "depths": [1, 1], "widths": [4, 6]}).encode()
    first = [
        pickle,
        files["pth zip"]["net.pth"],
        files["safetensors"]["net.safetensors"],
        files["idx"]["train-images-idx3-ubyte"],
        pickle,
        config,
    ]
    for number, data in enumerate(first):
        (folder / str(number)).write_bytes(struct.pack("B", number) + data)


def run(seconds: float) -> int:
    """Searches for so many seconds; ends with what libFuzzer found, 0 when nothing.

    Raises:
      ImportError: atheris is not installed.
    """
    import atheris

    folder = Path(tempfile.mkdtemp(prefix="atheris"))
    (folder / "corpus").mkdir()
    corpus(folder / "corpus")
    for function in (
        unpickle,
        _run,
        called,
        records,
        safetensors_file._header,
        read_idx,
        load_inert,
        architecture.from_json,
    ):
        atheris.instrument_func(function)
    fed = parsers(folder / "input")
    started, count = time.monotonic(), 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        feed(fed, data)

    print(f"atheris, {seconds:g} s, from {folder / 'corpus'}", flush=True)
    flags = [
        f"-max_total_time={int(seconds)}",
        "-timeout=10",
        "-rss_limit_mb=4096",
        "-max_len=20000",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *flags, str(folder / "corpus")], one)
    atheris.Fuzz()  # does not return: libFuzzer ends the process
    print(f"{count:,} inputs in {time.monotonic() - started:.0f} s")
    return 0
