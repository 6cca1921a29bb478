"""The processes of the contestants: questions and answers as lines of JSON, with time limits."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def environment_of_workers(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a worker.

    Args:
      folder: For the compilers' caches; those that the user has named are taken instead.
    """
    # the workers do not look for modules in the current folder, so they are told where this is
    folders = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        **os.environ,
        "FLAX_RESBLOCK_CONV_LOWERING": "",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        # also if the user has turned off the command's own: the second start is measured
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        **more,
    }


class Worker:
    """A process of a contestant, with the processes that it starts."""

    def __init__(self, module: str, task: str, environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115  # lives as long as the process
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
        command = [sys.executable, "-P", "-m", module, task]
        self._process = subprocess.Popen(
            command, **pipes, text=True, env=environment, start_new_session=True
        )

    def answer(self, limit: float | None = None) -> dict[str, Any]:
        """The next line.

        Args:
          limit: Seconds that it may take; None waits as long as it takes.
        Raises:
          RuntimeError: The process ended instead, or took longer.
        """
        assert self._process.stdout is not None
        if limit is not None:
            limit = max(0.0, limit)
            ready, _, _ = select.select([self._process.stdout], [], [], limit)
            if not ready:
                raise RuntimeError(f"no answer within {limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise RuntimeError(self._last_error() or f"status {self._process.returncode}")
        return json.loads(line)

    def _last_error(self) -> str:
        """The last line that names an exception, else the last line."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
        named = [line for line in lines if "Error" in line.split(" ")[0]]
        fatal = [line for line in lines if "Unknown flag" in line]
        return (fatal or named or lines or [""])[-1][:300]

    def ask(self, question: Any, limit: float | None = None) -> dict[str, Any]:
        """The answer to a number of repetitions, or to another question; see :meth:`answer`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; its last words follow
            self._process.stdin.write(f"{json.dumps(question)}\n")
            self._process.stdin.flush()
        return self.answer(limit)

    def close(self) -> None:
        """Ends the process and those that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(BrokenPipeError):
            self._process.communicate()
        self._process.wait()
        self._errors.close()
