"""Where the records of a PyTorch zip archive lie, checked before anything in them is read.

:mod:`zipfile` reads the directory. It is more lenient than the views of the mapped file that
tensors become, and than PyTorch's own reader, which trusts the directory. So the end of the
archive and the header in front of every record are checked here as well. Needs no torch.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import CheckpointError, visible

ZIP_MAGIC = b"PK\x03\x04"

_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR, _LOCAL = struct.Struct("<4sLQL"), struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s24x3H12x")
"""An entry of the directory: its magic number, and the lengths of its name, extra and comment."""
_SIZES_BEHIND, _UTF8 = 1 << 3, 1 << 11
"""Flags that a record may have: its sizes are repeated behind it, its name is UTF-8."""
_FOLDER = 1 << 4
"""The attribute of a folder, as DOS has it."""


class RecordPlace(NamedTuple):
    """A record in the file: the offset of its first byte, its length, and its CRC-32."""

    start: int
    size: int
    crc: int


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is a damaged or truncated PyTorch zip archive ({why}). Copy or download it again."
    )


def _directory(handle: BinaryIO, path: Path, size: int) -> tuple[int, int, int]:
    """Start, length and number of entries of the directory. It must end where the records of its
    end begin, and those with the file: then no two readers find different ones."""
    misplaced = _broken(path, "its directory is not where it should be")
    tail_size = min(size, _END64.size + _END64_LOCATOR.size + _END.size)
    handle.seek(size - tail_size)
    tail = handle.read(tail_size)
    if size < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        raise _broken(path, "it does not end with its directory")
    _, *disks, here, entries, length, start, comment = _END.unpack(tail[-_END.size :])
    end, short = size - _END.size, (here, entries, length, start)
    locator = tail[-_END.size - _END64_LOCATOR.size : -_END.size]
    if locator[:4] == b"PK\x06\x07" and len(tail) == _END64.size + len(locator) + _END.size:
        _, disk, place, parts = _END64_LOCATOR.unpack(locator)
        parts64 = _END64.unpack(tail[: _END64.size])
        magic, rest, _, _, *disks64, here, entries, length, start = parts64
        end = size - tail_size
        if (magic, rest, place, parts) != (b"PK\x06\x06", _END64.size - 12, end, 1):
            raise misplaced
        whole = (here, entries, length, start)
        unset = (0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)
        if any(a not in (b, c) for a, b, c in zip(short, whole, unset, strict=True)):
            raise misplaced
        disks = [disk, *disks64, *(number for number in disks if number != 0xFFFF)]
    if start + length != end or here != entries or any(disks) or comment:
        raise misplaced
    return start, length, entries


def _check_entries(handle: BinaryIO, path: Path, start: int, length: int) -> None:
    """Refuses a directory whose last entry claims bytes behind its end, which zipfile cuts off."""
    handle.seek(start)
    directory, position = handle.read(length), 0
    while position + _ENTRY.size <= length:
        _, *lengths = _ENTRY.unpack_from(directory, position)
        position += _ENTRY.size + sum(lengths)
    if position != length:
        raise _broken(path, "its directory is not as long as its entries")


def records(path: Path, limits: Limits) -> dict[str, RecordPlace]:
    """The place of every record, by its name without the archive's own folder.

    torch.save stores records uncompressed, one after the other, in one folder. CheckpointError
    refuses anything else: compressed records (which could be bombs, and cannot be mapped into
    memory), records that overlap or lie outside the file, two of one name, names that lead
    elsewhere, more records or bytes than ``limits`` allow.
    """
    with path.open("rb") as handle:
        start, length, count = _directory(handle, path, path.stat().st_size)
        limits.check(path, "max_header_bytes", length, "bytes of zip directory")
        limits.check(path, "max_tensors", count, "records")
        _check_entries(handle, path, start, length)
        try:
            with zipfile.ZipFile(handle) as archive:
                entries = archive.infolist()
        # BadZipFile, struct.error, UnicodeDecodeError, NotImplementedError: damage
        except Exception as error:
            raise _broken(path, visible(str(error))[:120]) from error
        if not entries or len(entries) != count:
            raise _broken(path, "it holds no records, or not as many as it says")
        _refuse_programs(path, [entry.orig_filename for entry in entries])
        places: dict[str, RecordPlace] = {}
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            place = _checked_place(handle, path, entry, end, start)
            end = place.start + place.size
            places[entry.orig_filename] = place
    folder = entries[0].orig_filename.partition("/")[0]
    found: dict[str, RecordPlace] = {}
    seen: set[str] = set()
    for name in (entry.orig_filename for entry in entries):
        parts = PurePosixPath(name)
        inside = parts.parts[:1] == (folder,) and len(parts.parts) > 1 and ".." not in parts.parts
        rest = name.removeprefix(folder)
        if not inside or parts.as_posix() != name or visible(rest) != rest:
            raise CheckpointError(
                f"{path} has a record called {visible(name[:200])!r}; torch.save names all of "
                f"them {visible(folder)[:80]}/... It is no PyTorch file."
            )
        if name.lower() in seen:  # PyTorch's reader looks names up without regard to case
            raise CheckpointError(
                f"{path} has two records called {visible(name)!r}, and readers disagree on which "
                f"of them counts. It is damaged, or made to mislead: get it from its source again."
            )
        seen.add(name.lower())
        found[rest[1:]] = places[name]
    return found


_PROGRAMS = (
    ("constants.pkl", "TorchScript", "torch.jit.load({path!r}).state_dict()"),
    ("archive_format", "torch.export", "torch.export.load({path!r}).state_dict"),
)
"""A record that only such an archive has, what writes it, and how to get its weights."""


def _refuse_programs(path: Path, names: list[str]) -> None:
    """Raises CheckpointError for an archive of a program, whose records may be compressed."""
    records = {name.partition("/")[2] for name in names}
    for record, writer, weights in _PROGRAMS:
        if record in records:
            code = f"torch.save({weights.format(path=path.name)}, 'weights.pth')"
            raise CheckpointError(
                f"{visible(str(path))} is a {writer} archive, a program with its weights. This "
                f"library runs no code of a file: write the weights alone in PyTorch, with "
                f"{visible(code)}."
            )


def _checked_place(
    handle: BinaryIO, path: Path, entry: zipfile.ZipInfo, end: int, limit: int
) -> RecordPlace:
    """The place of a record, which lies behind ``end`` (of the one before) and before ``limit``."""
    name = visible(entry.orig_filename[:200])
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise CheckpointError(
            f"{path}: its record {name!r} is compressed to {entry.compress_size:,} of "
            f"{entry.file_size:,} bytes. torch.save never compresses, and a small file could fill "
            f"any memory. If you trust it, unpack it, and pack it without compression (zip -0)."
        )
    if entry.external_attr & _FOLDER:
        # PyTorch's reader takes nothing out of a folder, and leaves what was in memory before.
        raise _broken(path, f"its record {name!r} is marked as a folder")
    if entry.flag_bits & ~(_UTF8 | _SIZES_BEHIND):
        raise CheckpointError(
            f"{path}: its record {name!r} is encrypted, or a patch of another. Give the file "
            f"that torch.save wrote."
        )
    if entry.comment or entry.volume:
        raise _broken(path, f"its record {name!r} has a comment, or is in another file")
    handle.seek(entry.header_offset)
    head = handle.read(_LOCAL.size)
    if entry.header_offset < end or len(head) < _LOCAL.size or head[:4] != ZIP_MAGIC:
        raise _broken(
            path, f"its record {name!r} overlaps another, or is not where its directory says"
        )
    *_, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(head)
    start = entry.header_offset + _LOCAL.size + name_length + extra_length
    encoding = "utf-8" if entry.flag_bits & _UTF8 else "cp437"
    same = handle.read(name_length) == entry.orig_filename.encode(encoding)
    if start + entry.file_size > limit or method != zipfile.ZIP_STORED or not same:
        raise _broken(path, f"its record {name!r} is not what its directory says")
    return RecordPlace(start, entry.file_size, entry.CRC)


def read_record(path: Path, place: RecordPlace) -> bytes:
    """The bytes of a record; raises CheckpointError if its checksum does not fit."""
    with path.open("rb") as handle:
        handle.seek(place.start)
        content = handle.read(place.size)
    if zlib.crc32(content) != place.crc:
        raise _broken(path, "the checksum of one of its records does not fit")
    return content
