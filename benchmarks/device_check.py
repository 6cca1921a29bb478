"""Whether a GPU or TPU computes what PyTorch computes: everything that can be checked, in one
command of a few minutes.

    python benchmarks/device_check.py --device gpu --out device_check
    python benchmarks/device_check.py --device gpu --out device_check --parts block,resnet50-float32

Each part runs in a process of its own with a time limit, several at a time on a GPU, the most
valuable first. After each part ``device_check.json`` and the page ``device_check.md`` are written.
A second call runs only those parts that are not finished, unless the machine, the versions or the
source have changed. ``--fault`` puts a fault into the Flax side and must make the check fail.

Exit status: 0 if all parts passed, 1 if one failed, 2 for wrong usage, 3 if nothing failed and
something was not finished."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device_page import page
from device_parts import FAULTS, PARTS, QUICK

REPOSITORY = Path(__file__).resolve().parents[1]
NAME = "device_check"
ENDED = ("passed", "failed")
"""Statuses of a part that need no second run."""
FLAGS = {
    "cpu": "--xla_backend_optimization_level=2",
    "gpu": "--xla_gpu_deterministic_ops=true --xla_gpu_enable_triton_gemm=false",
}
"""XLA's flags for every part but the tests: half the time to compile on a CPU; on a GPU the same
kernels in every run and, as for PyTorch, products by cuBLAS."""
MARGIN = 5.0
"""Seconds kept for writing the results."""


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
    """

    kind: str
    quick: bool
    fault: str | None
    jobs: int
    folder: Path

    def start(self, name: str) -> subprocess.Popen[bytes]:
        """Starts one part."""
        command = [sys.executable, str(Path(__file__).with_name("device_parts.py")), name]
        command += [str(self.result(name)), "--device", self.kind]
        command += ["--quick"] if self.quick else []
        command += ["--fault", self.fault] if self.fault else []
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
        flags = (FLAGS.get(self.kind, ""), os.environ.get("XLA_FLAGS", ""))  # yours win
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


def say(name: str, found: Mapping[str, Any]) -> None:
    """Prints how a part ended, and the first of what is wrong."""
    print(f"{found['status']:8}  {name}, {found['seconds']:.0f} s", flush=True)
    wrong = [row for row in found["rows"] if row["passed"] is False]
    lines = [f"{row['subject']}: {row['check']}: {row['figure']}" for row in wrong[:5]]
    lines += found.get("error", "").strip().splitlines()[-5:]
    for line in lines:
        print(f"          {line[:300]}", flush=True)


def end(child: subprocess.Popen[bytes]) -> None:
    """Ends a part and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


class Check:
    """The results so far, and the files that hold them."""

    def __init__(self, out: Path, identity: Mapping[str, Any]) -> None:
        self.out, self.identity = out, dict(identity)
        self.parts: dict[str, dict[str, Any]] = {}
        self.earlier: dict[str, Any] = {"identity": None, "parts": {}}
        with contextlib.suppress(OSError, ValueError):
            self.earlier = json.loads(self.file("json").read_text())

    def file(self, suffix: str) -> Path:
        """One of the two files."""
        return self.out / f"{NAME}.{suffix}"

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Adds one part and writes the files, each in one step. With the machine comes what an
        earlier call finished on the same one."""
        self.parts[name] = found
        if name == "machine":
            facts = [row for row in found["rows"] if row["subject"] == "machine"]
            self.identity[name] = {row["check"]: row["figure"] for row in facts}
            if self.earlier["identity"] == self.identity:
                earlier = self.earlier["parts"].items()
                self.parts = {k: v for k, v in earlier if v["status"] in ENDED} | self.parts
        ordered = {name: self.parts[name] for name in PARTS if name in self.parts}
        content = {"identity": self.identity, "parts": ordered}
        texts = {"json": json.dumps(content, indent=1) + "\n", "md": page(content, PARTS)}
        for suffix, text in texts.items():
            scratch = self.out / f".{NAME}.{suffix}"
            scratch.write_text(text)
            scratch.replace(self.file(suffix))

    def exit_status(self, names: Sequence[str]) -> int:
        """See the module's docstring."""
        states = [self.parts[name]["status"] for name in names if name in self.parts]
        if "failed" in states or any(
            row["passed"] is False for name in names for row in self.parts[name]["rows"]
        ):
            return 1
        fine = all(state == "passed" or state.startswith("skipped") for state in states)
        return 0 if fine else 3


