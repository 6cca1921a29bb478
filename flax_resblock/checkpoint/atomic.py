"""Outputs that exist whole or not at all.

An output is written into a folder of its own beside its destination, flushed to the disk, and
renamed. That folder stays locked while its process lives: the next run for the same destination
removes those that nobody holds."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flax_resblock.checkpoint.orbax_folder import is_orbax
from flax_resblock.errors import InputError, OutputError

EXPORTED = "model.stablehlo"
"""Marks the folder of an exported network."""

_SUFFIX = ".partial"
_ASIDE = "replaced"
"""Where the old folder waits while the new one takes its name, where the file system cannot
exchange the two in one step.
"""
_PATIENCE = 100
"""Attempts, a twentieth of a second apart, to remove a folder that is still being written to."""
_ATTEMPTS = 100
"""At making a temporary folder; another process may take one for left behind before it is
locked.
"""
_AT_CURRENT_FOLDER, _EXCHANGE = -100, 2
"""Of Linux's renameat2."""


def refuse_existing(path: Path, force: bool) -> None:
    """Raises InputError when ``path`` exists and may not be replaced, or cannot be created
    there.
    """
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if os.path.lexists(path) and not force:
        raise InputError(
            f"{path} exists. Choose another name, or pass --force (force=True) to replace it."
        )
    if (
        path.is_dir()
        and any(path.iterdir())
        and not is_orbax(path)
        and not (path / EXPORTED).is_file()
    ):
        raise InputError(
            f"{path} is a folder that is no checkpoint; it is not replaced, even by force. "
            f"Choose another name."
        )


@contextmanager
def replacing(path: Path, *, force: bool = False, companions: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary path in the same folder that takes the name ``path`` when the block ends well,
    and vanishes when it does not.

    Args:
      path: The destination, a file or a folder; the block decides which by what it creates at the
        temporary path.
      force: Replace what is there.
      companions: Names of files that the block writes beside the temporary path; they take their
        places beside ``path`` just before it does.
    Raises:
      InputError: The destination exists without ``force``.
      OutputError: Its folder cannot be written to, or the disk is full or fails; from the block
        too.
    """
    scratch = lock = None
    try:
        _remove_stale(path)
        refuse_existing(path, force)
        scratch, lock = _scratch(path)
        temporary = scratch / path.name
        yield temporary
        for part in (temporary, *(scratch / name for name in companions)):
            _sync(part)
        with alone(path.parent):
            refuse_existing(path, force)  # it may have appeared meanwhile
            for name in companions:
                (scratch / name).replace(path.parent / name)
            _place(temporary, path, scratch / _ASIDE, force)
        _flush(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}. Nothing was left there."
        ) from error
    finally:
        if scratch is not None:
            _remove(scratch)
        if lock is not None:
            os.close(lock)


_held = threading.local()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads that ask for it out of a folder; within itself it does
    nothing.
    """
    folders: set[Path] = vars(_held).setdefault("folders", set())
    place = folder.resolve()
    if place in folders:
        yield
        return
    descriptor = os.open(place, os.O_RDONLY)
    folders.add(place)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        folders.discard(place)
        os.close(descriptor)


def remove(folder: Path) -> None:
    """Removes a checkpoint folder: out of sight at once, and never seen half removed. Also what was
    left of such removals by a process that was killed.
    """
    aside = folder.parent / f".{folder.name}.{os.getpid()}.{_ASIDE}{_SUFFIX}"
    try:
        lock = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.rename(aside)
        _remove(aside)
        for left in folder.parent.glob(f".*.{_ASIDE}{_SUFFIX}"):
            process = left.name.split(".")[-3]
            if process.isdigit() and not _is_held(left, int(process)):
                _remove(left)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Removes a folder into which a background thread of an interrupted writer may still be
    writing.
    """
    for _ in range(_PATIENCE):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.05)


def _scratch(path: Path) -> tuple[Path, int]:
    """A new temporary folder for this destination, and the descriptor that keeps it locked."""
    for _ in range(_ATTEMPTS):
        try:
            made = Path(
                tempfile.mkdtemp(
                    prefix=f".{path.name}.{os.getpid()}.", suffix=_SUFFIX, dir=path.parent
                )
            )
        except OSError as error:
            raise OutputError(
                f"{path.parent} cannot be written to: {error.strerror}. Choose another folder."
            ) from error
        with suppress(FileNotFoundError):
            descriptor = os.open(made, os.O_RDONLY)
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if made.exists():
                return made, descriptor
            os.close(descriptor)
    raise OutputError(f"{path.parent} keeps losing what is created there. Choose another folder.")


def _remove_stale(path: Path) -> None:
    """Removes temporaries for this destination whose process is gone: it was killed before it could
    clean up.

    If it was killed between moving the old folder aside and giving the new one its name, the old
    one gets its name back."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{_SUFFIX}"):
        process = left.name.removeprefix(f".{path.name}.").split(".")[0]
        if process.isdigit() and not _is_held(left, int(process)):
            if (left / _ASIDE).exists() and not os.path.lexists(path):
                (left / _ASIDE).rename(path)
            _remove(left)


def _is_held(folder: Path, process: int) -> bool:
    """Whether the process that made it lives: it holds the lock, wherever it runs. Its number says
    nothing, as numbers are given again.

    Where there are no locks, the number is all there is.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES) or _is_running(process)
    finally:
        os.close(descriptor)
    return False


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _place(new: Path, path: Path, aside: Path, force: bool) -> None:
    """Gives ``new`` the name ``path``, in one step where the system has one."""
    if os.path.lexists(path) and (new.is_dir() or path.is_dir()):
        if not _exchange(new, path):
            _swap(new, path, aside)
    elif force or new.is_dir():
        new.replace(path)
    else:
        _create(new, path)


def _create(new: Path, path: Path) -> None:
    """Like a rename that refuses to replace what another process put there meanwhile."""
    try:
        os.link(new, path)
    except FileExistsError:
        refuse_existing(path, force=False)
        raise
    except OSError:  # a file system without hard links
        new.replace(path)


def _exchange(new: Path, path: Path) -> bool:
    """Exchanges two names in one step; False where that cannot be done. The old one is then in the
    temporary folder, and goes with it.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return (
        renameat2(
            _AT_CURRENT_FOLDER,
            os.fsencode(new),
            _AT_CURRENT_FOLDER,
            os.fsencode(path),
            ctypes.c_uint(_EXCHANGE),
        )
        == 0
    )


def _swap(new: Path, path: Path, aside: Path) -> None:
    """A folder cannot be renamed over what is there: moves that aside first, and back if the second
    step fails.
    """
    path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        aside.rename(path)
        raise


def _sync(path: Path) -> None:
    """Flushes a file, or everything in a folder and the folders themselves."""
    if path.is_dir():
        for parent, _, names in os.walk(path):
            for name in names:
                _flush(Path(parent) / name)
            _flush(Path(parent))
    else:
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
