"""Outputs that exist whole or not at all.

An output is written into a temporary folder beside its destination, flushed to the disk, and
renamed. That folder stays locked while its process lives, so that the next run for the same
destination can remove those that a killed process left behind.
"""

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from flax_resblock.checkpoint.flushing import flush, mode_of_new_files, sync
from flax_resblock.errors import InputError, OutputError

_SUFFIX = ".partial"
_ASIDE = "replaced"
"""Where the old folder waits, where the file system cannot exchange two in one step."""
_REMOVED = "removed"
_PATIENCE = 100
"""Attempts, a twentieth of a second apart, to remove a folder that is still being written to."""
_LOOKS = 4
"""How often, a twentieth of a second apart, the folder of a failed writer must be found absent."""
_ATTEMPTS = 100
"""Attempts to make a temporary folder, which another process may remove before it is locked."""
_AT_CURRENT_FOLDER, _EXCHANGE = -100, 2
"""Arguments of Linux's renameat2."""


def no_folder(_: Path) -> bool:
    """Says of every folder that it may not be replaced."""
    return False


def refuse_existing(
    path: Path, force: bool, replaceable: Callable[[Path], bool] = no_folder
) -> None:
    """Raises InputError for a destination that exists without ``force``, whose folder does not
    exist, or that is a folder with something in it that ``replaceable`` does not know (by default
    none is)."""
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist. Create it first.")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path} exists. Choose another name, or pass `force=True` to replace it.")
    if path.is_dir() and any(path.iterdir()) and not replaceable(path):
        raise InputError(
            f"{path} is a folder of something else than what is to be written there; it is not "
            f"replaced, even with `force=True`. Choose another name."
        )


@contextmanager
def replacing(
    path: Path,
    *,
    force: bool = False,
    companions: Sequence[str] = (),
    replaceable: Callable[[Path], bool] = no_folder,
) -> Iterator[Path]:
    """Yields a temporary path that takes the name ``path`` when the block ends well, and vanishes
    when it does not. It becomes a file or a folder, as the block creates one or the other there.

    Args:
      companions: Names of files that the block writes beside the temporary path; they take their
        places beside ``path`` just before it does.
      force, replaceable: See :func:`refuse_existing`.
    Raises:
      InputError: The destination may not be replaced.
      OutputError: Its folder cannot be written to, or the disk is full or fails; also where the
        block raises an OSError.
    """
    try:
        _remove_stale(path.parent, path.name)
        refuse_existing(path, force, replaceable)
        with _scratch_folder(path) as scratch:
            temporary = scratch / path.name
            yield temporary
            mode = mode_of_new_files(scratch / f"{path.name}.mode")
            for part in (temporary, *(scratch / name for name in companions)):
                sync(part, mode)
            with alone(path.parent):
                refuse_existing(path, force, replaceable)  # it may have appeared meanwhile
                for name in companions:
                    os.replace(scratch / name, path.parent / name)
                _place(temporary, path, scratch / _ASIDE, force)
            flush(path.parent)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written: {error.strerror or error}. Nothing was left there."
        ) from error


_held = threading.local()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes and threads that ask for it out of a folder. It may be nested."""
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
    """Removes a folder in one step, and what killed processes left beside it."""
    if not folder.is_dir():
        return
    with _scratch_folder(folder) as scratch:
        os.replace(folder, scratch / _REMOVED)
    _remove_stale(folder.parent)


def _remove_tree(folder: Path, looks: int = 1) -> None:
    """Removes a folder into which a background thread of an interrupted writer may still write,
    until it was absent ``looks`` times in a row."""
    absent = 0
    for _ in range(_PATIENCE):
        shutil.rmtree(folder, ignore_errors=True)
        absent = 0 if folder.exists() else absent + 1
        if absent == looks:
            return
        time.sleep(0.05)


@contextmanager
def _scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``, locked, and removed at the end."""
    made, lock = _locked_folder(path)
    looks = _LOOKS
    try:
        yield made
        looks = 1
    finally:
        _remove_tree(made, looks)
        os.close(lock)


def _locked_folder(path: Path) -> tuple[Path, int]:
    """A new folder ``.NAME.PROCESS.RANDOM.partial``, and the descriptor that keeps it locked."""
    for _ in range(_ATTEMPTS):
        prefix = f".{path.name}.{os.getpid()}."
        try:
            made = Path(tempfile.mkdtemp(prefix=prefix, suffix=_SUFFIX, dir=path.parent))
        except OSError as error:
            raise OutputError(
                f"{path.parent} cannot be written to: {error.strerror}. Choose another folder."
            ) from error
        with suppress(FileNotFoundError):
            lock = os.open(made, os.O_RDONLY)
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if made.exists():
                return made, lock
            os.close(lock)
    raise OutputError(f"{path.parent} keeps losing what is created there. Choose another folder.")


def _remove_stale(folder: Path, name: str = "") -> None:
    """Removes temporary folders whose process was killed: those for the destination ``name``, or
    all. Where it was killed between moving an old folder aside and giving the new one its name, the
    old one gets its name back."""
    for left in folder.glob(f".{glob.escape(name) or '*'}.*{_SUFFIX}"):
        whose, process, *_ = left.name[1:].rsplit(".", 3)
        if (name and whose != name) or not process.isdigit() or _is_held(left, int(process)):
            continue
        if (left / _ASIDE).exists() and not os.path.lexists(folder / whose):
            os.replace(left / _ASIDE, folder / whose)
        _remove_tree(left)


def _is_held(folder: Path, process: int) -> bool:
    """Whether the process that made a temporary folder lives. It holds the lock, on whichever
    machine it runs; its number says nothing, as numbers are given again, but where there are no
    locks."""
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
    except OSError as error:  # a process of another user lives as well
        return not isinstance(error, ProcessLookupError)
    return True


def _place(new: Path, path: Path, aside: Path, force: bool) -> None:
    """Gives ``new`` the name ``path``, in one step where the system has one."""
    if os.path.lexists(path) and (new.is_dir() or path.is_dir()):
        if not _exchange(new, path):
            _swap(new, path, aside)
    elif force or new.is_dir():
        os.replace(new, path)
    else:
        _create(new, path)


def _create(new: Path, path: Path) -> None:
    """Renames, and refuses to replace what another process put there meanwhile."""
    try:
        os.link(new, path)
    except FileExistsError:
        refuse_existing(path, force=False)
        raise
    except OSError:  # a file system without hard links
        os.replace(new, path)


def _exchange(new: Path, path: Path) -> bool:
    """Exchanges two names in one step, which os.replace cannot do with a folder that is not empty;
    the old folder is then removed with the temporary one. False where the system has no such step.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = (_AT_CURRENT_FOLDER, os.fsencode(new), _AT_CURRENT_FOLDER, os.fsencode(path))
    return renameat2(*names, ctypes.c_uint(_EXCHANGE)) == 0


def _swap(new: Path, path: Path, aside: Path) -> None:
    """Moves what is there aside first, and back if the second step fails."""
    os.replace(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(aside, path)
        raise
