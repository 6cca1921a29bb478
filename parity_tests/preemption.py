"""Kills training runs at random moments and lets them go on, and compares their end with a run that
nobody killed.

    python -m parity_tests.preemption [--runs 40] [--signal KILL|TERM]

Parameters, statistics, optimizer and the loss of every step must be equal bit for bit. Exit status
1 if one is not."""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from flax_resblock import checkpoint

EPOCHS, SAVE_EVERY = 4, 5
FLAGS = f"--epochs {EPOCHS} --batch-size 64 --save-every {SAVE_EVERY} --resume auto".split()


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "flax_resblock", "train", "--out", str(out), *FLAGS]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(out: Path) -> None:
    """Runs until the end."""
    process = start(out)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run in {out} ended with status {process.returncode}: {error}")


def state(out: Path) -> tuple[dict[str, str], str, list[dict[str, float]]]:
    """SHA-256 of every tensor, the rest of the run, and all steps."""
    record = checkpoint.read(out)
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return (
        checkpoint.digests(record.tensors),
        record.metadata["run"],
        [json.loads(line) for line in lines],
    )


def kill(
    process: subprocess.Popen[str], out: Path, rng: random.Random, number: int, before: int
) -> bool:
    """Ends the process at a random moment of its training; False when it was over first."""
    metrics = out / "metrics.jsonl"
    moment = rng.uniform(0, 1.5)
    while process.poll() is None and (not metrics.exists() or metrics.stat().st_size <= before):
        time.sleep(0.01)
        if rng.random() < 0.0005:
            break  # now and then while it starts
    time.sleep(moment)
    if process.poll() is not None:
        return False
    process.send_signal(number)
    process.wait()
    return True


def interrupted(out: Path, rng: random.Random, number: int, *, most: int = 3) -> int:
    """A run that is ended up to ``most`` times; how often it was."""
    times = 0
    for _ in range(most):
        before = (out / "metrics.jsonl").stat().st_size if (out / "metrics.jsonl").exists() else 0
        process = start(out)
        if not kill(process, out, rng, number, before):
            _, error = process.communicate()
            if process.returncode:
                raise RuntimeError(
                    f"the run in {out} ended with status {process.returncode}: {error}"
                )
            return times
        times += 1
        expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
        if process.returncode != expected and process.returncode != -number:
            raise RuntimeError(f"status {process.returncode} after signal {number}")
    finished(out)
    return times


def differences(ours: tuple, theirs: tuple) -> list[str]:
    """What is not equal bit for bit."""
    found = [f"tensor {key}" for key in theirs[0] if ours[0].get(key) != theirs[0][key]]
    found += ["optimizer options, schedule or counters"] if ours[1] != theirs[1] else []
    found += [
        f"step {theirs_['step']}"
        for ours_, theirs_ in zip(ours[2], theirs[2], strict=False)
        if ours_ != theirs_
    ]
    return found + (["number of steps"] if len(ours[2]) != len(theirs[2]) else [])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    number = int(getattr(signal, f"SIG{options.signal}"))
    rng = random.Random(options.seed)
    bad = 0
    kills = 0
    with tempfile.TemporaryDirectory() as folder:
        finished(Path(folder) / "whole")
        truth = state(Path(folder) / "whole")
        for run in range(options.runs):
            out = Path(folder) / f"run{run}"
            times = interrupted(out, rng, number)
            kills += times
            wrong = differences(state(out), truth)
            bad += bool(wrong)
            left = [path.name for path in out.rglob(".*.partial")]
            print(
                f"run {run + 1}: ended {times} times, "
                f"{'equal' if not wrong else 'DIFFERS: ' + ', '.join(wrong[:5])}; temporaries "
                f"left: {len(left)}",
                flush=True,
            )
    print(
        f"{options.runs - bad} of {options.runs} runs equal bit for bit after {kills} x "
        f"SIG{options.signal}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
