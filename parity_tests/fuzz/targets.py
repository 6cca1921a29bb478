"""Opens a file as a user would, and checks that its content comes out, or one clear error."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from flax_resblock import checkpoint
from flax_resblock.checkpoint import Limits, digests
from flax_resblock.checkpoint.bounded import read_npz
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.checkpoint.unwrap import unwrap
from flax_resblock.convert.opening import ReadOptions, interpret
from flax_resblock.errors import InputError
from flax_resblock.parity.certificate import recheck
from flax_resblock.runs.run_file import run_of
from flax_resblock.training.data import opening
from flax_resblock.training.data.idx import read_idx
from parity_tests.fuzz.jax_files import reference
from parity_tests.fuzz.pickles import PIECES
from parity_tests.fuzz.samples import Files, state

MOST = 64 << 20
LIMITS = Limits(max_bytes=MOST, max_tensors=2000, max_header_bytes=1 << 20)
_UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""What must not reach a terminal."""

DAMAGE = ("pth with sidecar", "safetensors with digests", "orbax", "msgpack with digests")
"""Categories whose files carry digests: what loads is what was written."""


class ViolationError(AssertionError):
    """A file got something that none may get."""


def put(folder: Path, files: Files) -> Path:
    """Writes the files, and returns what is to be opened."""
    for child in folder.iterdir():
        shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def open_one(category: str, folder: Path) -> str:
    """Opens what lies in the folder.

    Returns:
      ``"exact"``, or ``"refused"``.
    Raises:
      ViolationError: It loaded something else than it holds, or the error is not fit to be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            OPENERS.get(category, _open_checkpoint)(category, folder)
    except InputError as error:
        message = str(error)
        if not message or len(message) > 4000 or "Traceback" in message:
            raise ViolationError(f"an error that nobody can read: {message[:300]!r}") from error
        return "refused"
    return "exact"


def _open_checkpoint(category: str, folder: Path) -> None:
    path = _subject(folder)
    record = checkpoint.read(path, run=category == "optimizer", limits=LIMITS)
    if category in DAMAGE:
        if digests(record.tensors) != _truth(category) and not any(
            "describes another file" in note for note in record.notes
        ):
            raise ViolationError("it loaded tensors that are not those that were written")
    else:
        _compare(record, _reference(path))
    source = interpret(record, ReadOptions(limits=LIMITS))
    if category == "optimizer":
        run_of(source)


def _subject(folder: Path) -> Path:
    names = ("net.pth", "net.safetensors", "net", "model.safetensors.index.json")
    names += ("net.msgpack", "net.npz", "net.pkl", "net.h5")
    return next((folder / name for name in names if (folder / name).exists()), folder / "net.pth")


def _truth(category: str) -> dict[str, str]:
    if category in ("orbax", "msgpack with digests"):
        from flax_resblock.convert import NAMINGS, StateMap
        from parity_tests.fuzz.samples import CONFIG

        flat = StateMap(CONFIG, NAMINGS["torchvision"]).to_flax(state())
        return digests({".".join(map(str, path)): value for path, value in flat.items()})
    return digests(state())


def _reference(path: Path) -> dict[str, np.ndarray] | None:
    """The same file by the formats' own readers, once it is known to be opened without harm."""
    if path.suffix == ".pth":
        content = (
            torch.load(path, map_location="cpu", weights_only=True)
            if path.read_bytes()[:2] == b"\x80\x02"
            else None
        )
        if content is None:
            with warnings.catch_warnings():
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
        return state_to_numpy(unwrap(content, is_tensor=torch.is_tensor, source="reference")[0])
    if path.suffix == ".safetensors":
        return safetensors.numpy.load_file(path)
    if not path.name.endswith(".index.json"):
        return reference(path.name, path.read_bytes())
    return {
        key: value
        for shard in sorted(path.parent.glob("*.safetensors"))
        for key, value in safetensors.numpy.load_file(shard).items()
    }


