"""The directory of a zip archive, held against the file before anything in it is read, here or by
PyTorch, whose reader trusts it. Needs no torch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import CheckpointError, visible

MAGIC = b"PK\x03\x04"

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_FIELD = struct.Struct("<2H")
_LARGE = (0xFFFF, 0xFFFFFFFF)
"""What stands for a number of entries, and for a number of bytes, that is in the longer form
only.
"""
_STORED = 0
_SIZES_BEHIND, _UTF8 = 1 << 3, 1 << 11
"""Flags that a record may have: its sizes are repeated behind it, its name is UTF-8."""
_FOLDER = 1 << 4
"""Of the attributes, as DOS has them."""


class Place(NamedTuple):
    """Where a record lies in the file: its first byte, how many, and their checksum."""

    start: int
    size: int
    crc: int


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a damaged or truncated PyTorch zip archive ({why}). Copy or download it again."
    )


def _directory(handle: BinaryIO, path: Path, size: int, limits: Limits) -> tuple[int, list[_Entry]]:
    """Where the directory begins, and its entries. It must end where the records of its end begin,
    and those with the file: then no two readers find different ones. An archive in several parts is
    refused."""
    if size < _END.size:
        raise _broken(path, "it ends before its directory")
    end = size - _END.size
    handle.seek(end)
    magic, disk, first_disk, here, entries, length, start, comment = _END.unpack(
        handle.read(_END.size)
    )
    if magic != b"PK\x05\x06" or comment:
        raise _broken(path, "it does not end with its directory")
    disks = [disk, first_disk]
    if end >= _END64_LOCATOR.size:
        handle.seek(end - _END64_LOCATOR.size)
        magic, disk, end64, parts = _END64_LOCATOR.unpack(handle.read(_END64_LOCATOR.size))
        if magic == b"PK\x06\x07":
            if end64 != end - _END64_LOCATOR.size - _END64.size or parts != 1:
                raise _broken(path, "its directory is not where it should be")
            handle.seek(end64)
            short_form = here, entries, length, start
            magic, rest, _, _, disk64, first_disk, here, entries, length, start = _END64.unpack(
                handle.read(_END64.size)
            )
            long_form = here, entries, length, start
            fits = all(
                short in (_LARGE[i > 1], long)
                for i, (short, long) in enumerate(zip(short_form, long_form, strict=True))
            )
            if magic != b"PK\x06\x06" or rest != _END64.size - 12 or not fits:
                raise _broken(path, "its directory is not where it should be")
            disks = [disk, disk64, first_disk, *(number for number in disks if number != _LARGE[0])]
            end = end64
    if start + length != end or here != entries or any(disks):
        raise _broken(path, "its directory is not where it should be")
    limits.check(path, "max_header_bytes", length, "bytes of zip directory")
    limits.check(path, "max_tensors", entries, "records")
    handle.seek(start)
    found = list(_entries(path, handle.read(length)))
    if len(found) != entries:
        raise _broken(path, "its directory has more or fewer records than it says")
    return start, found


class _Entry(NamedTuple):
    """What the directory says of a record."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    attributes: int
    start: int


def _entries(path: Path, directory: bytes) -> Iterator[_Entry]:
    at = 0
    while at < len(directory):
        if len(directory) - at < _CENTRAL.size:
            raise _broken(path, "its directory ends within a record")
        (
            magic,
            _,
            _,
            flags,
            method,
            _,
            _,
            crc,
            *lengths,
            name,
            extra,
            comment,
            disk,
            _,
            attributes,
            start,
        ) = _CENTRAL.unpack_from(directory, at)
        at += _CENTRAL.size
        raw, more = directory[at : at + name], directory[at + name : at + name + extra]
        at += name + extra + comment
        if magic != b"PK\x01\x02" or at > len(directory) or comment or disk:
            raise _broken(path, "its directory has a record that is none")
        packed, size, start = _long_form(path, more, [*lengths, start])
        try:
            text = raw.decode("utf-8" if flags & _UTF8 else "cp437")
        except UnicodeDecodeError as error:
            raise _broken(path, f"a record's name is no text: {visible(repr(raw[:80]))}") from error
        yield _Entry(text, raw, flags, method, crc, packed, size, attributes, start)


