"""``flax-resblock bench --what accelerator``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flax_resblock.cli import common
from flax_resblock.errors import InputError


@dataclass(frozen=True)
class DeviceFlags:
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


def bench_device(
    architecture: str,
    image_size: int,
    batches: tuple[int, ...],
    rounds: int,
    flags: DeviceFlags,
    json_file: Path | None,
    force: bool,
) -> int:
    """Times JAX against PyTorch on an accelerator; raises InputError for options that do not fit,
    before anything is measured."""
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
