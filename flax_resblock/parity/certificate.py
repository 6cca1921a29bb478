"""``OUTPUT.parity.json``: beside every converted checkpoint, or as ``parity.json`` inside one that
is a folder, a record of what it was made from, what it holds, and how far both frameworks agreed on
it.

One entry per output; :mod:`flax_resblock.parity.certify` writes it. This
module reads it and holds the outputs against it, without either framework."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from flax_resblock import checkpoint
from flax_resblock.checkpoint.orbax_folder import read_orbax
from flax_resblock.checkpoint.safetensors_file import read_safetensors
from flax_resblock.errors import CheckpointError, InputError, MissingDependencyError

NAME = "parity.json"
ITSELF = "."
"""Name of an output that is the folder in which its certificate lies."""
KIND = "flax-resblock certificate"
SCHEMA = 1
REFERENCE = "the reference network of this description; your own code was not seen"
"""What a checkpoint is compared with."""

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_LONGEST = 255
"""Bytes of a name that file systems take."""

Hashes = str | dict[str, str]
"""SHA-256 of a file; of a folder or a set of shards: of each of its files, by sorted relative
name."""


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    """Every file below a folder but a certificate in it, also one that is being written."""
    names = (child.relative_to(folder).as_posix() for child in folder.rglob("*") if child.is_file())
    return sorted(name for name in names if name != NAME and not name.startswith(f".{NAME}."))


def hashes(path: Path) -> Hashes:
    """SHA-256 of a file, or of every file of a folder but its certificate.

    Raises:
      CheckpointError: It cannot be read.
    """
    try:
        if path.is_dir():
            return {name: _sha256(path / name) for name in _files(path)}
        return _sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def certificate_of(out: Path) -> Path:
    """Where the certificate of an output is: in a folder, and beside a file."""
    is_folder = checkpoint.output_format(out) == "orbax"
    return out / NAME if is_folder else out.with_name(f"{out.name}.{NAME}")


def read_certificate(path: Path) -> dict[str, Any]:
    """The entries of a certificate by output name, checked: no name in it leads out of its folder.

    Raises:
      InputError: It cannot be read, is something else, of another version, or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} does not exist. A certificate is called OUTPUT.{NAME} and lies beside the "
            f"converted checkpoint, or {NAME} and lies in it where that is a folder."
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is no certificate of flax-resblock: it is no JSON ({str(error)[:120]})."
        ) from error
    kind = content.get("kind") if isinstance(content, dict) else None
    if kind != KIND:
        raise InputError(
            f"{path} is no certificate of flax-resblock: its 'kind' is {str(kind)[:60]!r}, not "
            f"{KIND!r}."
        )
    if content.get("schema") != SCHEMA or isinstance(content["schema"], bool):
        raise InputError(
            f"{path} has schema {str(content.get('schema'))[:60]!r}; this version of "
            f"flax-resblock reads {SCHEMA}. Use the one that wrote it."
        )
    outputs = content.get("outputs")
    if not isinstance(outputs, dict):
        raise InputError(
            f"{path} is damaged: its 'outputs' is no object. Convert again to get a new one."
        )
    flaws = [flaw for name, entry in outputs.items() if (flaw := _flaw(name, entry)) is not None]
    if flaws:
        raise InputError(
            f"{path} is damaged, or was made by hand: {flaws[0]}. Nothing that it names was "
            f"opened; convert again to get a new one."
        )
    return outputs


def _flaw(name: str, entry: Any) -> str | None:
    if name != ITSELF and (not _is_inside(name) or "/" in name):
        return f"{name[:120]!r} is not the plain name of a file or folder"
    entry = entry if isinstance(entry, dict) else {}
    if not isinstance(entry.get("output"), dict) or not isinstance(entry.get("tensors"), dict):
        return f"the entry of {name!r} lacks 'output' or 'tensors'"
    expected = entry["output"].get("sha256")
    files = expected if isinstance(expected, dict) else {name: expected}
    for file, sha in {**files, **entry["tensors"]}.items():
        if not isinstance(sha, str) or not _SHA256.match(sha):
            return f"the SHA-256 of {file[:120]!r} in the entry of {name!r} is {str(sha)[:80]!r}"
    outside = [file for file in files if not _is_inside(file)]
    if outside:
        return f"{outside[0][:120]!r} in the entry of {name!r} leads out of its folder"
    return None