def _long_form(path: Path, extra: bytes, numbers: list[int]) -> list[int]:
    """Numbers of more than 32 bits, which then are in the extra field 1: packed size, size and
    start are given, size comes first there.
    """
    while len(extra) >= _FIELD.size and _LARGE[1] in numbers:
        kind, length = _FIELD.unpack_from(extra)
        field, extra = extra[_FIELD.size : _FIELD.size + length], extra[_FIELD.size + length :]
        if kind == 1:
            for place in (1, 0, 2):
                if numbers[place] == _LARGE[1]:
                    if len(field) < 8:
                        raise _broken(path, "its directory has a record that is none")
                    numbers[place], field = int.from_bytes(field[:8], "little"), field[8:]
            break
    return numbers


def records(path: Path, limits: Limits) -> dict[str, Place]:
    """The place of every record, by name without the archive's own folder, once everything was
    found in order.

    torch.save stores records as they are, one after the other, in one folder. Anything else is
    refused: compressed records (a bomb, and what is mapped into memory cannot be compressed),
    records that overlap or lie outside the file, two of one name, names that lead elsewhere.

    Raises:
      CheckpointError: Not such an archive, or more records or bytes than ``limits`` allow.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        limit, entries = _directory(handle, path, size, limits)
        if not entries:
            raise _broken(path, "it holds no records")
        end = 0
        ends: dict[_Entry, int] = {}
        for entry in sorted(entries, key=lambda entry: entry.start):
            ends[entry] = end = _check_record(handle, path, entry, end, limit)
    folder = entries[0].name.partition("/")[0]
    names: dict[str, Place] = {}
    seen: set[str] = set()
    for entry in entries:
        name = entry.name
        place = PurePosixPath(name)
        if (
            place.parts[:1] != (folder,)
            or len(place.parts) < 2
            or ".." in place.parts
            or place.as_posix() != name
            or visible(name.removeprefix(folder)) != name.removeprefix(folder)
        ):
            raise CheckpointError(
                f"{path} has a record called {visible(name[:200])!r}; torch.save names all of "
                f"them {visible(folder)[:80]}/... It is no PyTorch file."
            )
        if name.lower() in seen:  # PyTorch's reader looks names up without regard to case
            raise CheckpointError(
                f"{path} has two records called {visible(name)!r}; which one counts would "
                f"depend on the reader. Refused."
            )
        seen.add(name.lower())
        names[name.removeprefix(f"{folder}/")] = Place(
            ends[entry] - entry.size, entry.size, entry.crc
        )
    return names


def _check_record(handle: BinaryIO, path: Path, entry: _Entry, end: int, limit: int) -> int:
    """Where the record ends; ``end`` is where the one before it did, ``limit`` where the directory
    begins.
    """
    name = visible(entry.name[:200])
    if entry.method != _STORED or entry.packed != entry.size:
        raise CheckpointError(
            f"{path}: its record {name!r} is compressed to {entry.packed:,} of {entry.size:,} "
            f"bytes. torch.save never compresses, and a small file "
            "could fill any memory. Unpack it and pack it again without compression (zip -0), "
            "if you trust it."
        )
    if (
        entry.attributes & _FOLDER
    ):  # PyTorch's reader takes nothing out of a folder, and leaves what was in memory before
        raise _broken(path, f"its record {name!r} is marked as a folder")
    if entry.flags & ~(_UTF8 | _SIZES_BEHIND):
        raise CheckpointError(
            f"{path}: its record {name!r} is encrypted, or a patch of another. Give the file "
            f"that torch.save wrote."
        )
    handle.seek(entry.start)
    head = handle.read(_LOCAL.size)
    if entry.start < end or len(head) < _LOCAL.size or not head.startswith(MAGIC):
        raise _broken(
            path, f"its record {name!r} overlaps another, or is not where its directory says"
        )
    *_, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(head)
    end = entry.start + _LOCAL.size + name_length + extra_length + entry.size
    if end > limit or method != _STORED or handle.read(name_length) != entry.raw_name:
        raise _broken(path, f"its record {name!r} is not what its directory says")
    return end


def read_record(path: Path, place: Place) -> bytes:
    """The bytes of a record.

    Raises:
      CheckpointError: Its checksum does not fit.
    """
    with path.open("rb") as handle:
        handle.seek(place.start)
        content = handle.read(place.size)
    if zlib.crc32(content) != place.crc:
        raise _broken(path, "the checksum of one of its records does not fit")
    return content
