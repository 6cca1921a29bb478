"""Whether a GPU or TPU computes what PyTorch computes: everything that can be checked, in one
command of a few minutes.

    python benchmarks/device_check.py --device gpu --out device_check
    python benchmarks/device_check.py --device gpu --out device_check --parts block,resnet50-float32

Each part runs in a process of its own with a time limit, several at a time on a GPU, the most
valuable first. After each part ``device_check.json`` and the page ``device_check.md`` are written.
A second call runs only those parts that are not finished, unless the machine, the versions or the
source have changed. ``--fault`` puts a fault into the Flax side and must make the check fail.

Comparisons that fail are repeated at the end with other options of XLA, which tells whether the
choice of a kernel explains them. This changes no verdict.

Exit status: 0 if all parts passed, 1 if one failed, 2 for wrong usage, 3 if nothing failed and
something was not finished."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from device_launch import AUTOTUNED, FOLLOW_UPS, Launch, end, record
from device_page import page
from device_parts import FAULTS, PARTS, QUICK

NAME = "device_check"
ENDED = ("passed", "failed")
"""Statuses of a part that need no second run."""
MARGIN = 5.0
"""Seconds kept for writing the results."""


def say(name: str, found: Mapping[str, Any]) -> None:
    """Prints how a part ended, and the first of what is wrong."""
    print(f"{found['status']:8}  {name}, {found['seconds']:.0f} s", flush=True)
    wrong = [row for row in found["rows"] if row["passed"] is False]
    lines = [f"{row['subject']}: {row['check']}: {row['figure']}" for row in wrong[:5]]
    lines += found.get("error", "").strip().splitlines()[-5:]
    for line in lines:
        print(f"          {line[:300]}", flush=True)


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


def follow_up(
    launch: Launch, check: Check, names: Sequence[str], deadline: float, limit: float | None
) -> None:
    """Repeats comparisons that failed under each of :data:`FOLLOW_UPS`, while there is time."""
    for name in names:
        part = check.parts[name]
        wrong = [r for r in part["rows"] if r["passed"] is False and "worst" in r["detail"]]
        subjects = dict.fromkeys(row["subject"].rpartition(", ")[0] for row in wrong)
        known = part.setdefault("again", {}) if wrong else {}
        for label, flags in FOLLOW_UPS.get(launch.kind, {}).items() if wrong else ():
            if label in known or time.monotonic() > deadline:
                continue
            if launch.kind == "gpu":
                log = check.out.resolve() / f"{name}, {label}.txt".replace(", ", "-").replace(
                    " ", "_"
                )
                flags += f" {AUTOTUNED}={log}"
            print(f"repeated  {name}, {label}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                other = replace(launch, flags=flags, subjects=tuple(subjects), folder=Path(folder))
                again = Check(Path(folder), check.identity)
                run_all(other, again, [name], deadline, limit)
            known[label] = again.parts[name] | {"flags": flags}
            check.put(name, part)


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
        follow_up(launch, check, names, deadline, given.part_limit)
    print(f"{check.file('md')}, {check.file('json')}")
    if check.parts["machine"]["status"] != "passed":
        print(f"The device cannot be used.\n{check.parts['machine']['error']}", file=sys.stderr)
        return 2
    return check.exit_status(names)


if __name__ == "__main__":
    sys.exit(main())
