"""Reads untrusted files; the sizes that they declare are checked before memory is allocated."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import numpy as np

from flax_resblock.errors import InputError, damaged

MOST_BYTES = 16 << 30
"""Largest size of a file, and of its content once it is expanded."""
MOST_ARRAYS = 1000
"""Largest number of arrays in an archive."""

_END = struct.Struct("<4s4H2LH")


def check_file(path: Path, most: int = MOST_BYTES) -> None:
    """Raises InputError but for a regular file (no pipe or device) of at most ``most`` bytes."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{path} is no regular file. Copy what it stands for into a file first.")
    if found.st_size > most:
        raise InputError(
            f"{path} has {found.st_size:,} bytes; at most {most:,} are read into memory."
        )


def read_npz(
    path: Path, most: int = MOST_BYTES, most_arrays: int = MOST_ARRAYS
) -> dict[str, np.ndarray]:
    """Reads every array of an ``.npz`` archive without unpickling anything; raises InputError if it
    is none, damaged, or larger than ``most`` bytes or ``most_arrays`` arrays."""
    words = f"{path} is not an .npz archive of plain arrays"
    with damaged(words, "Write it with numpy.savez, without objects.", InputError):
        check_file(path, most)
        with path.open("rb") as handle:
            handle.seek(max(path.stat().st_size - _END.size, 0))
            end = handle.read()
        magic, *_, count, length, _, comment = (
            _END.unpack(end) if len(end) == _END.size else (b"", 0, 0, 0, 0)
        )
        if magic != b"PK\x05\x06" or comment:
            raise ValueError("it does not end as a zip archive does")
        if count > most_arrays or length > most_arrays << 10:
            raise ValueError(f"it lists {count:,} arrays; at most {most_arrays:,} are read")
        with zipfile.ZipFile(path) as archive:
            expanded = sum(info.file_size for info in archive.infolist())
        if expanded > most:
            raise ValueError(
                f"it expands to {expanded:,} bytes; at most {most:,} are read into memory"
            )
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files}
    # members that are no arrays come as bytes
    return {key: value for key, value in found.items() if isinstance(value, np.ndarray)}
