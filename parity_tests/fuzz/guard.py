"""Notices what no file may cause: running code, files outside the output folder, much memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CODE = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "subprocess.Popen",
    "pty.spawn",
    "os.startfile",
    "code.__new__",
)
_NETWORK = ("socket.connect", "socket.bind", "socket.sendto", "urllib.Request")
_PATHS = {
    "os.remove": (0,),
    "os.rename": (0, 1),
    "os.mkdir": (0,),
    "os.rmdir": (0,),
    "os.link": (0, 1),
    "os.symlink": (1,),
    "os.truncate": (0,),
}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

CANARY = "flax_resblock_fuzz_canary"
"""Name of the environment variable that code in a mutated file sets, and of the file that it
touches.
"""


class Guard:
    """An audit hook, which cannot be removed: one per process. Only :meth:`watching` uses it."""

    def __init__(self, allowed: Path) -> None:
        self.allowed = allowed.resolve()
        self.found: list[str] = []
        self._active = False
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._active:
            return
        if event.startswith(_CODE) or event in _NETWORK:
            self.found.append(f"code: {event} {str(arguments)[:120]}")
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            self._check(event, arguments[0])
        elif event in _PATHS:
            for position in _PATHS[event]:
                self._check(event, arguments[position])

    def _check(self, event: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = Path(os.path.abspath(os.fsdecode(path)))
            if not place.is_relative_to(self.allowed) and place != Path("/dev/null"):
                self.found.append(f"file outside: {event} {place}")

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """What is found within the block; a list that fills."""
        self.found = []
        self._active = True
        try:
            yield self.found
        finally:
            self._active = False
            touched = [self.allowed / name for name in os.listdir(self.allowed) if CANARY in name]
            if CANARY in os.environ or touched:
                self.found.append("code: the canary was touched")
                os.environ.pop(CANARY, None)
                for file in touched:  # so that the next file is not blamed
                    file.unlink()


def forget_peak() -> int:
    """Forgets the highest memory so far, and returns the present one in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def peak() -> int:
    """The highest memory since :func:`forget_peak`, in bytes."""
    return _memory("VmHWM")


def _memory(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def bound_process(gigabytes: int) -> None:
    """A last resort: an allocation beyond this fails instead of taking the machine down."""
    resource.setrlimit(resource.RLIMIT_DATA, (gigabytes << 30, gigabytes << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
