"""The folder of compiled programs, so that commands start fast the second time."""

from __future__ import annotations

import os
import time
from collections.abc import MutableMapping
from pathlib import Path

from flax_resblock.errors import reason

VARIABLE = "FLAX_RESBLOCK_CACHE"
"""The folder; empty or ``off`` keeps nothing."""

_FOLDER = "JAX_COMPILATION_CACHE_DIR"
_SWITCH = "JAX_ENABLE_COMPILATION_CACHE"
_SETTINGS = {
    # bytes, beyond which the least recently used are removed; jax also locks the folder then
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(512 << 20),
    # fresh weights and optimizer buffers are many programs of 0.1 to 0.4 s
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    # XLA reports each CPU program that it loads as foreign where LLVM was told to avoid gather:
    # openxla/xla issue 44565
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
"""Defaults of environment variables that jax and XLA read."""

_PROGRAM, _LAST_USE = "-cache", "-atime"
_ABANDONED = 60.0
"""Seconds after which a program without a time of last use counts as half-written."""


def keep_compiled(environment: MutableMapping[str, str]) -> str | None:
    """Makes jax, which must not be imported yet, keep compiled programs in a folder, also in child
    processes; returns a warning if it cannot be used, which they do not repeat.

    The folder is ``$FLAX_RESBLOCK_CACHE``, else ``$JAX_COMPILATION_CACHE_DIR`` with jax's own
    settings, else ``$XDG_CACHE_HOME/flax-resblock/xla``, by default ``~/.cache/flax-resblock/xla``.
    jax's keys hold its version, its flags and the processor's features, so that machines can share
    the folder.
    """
    wanted = environment.get(VARIABLE)
    if wanted is None and environment.get(_FOLDER):
        return None
    if wanted in ("", "off"):
        environment[_SWITCH] = "false"
        return None
    try:
        default = Path(environment.get("XDG_CACHE_HOME") or "~/.cache") / "flax-resblock" / "xla"
        folder = Path(wanted or default).expanduser().absolute()
        _make_own(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        environment[VARIABLE] = "off"
        environment[_SWITCH] = "false"
        where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        return (
            f"compiled programs are not kept, every start compiles anew: {where}{reason(error)}. "
            f"Set {VARIABLE} to a folder of yours, or to off."
        )
    environment[_FOLDER] = str(folder)
    for name, value in _SETTINGS.items():
        environment.setdefault(name, value)
    return None


def _make_own(folder: Path) -> None:
    """Creates the folder, so that only this user can write to it, as programs in it are run, and
    removes what a killed process left half-written."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o002:
        raise OSError(f"others may write to {folder}, and what lies there is run")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} cannot be written to")
    names = set(os.listdir(folder))
    for name in names:
        if name.endswith(_PROGRAM) and name.removesuffix(_PROGRAM) + _LAST_USE not in names:
            program = folder / name
            if time.time() - program.stat().st_mtime > _ABANDONED:
                program.unlink(missing_ok=True)
