"""The last steps before a new file gets its name: its permissions, and the way to the disk."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path


def mode_of_new_files(probe: Path) -> int:
    """The permissions that the umask leaves a new file, found by making one at ``probe``, where
    nothing is: asking for the umask would change it for other threads."""
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def sync(path: Path, mode: int) -> None:
    """Flushes a file, or everything in a folder and the folders themselves; all files get the
    permissions ``mode``, as some writers give theirs to the user alone."""
    if path.is_dir():
        for parent, _, names in os.walk(path):
            for name in names:
                flush(Path(parent) / name, mode)
            flush(Path(parent))
    else:
        flush(path, mode)


def flush(path: Path, mode: int | None = None) -> None:
    """Flushes a file or a folder, which gets the permissions ``mode`` if they are given."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if mode is not None:
            with suppress(OSError):  # some file systems have no permissions
                os.fchmod(descriptor, mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
