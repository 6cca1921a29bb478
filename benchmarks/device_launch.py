"""How the parts of the device check are started and ended, and under which options of XLA."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
FLAGS = {
    "cpu": "--xla_backend_optimization_level=2",
    "gpu": "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false",
}
"""XLA's flags for every part but the tests: half the time to compile on a CPU; on a GPU the same
kernels in every run and, as for PyTorch, products by cuBLAS."""
FOLLOW_UPS: Mapping[str, Mapping[str, str]] = {
    "cpu": {"not optimised": "--xla_backend_optimization_level=0"},
    "gpu": {
        "no autotuning": "--xla_gpu_autotune_level=0",
        "any kernel": "--xla_gpu_deterministic_ops=false",
        "any kernel, no autotuning": "--xla_gpu_deterministic_ops=false --xla_gpu_autotune_level=0",
    },
}
"""Options that choose other kernels, for comparisons that failed."""
AUTOTUNED = "--xla_gpu_dump_autotune_logs_to"
"""Option that names a file for the kernels that were tried and chosen."""


def record(status: str, seconds: float = 0.0, **facts: Any) -> dict[str, Any]:
    """What the JSON file holds of one part."""
    return {"status": status, "seconds": round(seconds, 1), "rows": []} | facts


@dataclass(frozen=True)
class Launch:
    """How parts are started.

    Attributes:
      kind: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      quick, fault: As on the command line.
      jobs: How many run at a time.
      folder: For results and logs of the parts.
      flags: More options of XLA.
      subjects: The only cases to compare; empty for all.
    """

    kind: str
    quick: bool
    fault: str | None
    jobs: int
    folder: Path
    flags: str = ""
    subjects: tuple[str, ...] = ()

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Starts one part."""
        command = [sys.executable, str(Path(__file__).with_name("device_parts.py")), name]
        command += [str(self.result(name)), "--device", self.kind]
        command += ["--quick"] if self.quick else []
        command += ["--fault", self.fault] if self.fault else []
        command += ["--subjects", *self.subjects] if self.subjects else []
        self.result(name).unlink(missing_ok=True)
        with self.log(name).open("wb") as log:
            return subprocess.Popen(
                command,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def result(self, name: str) -> Path:
        """Where a part writes its rows."""
        return self.folder / f"{name}.json"

    def log(self, name: str) -> Path:
        """Where the output of a part goes."""
        return self.folder / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        """Both frameworks share the device, and all parts share the cores. The switch of cuBLAS
        must be set before its first use."""
        environment = dict(os.environ)
        environment.pop("JAX_PLATFORMS", None)
        folders = [str(REPOSITORY), os.environ.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        environment["PYTHONUNBUFFERED"] = "1"
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        if self.jobs > 1:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.jobs))
        if self.kind == "cpu":
            environment["JAX_PLATFORMS"] = "cpu"
        yours = os.environ.get("XLA_FLAGS", "")
        flags = (FLAGS.get(self.kind, ""), yours, self.flags)  # the last one wins
        environment["XLA_FLAGS"] = " ".join(filter(None, flags))
        return environment

    def outcome(self, name: str, status: str | None, seconds: float, code: int) -> dict[str, Any]:
        """The record of a part that has ended with an exit status ``code``, or, if ``status`` is
        given, that was ended."""
        found: dict[str, Any] = {"rows": [], "finished": False}
        if self.result(name).exists():
            found = json.loads(self.result(name).read_text())
        if found.pop("finished"):
            wrong = any(row["passed"] is False for row in found["rows"])
            return record("failed" if wrong else "passed", seconds, **found)
        output = self.log(name).read_text(errors="replace")
        status = status or f"ended with exit status {code}"
        return record(status, seconds, **found, error=output[-12000:])


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a part and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
