"""What a conversion costs against a plain copy of the same bytes: time in memory and end to end,
and peak memory of the command.

    python benchmarks/convert.py [--architecture resnet50] [--rounds 7]

Times are medians of interleaved rounds with their quartiles; peaks are of whole processes, less
what the same conversion of a tiny checkpoint needed."""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import numpy as np

from flax_resblock import checkpoint
from flax_resblock.config import architecture
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.convert.state_map import transcode


def random_state(name: str) -> dict[str, np.ndarray]:
    """A state dict of the architecture with random values."""
    rng = np.random.default_rng(0)
    state = {}
    for entry in StateMap(architecture(name), NAMINGS["torchvision"]).entries:
        shape = entry.torch_shape
        state[entry.torch_key] = (
            np.array(7, np.int64)
            if entry.role == "counter"
            else rng.random(shape, np.float32) + np.float32(0.1)
        )
    return state


def interleaved(cases: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds per round of every case, run in turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(rounds + 1):
        for name, case in cases.items():
            start = time.perf_counter()
            kept = case()
            elapsed = time.perf_counter() - start
            del kept
            if round_number:  # the first round warms up
                times[name].append(elapsed)
    return times


def spread(values: list[float], scale: float = 1.0) -> str:
    """Median and quartiles."""
    low, middle, high = (value * scale for value in statistics.quantiles(values, n=4))
    return f"{middle:8.1f} [{low:.1f} .. {high:.1f}]"


def in_memory(name: str, rounds: int) -> None:
    """Prints the time of the conversion of arrays in memory against one copy of each array."""
    from flax_resblock.io import from_torch

    state = random_state(name)
    state_map = StateMap(architecture(name), NAMINGS["torchvision"])
    size = sum(value.nbytes for value in state.values())
    flax = state_map.to_flax(state)
    cases: dict[str, Callable[[], object]] = {
        "copy once per array": lambda: {key: np.copy(value) for key, value in state.items()},
        "to Flax layout": lambda: state_map.to_flax(state),
        "to PyTorch layout": lambda: state_map.to_torch(flax),
        "from_torch (whole nnx model on the device)": lambda: from_torch(state),
    }
    times = interleaved(cases, rounds)
    base = statistics.median(times["copy once per array"])
    print(
        f"{name}, {size / 1e6:.0f} MB in {len(state)} tensors, median of {rounds} interleaved "
        f"rounds [quartiles]"
    )
    for case, values in times.items():
        print(
            f"  {case:<44}{spread(values, 1e3)} ms  {statistics.median(values) / base:5.2f} x "
            f"the copy"
        )


def from_file(name: str, rounds: int) -> None:
    """Prints the time from a file in the page cache to jax arrays, against one copy of its bytes
    and the reading of the file."""
    from flax_resblock import load
    from flax_resblock.convert.opening import open_checkpoint
    from flax_resblock.io import arrays_of

    def arrays(path: Path) -> object:
        return jax.block_until_ready(arrays_of(open_checkpoint(path)))

    with tempfile.TemporaryDirectory() as folder:
        write_sources(Path(folder), name)
        files = [Path(folder, file) for file in ("torch.safetensors", "zip.pth")]
        for file in files:  # the same without, and with SHA-256 of the tensors
            shutil.copy(file, file.with_stem("plain"))
            checkpoint.write(file.with_stem("hashed"), dict(checkpoint.read(file).tensors))
        content = np.fromfile(files[0], np.uint8)
        warm = np.empty_like(content)
        copies: dict[str, Callable[[], object]] = {
            "fresh": content.copy,
            "warm": lambda: np.copyto(warm, content),
        }
        cases = dict(copies)
        for file in files:
            plain, hashed, suffix = file.with_stem("plain"), file.with_stem("hashed"), file.suffix
            cases |= {
                f"read {suffix}": plain.read_bytes,
                f"arrays {suffix}": partial(arrays, plain),
                f"hashed {suffix}": partial(arrays, hashed),
                f"model {suffix}": partial(load, plain),
            }
        times = interleaved(cases, rounds)
    print(
        f"{name} from a file of {len(content) / 1e6:.0f} MB in the page cache, median of "
        f"{rounds} interleaved rounds [quartiles]"
    )
    print(f"  one copy of its bytes into fresh pages (the base)  {spread(times['fresh'], 1e3)} ms")
    print(f"  one copy of its bytes into warm pages              {spread(times['warm'], 1e3)} ms")
    for suffix in (file.suffix for file in files):
        print(
            f"  {suffix:<13}reading its bytes into fresh memory  "
            f"{spread(times[f'read {suffix}'], 1e3)} ms"
        )
        for case, what in (
            ("arrays", "to jax arrays"),
            ("hashed", "to jax arrays, SHA-256 checked"),
            ("model", "flax_resblock.load, an nnx model"),
        ):
            rows = zip(
                times[f"{case} {suffix}"], times[f"read {suffix}"], times["fresh"], strict=True
            )
            ratios = [(whole - read) / copy for whole, read, copy in rows]
            print(
                f"  {'':<13}{what:<38}{spread(times[f'{case} {suffix}'], 1e3)} ms; less the "
                f"reading, in copies:{spread(ratios)}"
            )


_PEAK = """
import sys
sys.path[:0] = [{root!r}]
from flax_resblock import load
from flax_resblock.cli import run
def work(command, *arguments):
    return load(*arguments) is None if command == "load" else run([command, *arguments])
def peak():
    return next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
work(*{warm_up!r})
before = peak()
print(int(work(*{arguments!r})), before, peak(), file=sys.stderr)
"""


def peak(arguments: list[str], warm_up: list[str]) -> int:
    """Bytes by which the command, or ``load``, raised the peak memory of its process above what it
    had needed for a tiny checkpoint."""
    root = str(Path(__file__).resolve().parents[1])
    code = _PEAK.format(root=root, arguments=arguments, warm_up=warm_up)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    status, before, after = (int(number) for number in result.stderr.split()[-3:])
    if status:
        raise SystemExit(f"flax-resblock {' '.join(arguments)} failed: {result.stderr}")
    return (after - before) * 1024


def write_sources(folder: Path, name: str) -> int:
    """Writes the architecture in every format that can be read; returns its size in bytes."""
    import torch

    from flax_resblock.checkpoint.orbax_folder import write_orbax
    from flax_resblock.checkpoint.safetensors_file import write_safetensors
    from flax_resblock.checkpoint.torch_file import write_torch

    state = random_state(name)
    state_map = StateMap(architecture(name), NAMINGS["torchvision"])
    flax = transcode(state_map, StateMap(architecture(name), NAMINGS["flax"]), state)
    write_torch(folder / "zip.pth", state, {})
    torch.save(
        {key: torch.from_numpy(value) for key, value in state.items()},
        folder / "legacy.pth",
        _use_new_zipfile_serialization=False,
    )
    write_safetensors(folder / "torch.safetensors", state, {})
    write_safetensors(folder / "flax.safetensors", flax, {})
    write_orbax(folder / "orbax", flax, {})
    return sum(value.nbytes for value in state.values())


def end_to_end(name: str) -> None:
    """Prints peak memory of ``flax-resblock convert --no-certificate`` between the formats: of the
    conversion, without the verification behind it."""
    cases = [
        ("zip.pth", "out.safetensors", ["--to-naming", "flax"]),
        ("zip.pth", "out.safetensors", []),
        ("zip.pth", "out", []),
        ("legacy.pth", "out.safetensors", ["--to-naming", "flax"]),
        ("torch.safetensors", "out.pth", []),
        ("torch.safetensors", "out", []),
        ("flax.safetensors", "out.pth", ["--to-naming", "torchvision"]),
        ("orbax", "out.pth", []),
        ("orbax", "out.safetensors", ["--to-naming", "torchvision"]),
    ]
    with tempfile.TemporaryDirectory() as big, tempfile.TemporaryDirectory() as tiny:
        size = write_sources(Path(big), name)
        write_sources(Path(tiny), "resnet20")
        print(
            f"peak memory beyond interpreter and imports, in sizes of the checkpoint "
            f"({size / 1e6:.0f} MB): flax_resblock.load"
        )
        for source in ("zip.pth", "legacy.pth", "torch.safetensors", "flax.safetensors", "orbax"):
            most = peak(["load", f"{big}/{source}"], ["load", f"{tiny}/{source}"])
            print(f"  {source:<18}{most / size:5.2f} x")
        print(
            f"peak memory of `flax-resblock convert --no-certificate` beyond interpreter and "
            f"imports, in sizes of the checkpoint ({size / 1e6:.0f} MB)"
        )
        for source, target, flags in cases:
            flags_of_all = ["--force", "--no-certificate", *flags]
            arguments, warm_up = (
                ["convert", f"{folder}/{source}", f"{folder}/{target}", *flags_of_all]
                for folder in (big, tiny)
            )
            extra = peak(arguments, warm_up)
            print(f"  {source:<18} -> {target:<16}{' '.join(flags):<24}{extra / size:5.2f} x")


def main() -> None:
    """Runs all parts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", default="resnet50")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    in_memory(arguments.architecture, arguments.rounds)
    from_file(arguments.architecture, arguments.rounds)
    end_to_end(arguments.architecture)


if __name__ == "__main__":
    main()