def _is_inside(name: str) -> bool:
    """Whether a relative name, taken literally, stays below its folder."""
    path = Path(name)
    return (
        len(name.encode("utf-8", "replace")) <= _LONGEST
        and name not in ("", ".")
        and not path.is_absolute()
        and not path.drive
        and ".." not in path.parts
        and path.as_posix() == name
        and "\0" not in name
    )


@dataclass(frozen=True)
class RecheckedOutput:
    """One output, held against its certificate.

    Attributes:
      status: Whether every byte is as it was.
      details: What changed: files, and tensors where they can still be read.
    """

    output: str
    status: Literal["unchanged", "changed", "missing"]
    details: tuple[str, ...] = ()


def recheck(path: Path) -> list[RecheckedOutput]:
    """Hashes every output of a certificate again, which is looked for beside it. Imports neither
    torch nor jax, unless an output has changed and is read with one (.pth, Orbax).

    Raises:
      InputError: It is no certificate, of another version, damaged, or an output cannot be read.
    """
    folder, outputs = path.parent, read_certificate(path)
    return [
        _check(folder.resolve() if name == ITSELF else folder / name, entry)
        for name, entry in outputs.items()
    ]


def _check(out: Path, entry: Mapping[str, Any]) -> RecheckedOutput:
    expected = entry["output"]["sha256"]
    if not (out.is_dir() if isinstance(expected, dict) else out.is_file()):
        how = "it was removed, renamed or left behind when its folder was copied"
        return RecheckedOutput(out.name, "missing", (f"{out} is not there: {how}",))
    found = hashes(out)
    verification = entry.get("verification")
    failed = isinstance(verification, dict) and verification.get("passed") is False
    remarks = ("the frameworks differed on it when it was written",) if failed else ()
    if found == expected:
        return RecheckedOutput(out.name, "unchanged", remarks)
    changed = *_changed_files(out.name, found, expected), *_changed_tensors(out, entry["tensors"])
    return RecheckedOutput(out.name, "changed", (*changed, *remarks))


def _changed_files(name: str, found: Hashes, expected: Hashes) -> Iterator[str]:
    before, now = (
        value if isinstance(value, dict) else {name: value} for value in (expected, found)
    )
    for file in sorted({*before, *now}):
        if before.get(file) != now.get(file):
            yield f"file {file} {_change(file, before, now, 'has another SHA-256')}"


def _change(name: str, before: Mapping[str, str], now: Mapping[str, str], otherwise: str) -> str:
    return "is gone" if name not in now else "is new" if name not in before else otherwise


def _changed_tensors(out: Path, expected: Mapping[str, str]) -> Iterator[str]:
    """Reads the tensors past the digests that the file itself carries, which would refuse it as a
    whole."""
    try:
        if out.is_dir():
            record = read_orbax(out)
        elif checkpoint.output_format(out) == "safetensors":
            record = read_safetensors(out)
        else:
            from flax_resblock.checkpoint.torch_file import read_torch

            record = read_torch(out)
        found = checkpoint.digests(record.tensors)
    except MissingDependencyError:
        yield "which tensors changed cannot be told without PyTorch"
        return
    except InputError as error:
        yield f"its tensors can no longer be read: {error}"
        return
    changed = [key for key in sorted({*expected, *found}) if expected.get(key) != found.get(key)]
    for key in changed:
        yield f"tensor {key} {_change(key, expected, found, 'has changed')}"
    if not changed:
        yield "every tensor is as it was; only the bytes around them differ"


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of this library, of Python, and of those packages that are installed (torch is not on every
    TPU host)."""
    from flax_resblock._version import __version__

    found = {"flax_resblock": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