def run_all(
    launch: Launch, check: Check, names: Sequence[str], deadline: float, limit: float | None
) -> None:
    """Runs parts until all have ended or the time is over, see :data:`PARTS` for their limits."""
    waiting, running = list(names), {}
    try:
        while waiting or running:
            while waiting and len(running) < launch.jobs and time.monotonic() < deadline:
                name = waiting.pop(0)
                running[name] = (launch.start(name), time.monotonic())
            for name, (child, begun) in list(running.items()):
                seconds, status = time.monotonic() - begun, None
                if child.poll() is None:
                    if time.monotonic() > deadline:
                        status = "stopped: the time of the whole check was over"
                    elif seconds > (limit or PARTS[name].seconds):
                        status = f"stopped after its limit of {seconds:.0f} s"
                    else:
                        continue
                end(child)
                del running[name]
                check.put(name, launch.outcome(name, status, seconds, child.returncode))
                say(name, check.parts[name])
            if not running and time.monotonic() > deadline:
                for name in waiting:
                    check.put(name, record("not run: the time of the whole check was over"))
                waiting.clear()
            time.sleep(0.1)
    finally:
        for child, _ in running.values():
            end(child)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Checks a GPU, a TPU or this CPU against PyTorch.",
        epilog=f"Parts: {', '.join(PARTS)}.",
    )
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(NAME), help="Folder of the results.")
    parser.add_argument("--parts", help="Names, separated by commas; by default all.")
    parser.add_argument("--quick", action="store_true", help="Small cases of a few parts.")
    parser.add_argument("--time-limit", type=float, default=480, help="Seconds, of everything.")
    parser.add_argument("--part-limit", type=float, help="Seconds, of each part.")
    parser.add_argument("--jobs", type=int, help="Parts at a time; by default as many as suit.")
    parser.add_argument("--fault", choices=FAULTS, help="A fault to put into the Flax side.")
    given = parser.parse_args()
    names = given.parts.split(",") if given.parts else list(QUICK if given.quick else PARTS)
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    deadline = time.monotonic() + given.time_limit - MARGIN
    given.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the parts are ended, too
    cores = os.cpu_count() or 1
    jobs = given.jobs or {"gpu": min(5, max(1, cores // 3)), "cpu": min(4, cores)}.get(
        given.device, 1
    )
    identity = {"device": given.device, "quick": given.quick, "fault": given.fault}
    here = {"anywhere"} if given.device == "cpu" else {"anywhere", "accelerator"}
    here |= {"tf32"} if given.device == "gpu" and torch.cuda.is_available() else set()
    reason = "not on a CPU" if given.device == "cpu" else "needs PyTorch on a GPU, too"
    with tempfile.TemporaryDirectory() as folder:
        launch = Launch(given.device, given.quick, given.fault, jobs, Path(folder))
        check, missing = Check(given.out, identity), ["machine"]
        if check.file("json").exists():  # which results can be kept is known after this part alone
            run_all(launch, check, missing, deadline, given.part_limit)
            missing = []
            for name in [name for name in names if name in check.parts and name != "machine"]:
                print(f"kept      {name}, {check.parts[name]['status']} before", flush=True)
        for name in names:
            if PARTS[name].where not in here:
                check.put(name, record(f"skipped: {reason}"))
            elif name not in check.parts and name not in missing:
                missing.append(name)
        run_all(launch, check, missing, deadline, given.part_limit)
    print(f"{check.file('md')}, {check.file('json')}")
    if check.parts["machine"]["status"] != "passed":
        print(f"The device cannot be used.\n{check.parts['machine']['error']}", file=sys.stderr)
        return 2
    return check.exit_status(names)


if __name__ == "__main__":
    sys.exit(main())
