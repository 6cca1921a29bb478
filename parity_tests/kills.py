"""Kills `convert` of a 100 MB checkpoint with SIGKILL at random moments, and looks at what is left.

    python -m parity_tests.kills [--kills 200] [--seed 0]

The destination must be absent, the old file or the new one, whole; and the next run must leave no
temporary. Exit status 1 if that fails once. Half of the moments are anywhere in the run, half while
the output is being written."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch

from flax_resblock import checkpoint
from flax_resblock.checkpoint.record import sidecar_of
from flax_resblock.cli import run
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.convert.opening import open_checkpoint
from flax_resblock.convert.state_map import transcode
from flax_resblock.errors import InputError
from torch_ref import ResNet

NAMES = ("out.safetensors", "out.pth", "out")


def write_sources(folder: Path) -> tuple[Path, Path]:
    """A ResNet-50 of 102 MB, and a network of a few kilobytes that serves as the old output."""
    torch.manual_seed(0)
    large, small = folder / "large.pth", folder / "small.pth"
    torch.save(ResNet(block="bottleneck", depths=(3, 4, 6, 3)).state_dict(), large)
    torch.save(
        ResNet(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=3).state_dict(),
        small,
    )
    return large, small


def expected(source: Path, name: str) -> dict[str, str]:
    """SHA-256 of every tensor of the output."""
    opened = open_checkpoint(source)
    target = StateMap(opened.config, NAMINGS["flax" if name == "out" else "torchvision"])
    return checkpoint.digests(transcode(opened.state_map, target, opened.tensors))


def convert(source: Path, out: Path) -> subprocess.Popen[bytes]:
    convert = ["convert", str(source), str(out), "--force", "--no-certificate"]
    command = [sys.executable, "-m", "flax_resblock", *convert]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def temporaries(out: Path) -> list[Path]:
    return sorted(out.parent.glob(f".{out.name}.*"))


def measured(source: Path, out: Path) -> tuple[float, float]:
    """Seconds of a whole conversion, and of its writing."""
    start = time.monotonic()
    process, began, ended = convert(source, out), 0.0, 0.0
    while process.poll() is None:
        if temporaries(out):
            began, ended = began or time.monotonic(), time.monotonic()
        time.sleep(0.002)
    assert process.returncode == 0
    return time.monotonic() - start, ended - began


def kill_once(source: Path, out: Path, whole: float, writing: float, rng: random.Random) -> bool:
    """Starts a conversion and kills it; False when it was over first."""
    process = convert(source, out)
    if rng.random() < 0.5:
        while process.poll() is None and not temporaries(out):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 1.1 * writing))
    else:
        time.sleep(rng.uniform(0, whole))
    over = process.poll() is not None
    process.kill()
    process.wait()
    return not over


def left(out: Path, old: dict[str, str], new: dict[str, str]) -> str:
    """What the destination is: ``"absent"``, ``"old"``, ``"new"``, or what is wrong with it."""
    if not out.exists() and not out.is_symlink():
        return "absent"
    try:
        found = checkpoint.digests(checkpoint.read(out).tensors)
    except InputError as error:
        return f"DAMAGED: {error}"
    return "old" if found == old else "new" if found == new else "ANOTHER"


def clear(out: Path) -> None:
    """Removes an output."""
    if out.is_dir():
        checkpoint.remove(out)
    out.unlink(missing_ok=True)
    sidecar_of(out).unlink(missing_ok=True)


def kill_many(folder: Path, kills: int, rng: random.Random) -> tuple[Counter[str], int, list[str]]:
    """What was left, by kind and how often; how many kills found a temporary; what went wrong."""
    large, small = write_sources(folder)
    truths = {name: (expected(small, name), expected(large, name)) for name in NAMES}
    times = {name: measured(large, folder / name) for name in NAMES}
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    found = done = 0
    while done < kills:
        name = NAMES[done % len(NAMES)]
        out = folder / name
        begins_with = rng.choice(("old", "absent"))
        if begins_with == "absent":
            clear(out)
        if not kill_once(large, out, *times[name], rng):
            continue
        done += 1
        found += bool(temporaries(out))
        state = left(out, *truths[name])
        outcomes[f"{begins_with} -> {state}"] += 1
        if done % 20 == 0:
            print(f"{done} kills", flush=True)
        if state not in ("new", begins_with):
            wrong.append(f"kill {done}, {name}: {begins_with} became {state}")
        with redirect_stdout(StringIO()):
            assert run(["convert", str(small), str(out), "--force", "--no-certificate"]) == 0, (
                "the next run must succeed"
            )
        remaining = [path.name for path in temporaries(out)]
        if remaining or left(out, *truths[name]) != "old":
            wrong.append(
                f"kill {done}, {name}: after the next run there are {remaining}, and the "
                f"output is {left(out, *truths[name])}"
            )
    return outcomes, found, wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m parity_tests.kills")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcomes, found, wrong = kill_many(Path(folder), options.kills, random.Random(options.seed))
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:5d}  {outcome}")
    print(
        f"{options.kills} kills, {found} of them in the middle of writing; {len(wrong)} went wrong"
    )
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
