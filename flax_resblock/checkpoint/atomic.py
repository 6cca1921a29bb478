"""Outputs that exist whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flax_resblock.checkpoint.orbax_folder import is_orbax
from flax_resblock.errors import InputError

EXPORTED = "model.stablehlo"
"""Marks the folder of an exported network."""

_SUFFIX = ".partial"
_ASIDE = "replaced"
"""Where the old folder waits while the new one takes its name."""
_PATIENCE = 100
"""Attempts, a twentieth of a second apart, to remove a folder that is still being written to."""


def refuse_existing(path: Path, force: bool) -> None:
    """Raises InputError when ``path`` exists and may not be replaced, or cannot be created there."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists. Choose another name, or pass --force (force=True) to replace it.")
    if path.is_dir() and any(path.iterdir()) and not is_orbax(path) and not (path / EXPORTED).is_file():
        raise InputError(f"{path} is a folder that is no checkpoint; it is not replaced, even by force. Choose another name.")


@contextmanager
def replacing(path: Path, *, force: bool = False) -> Iterator[Path]:
    """A temporary path in the same folder that takes the name ``path`` when the block ends well, and vanishes when it does not.

    Args:
      path: The destination, a file or a folder; the block decides which by what it creates at the temporary path.
      force: Replace what is there.
    Raises:
      InputError: The destination exists without ``force``, or its folder cannot be written to.
    """
    _remove_stale(path)
    refuse_existing(path, force)
    scratch: Path | None = None
    try:
        try:
            scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.{os.getpid()}.", suffix=_SUFFIX, dir=path.parent))
        except OSError as error:
            raise InputError(f"{path.parent} cannot be written to: {error.strerror}. Choose another folder.") from error
        temporary = scratch / path.name
        yield temporary
        _sync(temporary)
        refuse_existing(path, force)  # it may have appeared meanwhile
        if os.path.lexists(path) and (temporary.is_dir() or path.is_dir()):
            _swap(temporary, path, scratch / _ASIDE)
        else:
            temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        if scratch is not None:
            _remove(scratch)


def remove(folder: Path) -> None:
    """Removes a checkpoint folder: out of sight at once, and never seen half removed."""
    aside = folder.parent / f".{folder.name}.{os.getpid()}.{_ASIDE}{_SUFFIX}"
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return
    _remove(aside)


def _remove(folder: Path) -> None:
    """Removes a folder into which a background thread of an interrupted writer may still be writing."""
    for _ in range(_PATIENCE):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _remove_stale(path: Path) -> None:
    """Removes temporaries for this destination whose process is gone: it was killed before it could clean up.

    If it was killed between moving the old folder aside and giving the new one its name, the old one gets its name back.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        process = left.name.removeprefix(f".{path.name}.").split(".")[0]
        if process.isdigit() and not _is_running(int(process)):
            if (left / _ASIDE).exists() and not os.path.lexists(path):
                (left / _ASIDE).rename(path)
            _remove(left)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _swap(new: Path, path: Path, aside: Path) -> None:
    """A folder cannot be renamed over what is there: moves that aside first, and back if the second step fails."""
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def _sync(path: Path) -> None:
    for file in [path] if path.is_file() else [child for child in path.rglob("*") if child.is_file()]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
