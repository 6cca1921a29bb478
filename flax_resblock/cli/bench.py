"""``flax-resblock bench``."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from flax_resblock.cli import common
from flax_resblock.cli.huge_pages import SETTING, VARIABLE
from flax_resblock.errors import InputError, MissingDependencyError

DIFFERENT = 0.01
"""Relative difference of losses or outputs above which the two sides did different work."""


@dataclass(frozen=True)
class AcceleratorFlags:
    """For --what accelerator."""

    device: Literal["gpu", "cpu"] = "gpu"
    """Where both sides compute; cpu tries everything out."""
    minutes: float = 10.0
    """Begin nothing after this time, and end what still runs."""
    parts: tuple[str, ...] = ()
    """What to measure, by name and in this order, such as train-bfloat16 flags-1; by default
    everything, the most important first."""
    jax_flags: tuple[str, ...] = ()
    """For the parts flags-1 and so on: names of sets of options of XLA, or options such as
    '--xla_gpu_enable_pdl=true'; by default all sets that have a name."""
    profile: bool = False
    """Also add up the kernels of every contestant, for the JSON file."""


What = Literal["quick", "full", "train-step", "forward", "inference", "conversion", "accelerator"]


def bench(
    accelerator: AcceleratorFlags,
    what: What = "quick",
    architecture: str | None = None,
    image_size: int | None = None,
    batch: tuple[int, ...] = (),
    rounds: int = 7,
    threads: int | None = None,
    malloc: Literal["huge-pages", "default"] = "huge-pages",
    json_file: Path | None = None,
    png: Path | None = None,
    force: common.Force = False,
) -> int:
    """Times JAX against PyTorch, on this CPU or on a GPU: the same weights and batches, equal
    threads, turn by turn, each in a process of its own.

    For example:

      flax-resblock bench

      flax-resblock bench --what train-step --architecture resnet50 --image-size 224 --batch 8

      flax-resblock bench --what accelerator --minutes 10 --json-file gpu.json

    The table shows medians of the rounds with their quartiles, and the ratio to PyTorch eager
    (channels last) of the same round. Losses and outputs are compared, so that both sides do the
    same work. For meaningful numbers, leave the machine idle otherwise.

    Args:
      accelerator: For --what accelerator.
      what: quick is a training step and an inference of resnet18, two minutes; full is every row of
        the README's table, twenty minutes; accelerator is resnet50 on a GPU in several precisions;
        the others time one thing.
      architecture: Network to time, by default resnet18, of accelerator resnet50; block is a single
        residual block of 64 channels.
      image_size: Side of the square images, by default 32, of accelerator 224; up to 64 the network
        has the stem for small images.
      batch: Images per batch, by default 32; of accelerator one or several sizes, by default 256
        and 64.
      rounds: Turns of each contestant.
      threads: Threads of each process, by default one per core.
      malloc: Whether the allocator asks for huge pages, on both sides, as the train command does.
      json_file: Write all numbers to this file.
      png: Write a picture to this file.
    """
    from importlib.util import find_spec

    from flax_resblock.checkpoint.atomic import replacing
    from flax_resblock.config import architectures

    missing = [name for name in ("torch", "optax") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"bench needs {' and '.join(missing)}: pip install 'flax-resblock[torch,train]'."
        )
    on_device = what == "accelerator"
    architecture = architecture or ("resnet50" if on_device else "resnet18")
    image_size = image_size or (224 if on_device else 32)
    batches: tuple[int, ...] = batch or ((256, 64) if on_device else (32,))
    cores = os.cpu_count() or 1
    threads = cores if threads is None else threads
    if architecture != "block" and architecture not in architectures():
        raise InputError(
            f"--architecture {architecture!r} is unknown; choose block or one of "
            f"{', '.join(architectures())}."
        )
    if min(image_size, *batches, rounds, threads) < 1 or threads > cores:
        raise InputError(
            f"--image-size, --batch, --rounds and --threads must be positive, and threads at "
            f"most the {cores} cores that there are."
        )
    if what == "conversion" and architecture == "block":
        raise InputError(
            "--what conversion times a checkpoint of a network; choose another --architecture "
            "than block."
        )
    if len(batches) > 1 and not on_device:
        raise InputError("--batch takes one number, except with --what accelerator.")
    common.refuse_all_existing(force, json_file, png)
    if on_device:
        return _bench_device(
            architecture, image_size, batches, rounds, accelerator, json_file, force
        )
    from flax_resblock.bench import report
    from flax_resblock.bench.cases import FULL, QUICK, BenchCase
    from flax_resblock.bench.run import measure

    cases = {"quick": QUICK, "full": FULL}.get(what) or (
        BenchCase(what, architecture, image_size, max(batches)),  # pyright: ignore[reportArgumentType]
    )
    common.say(f"{report.machine_line(report.machine())}; {threads} threads, malloc: {malloc}")
    found = []
    allocator = {VARIABLE: SETTING} if malloc == "huge-pages" else {}
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=common.status, transient=True) as progress:
        bar = progress.add_task("", total=len(cases) * rounds)
        for number, case in enumerate(cases):

            def on_progress(
                text: str, done: int, case: BenchCase = case, number: int = number
            ) -> None:
                progress.update(
                    bar, description=f"{case.title}: {text}", completed=number * rounds + done
                )

            results = measure(
                case, rounds=rounds, threads=threads, allocator=allocator, on_progress=on_progress
            )
            found.append((case, results))
            common.print_table(report.table(case, results))
            for result in results:
                if result.failed:
                    common.say(f"{result.contestant}: {result.failed}", "yellow")
            apart = report.disagreement(results)
            same = "the same" if apart <= DIFFERENT else "[bold red]not the same[/]"
            common.output.print(
                f"All computed {same}: first "
                f"{'losses' if case.what == 'train-step' else 'results'} differ by {apart:.1g} "
                f"of their size."
            )
    settings = {"rounds": rounds, "threads": threads, "malloc": malloc}
    if json_file is not None:
        common.write_json(json_file, report.content(found, settings), force)
    if png is not None:
        with replacing(png, force=force) as temporary:
            report.picture(found, temporary)
        common.say(f"wrote {png}")
    return 1 if any(report.disagreement(results) > DIFFERENT for _, results in found) else 0


def _bench_device(
    architecture: str,
    image_size: int,
    batches: tuple[int, ...],
    rounds: int,
    flags: AcceleratorFlags,
    json_file: Path | None,
    force: bool,
) -> int:
    """Times JAX against PyTorch on an accelerator; InputError comes before anything is measured."""
    from flax_resblock.bench import device_report
    from flax_resblock.bench.device_run import run_parts
    from flax_resblock.bench.plan import JAX_FLAGS, parts_of

    if architecture == "block":
        raise InputError("--what accelerator times whole networks; choose another --architecture.")
    if flags.minutes <= 0:
        raise InputError("--minutes must be positive.")
    plan = parts_of(architecture, image_size, batches, flags.jax_flags or tuple(JAX_FLAGS))
    named = {part.name: part for part in plan}
    if unknown := [name for name in flags.parts if name not in named]:
        raise InputError(
            f"--parts {' '.join(unknown)}: there is no such part; choose from {', '.join(named)}."
        )
    chosen = [named[name] for name in flags.parts] or plan
    settings: dict[str, Any] = {"rounds": rounds, **asdict(flags)}
    found = []
    seconds = 60 * flags.minutes
    with common.status.status("starting") as spinner:
        for result in run_parts(
            chosen,
            device=flags.device,
            rounds=rounds,
            seconds=seconds,
            profile=flags.profile,
            on_progress=spinner.update,
        ):
            found.append(result)
            common.print_table(device_report.table(result))
            for sentence in device_report.sentences(result):
                common.say(sentence, "yellow")
            left_out = [part.name for part in chosen[len(found) :]]
            if json_file is not None:  # after each part, so that nothing measured is lost
                content = device_report.content(found, settings, left_out)
                common.write_json(json_file, content, force or len(found) > 1)
    left_out = [part.name for part in chosen[len(found) :]]
    if left_out:
        common.say(f"not measured within {flags.minutes:g} minutes: {' '.join(left_out)}")
    return 1 if any(result.different for result in found) else 0
