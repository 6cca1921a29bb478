"""The directory of a zip archive, held against the file before PyTorch's own reader, which trusts it, sees it. Needs no torch."""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.errors import CheckpointError, visible

MAGIC = b"PK\x03\x04"

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_LARGE = (0xFFFF, 0xFFFFFFFF)
"""What stands for a number of entries, and for a number of bytes, that is in the longer form only."""
_ENCRYPTED, _COMPRESSED_PATCH = 1 << 0, 1 << 5
_FOLDER = 1 << 4
"""Of the attributes, as DOS has them."""


class Place(NamedTuple):
    """Where a record lies in the file: its first byte, how many, and their checksum."""

    start: int
    size: int
    crc: int


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is a damaged or truncated PyTorch zip archive ({why}). Copy or download it again.")


def _directory(handle: BinaryIO, path: Path, size: int, limits: Limits) -> int:
    """Where the directory begins. It must end where the records of its end begin, and those with the file: then no two readers find different ones."""
    if size < _END.size:
        raise _broken(path, "it ends before its directory")
    place = size - _END.size
    handle.seek(place)
    magic, *_, entries, length, start, comment = _END.unpack(handle.read(_END.size))
    if magic != b"PK\x05\x06" or comment:
        raise _broken(path, "it does not end with its directory")
    end = place
    if place >= _END64_LOCATOR.size:
        handle.seek(place - _END64_LOCATOR.size)
        magic, _, end64, _ = _END64_LOCATOR.unpack(handle.read(_END64_LOCATOR.size))
        if magic == b"PK\x06\x07":
            if end64 > place - _END64_LOCATOR.size - _END64.size:
                raise _broken(path, "its directory lies outside the file")
            handle.seek(end64)
            short_form = entries, length, start
            magic, *_, entries, length, start = _END64.unpack(handle.read(_END64.size))
            if magic != b"PK\x06\x06" or any(
                short not in (_LARGE[i > 0], long) for i, (short, long) in enumerate(zip(short_form, (entries, length, start), strict=True))
            ):
                raise _broken(path, "its directory is not where it should be")
            end = end64
    if start + length != end:
        raise _broken(path, "its directory is not where it should be")
    limits.check(path, "max_header_bytes", length, "bytes of zip directory")
    limits.check(path, "max_tensors", entries, "records")
    return start


def records(path: Path, limits: Limits) -> dict[str, Place]:
    """The place of every record, by name without the archive's own folder, once everything was found in order.

    torch.save stores records as they are, one after the other, in one folder. Anything else is refused: compressed records (a bomb, and what is mapped into
    memory cannot be compressed), records that overlap or lie outside the file, two of one name, names that lead elsewhere.

    Raises:
      CheckpointError: Not such an archive, or more records or bytes than ``limits`` allow.
    """
    size = path.stat().st_size
    ends: dict[str, int] = {}
    with path.open("rb") as handle:
        start = _directory(handle, path, size, limits)
        try:
            with zipfile.ZipFile(handle) as archive:
                found = archive.infolist()
        except Exception as error:  # zipfile raises struct.error, NotImplementedError and others besides its own
            raise _broken(path, visible(str(error))) from error
        if not found:
            raise _broken(path, "it holds no records")
        end = 0
        for info in sorted(found, key=lambda info: info.header_offset):
            end = _check_record(handle, path, info, end, start)
            ends[info.orig_filename] = end
    folder = found[0].orig_filename.partition("/")[0]
    names: dict[str, Place] = {}
    seen: set[str] = set()
    for info in found:
        name = info.orig_filename  # zipfile cuts the other at a NUL
        place = PurePosixPath(name)
        if (
            place.parts[:1] != (folder,)
            or len(place.parts) < 2
            or ".." in place.parts
            or place.as_posix() != name
            or visible(name.removeprefix(folder)) != name.removeprefix(folder)
        ):
            raise CheckpointError(
                f"{path} has a record called {visible(name[:200])!r}; torch.save names all of them {visible(folder)[:80]}/... It is no PyTorch file."
            )
        if name.lower() in seen:  # PyTorch's reader looks names up without regard to case
            raise CheckpointError(f"{path} has two records called {visible(name)!r}; which one counts would depend on the reader. Refused.")
        seen.add(name.lower())
        names[name.removeprefix(f"{folder}/")] = Place(ends[name] - info.file_size, info.file_size, info.CRC)
    return names


def _check_record(handle: BinaryIO, path: Path, info: zipfile.ZipInfo, end: int, limit: int) -> int:
    """Where the record ends; ``end`` is where the one before it did, ``limit`` where the directory begins."""
    name = visible(info.orig_filename[:200])
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise CheckpointError(
            f"{path}: its record {name!r} is compressed to {info.compress_size:,} of {info.file_size:,} bytes. torch.save never compresses, and a small file "
            "could fill any memory. Unpack it and pack it again without compression (zip -0), if you trust it."
        )
    if info.external_attr & _FOLDER:  # PyTorch's reader takes nothing out of a folder, and leaves what was in memory before
        raise _broken(path, f"its record {name!r} is marked as a folder")
    if info.flag_bits & (_ENCRYPTED | _COMPRESSED_PATCH):
        raise CheckpointError(f"{path}: its record {name!r} is encrypted. Give the file that torch.save wrote.")
    handle.seek(info.header_offset)
    head = handle.read(_LOCAL.size)
    if info.header_offset < end or len(head) < _LOCAL.size or not head.startswith(MAGIC):
        raise _broken(path, f"its record {name!r} overlaps another, or is not where its directory says")
    *_, method, _, _, _, _, _, name_length, extra_length = _LOCAL.unpack(head)
    end = info.header_offset + _LOCAL.size + name_length + extra_length + info.file_size
    if end > limit or method != zipfile.ZIP_STORED or handle.read(name_length) != _raw_name(info):
        raise _broken(path, f"its record {name!r} is not what its directory says")
    return end


def _raw_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")


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