def _compare(record: checkpoint.Record, reference: dict[str, np.ndarray] | None) -> None:
    if reference is None:
        return
    for key, value in record.tensors.items():
        theirs = reference.get(key)
        if theirs is None:
            theirs = next(
                (other for name, other in reference.items() if name.endswith(f".{key}")), None
            )
        if theirs is None or theirs.tobytes() != value.tobytes() or theirs.shape != value.shape:
            raise ViolationError(f"{key!r} is not what the format's own reader finds")


def _open_data(category: str, folder: Path) -> None:
    files = list(folder.iterdir())
    splits = opening.open_data(files[0] if category == "npz" else folder)
    for part in splits:
        images = part.fitted()
        if (
            not len(images)
            or part.labels.min() < 0
            or part.labels.max() >= part.num_classes
            or len(images) != len(part.labels)
        ):
            raise ViolationError(f"{part.name} has labels that do not fit its images")
    if category == "npz":
        arrays = read_npz(files[0], MOST)
        with np.load(files[0], allow_pickle=False) as theirs:
            if any(theirs[key].tobytes() != value.tobytes() for key, value in arrays.items()):
                raise ViolationError("an array is not what numpy finds")


def _open_idx(category: str, folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        found = read_idx(path, 3 if "images" in path.name else 1, MOST)
        data = path.read_bytes()
        plain = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        if found.tobytes() != plain[4 + 4 * found.ndim :]:
            raise ViolationError(f"{path.name} is not what it holds")
    _open_data(category, folder)


def _open_config(category: str, folder: Path) -> None:
    if (folder / "parity.json").exists():
        recheck(folder / "parity.json")
    else:
        record = checkpoint.read(folder / "net.safetensors", limits=LIMITS)
        source = interpret(record, ReadOptions(limits=LIMITS))
        if "run" in record.metadata:
            run_of(source)


OPENERS: dict[str, Callable[[str, Path], object]] = {
    "idx": _open_idx,
    "cifar binary": _open_data,
    "cifar pickle": _open_data,
    "npz": _open_data,
    "config json": _open_config,
}


NO_CHECKPOINTS = tuple(OPENERS)
"""Categories that the command does not open."""


def _write_outside(_: str, __: Path) -> None:
    Path(tempfile.gettempdir(), "flax_resblock_outside").write_text("x")


def _raise(_: str, __: Path) -> None:
    raise KeyError("unforeseen")


CANARIES: dict[str, Callable[[str, Path], object]] = {
    "run": lambda category, folder: pickle.loads(b"\x80\x02" + PIECES["system"] + b"."),
    "write": _write_outside,
    "memory": lambda category, folder: bytearray(330_000_000),
    "wrong": _raise,
    "crash": lambda category, folder: os.abort(),
    "hang": lambda category, folder: time.sleep(60),
    "nothing": lambda category, folder: None,
}
"""What the fuzzer must notice, and what it must not; in place of opening the file."""


def command(folder: Path, out: Path, *, convert: bool) -> str:
    """The command itself on the file: ``inspect``, or ``convert`` with its output in a folder.

    Returns:
      ``"command"`` when its status is 0 or 2 and what it says can be read.
    """
    from flax_resblock.cli import run

    path = str(_subject(folder))
    limits = ["--max-bytes", str(MOST), "--max-tensors", "2000", "--max-header-bytes", str(1 << 20)]
    arguments = (
        ["convert", path, str(out / "out.safetensors"), "--no-certificate", "--force"]
        if convert
        else ["inspect", path]
    )
    said, complained = io.StringIO(), io.StringIO()
    from flax_resblock.cli import common

    with redirect_stdout(said), redirect_stderr(complained), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        common.output.file, common.status.file = said, complained
        status = run([*arguments, *limits])
    error = complained.getvalue()
    if (
        status not in (0, 2)
        or (status == 2) != error.startswith("flax-resblock: ")
        or "Traceback" in error
    ):
        raise ViolationError(f"{arguments[0]} ended with {status} and said {error[:300]!r}")
    hidden = _UNSEEN.search(error + said.getvalue())
    if hidden:
        raise ViolationError(f"{arguments[0]} let {hidden.group()!r} through to the terminal")
    return "command"
