"""``flax-resblock aot``."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import tyro

from flax_resblock.aot.compiler import compile_ahead
from flax_resblock.aot.memory import largest_batch
from flax_resblock.aot.outcome import Outcome
from flax_resblock.aot.request import BatchStatistics, Dtype, Precision, Request, What, request_for
from flax_resblock.cli import aot_report, common
from flax_resblock.config import name_of
from flax_resblock.errors import InputError

Subject = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CKPT|ARCHITECTURE",
        help="A checkpoint, the name of an architecture, or a folder written by export.",
    ),
]


@dataclass(frozen=True)
class ProgramFlags:
    """The program to compile."""

    what: What = "forward"
    """Inference, or one training step: forward, backward and an update of SGD with momentum."""
    batch: int = 8
    """Images over all devices."""
    image_size: int | None = None
    """Side of the images; 224 for ImageNet stems, 32 for CIFAR stems, 16 for a bare block."""
    dtype: Dtype = "float32"
    """Dtype of the computation; parameters are float32."""
    precision: Precision = "highest"
    """Precision of convolutions and products: highest is float32; default is bfloat16 on TPU and
    TF32 on CUDA."""
    slot_precision: tuple[str, ...] = ()
    """Slots with another precision, such as head=default stem.conv=high."""
    batch_norm: BatchStatistics = "global"
    """Statistics of the global batch, or of each device's share."""
    slices: int = 1
    """Number of TPU slices that train together over the network."""


@dataclass(frozen=True)
class ResultFlags:
    """What to report."""

    compare: tuple[str, ...] = ()
    """Compile a second program with these changes, such as precision=default batch=512, and compare
    the two."""
    largest_batch: bool = False
    """Find the largest batch that fits, by compiling several times."""
    slots: bool = False
    """List every convolution and product."""
    json: Path | None = None
    """Write everything to this file."""
    hlo: Path | None = None
    """Write the optimised program to this file, as text."""
    force: common.Force = False


def aot(
    subject: Subject,
    target: str,
    reading: common.ReadingFlags,
    program: ProgramFlags,
    result: ResultFlags,
) -> int:
    """Compiles a network for TPUs or GPUs that need not be present, and reports whether it fits in
    memory, the precision of every convolution and product, and the communication.

    For example:

      flax-resblock aot resnet50 --target tpu:v5e:2x2 --what train-step --batch 1024

    Exit status 1 if the program does not hold the precision that was asked for or communicates more
    than it must, 2 if it does not fit.

    Args:
      target: tpu:v4, tpu:v5e, tpu:v5p, tpu:v6e or tpu:7x, with a topology as in tpu:v5e:4x4;
        cuda:a100, cuda:l4, cuda:h100 or cuda:h200, with a number as in cuda:h100:8.
    """
    common.refuse_all_existing(result.force, result.json, result.hlo)
    request, name = _request(subject, target, reading, program)
    if result.hlo is not None:
        request = request.but(hlo=str(result.hlo.resolve()))
    if result.largest_batch:
        return _largest(request, name, result)
    requests = [request] + ([_changed(request, result.compare)] if result.compare else [])
    outcomes = _compile(requests, name)
    compiled = list(zip(requests, outcomes, strict=True))
    for one, outcome in compiled:
        aot_report.print_outcome(one, outcome, name, result.slots)
    if result.compare:
        aot_report.print_comparison(requests[0], requests[1], outcomes)
    _write(result, compiled)
    for one, outcome in compiled:
        if not outcome.fits:
            raise InputError(aot_report.does_not_fit(one, outcome, name))
    return int(bool(aot_report.problems(*compiled[0])))


def _request(
    subject: Path, target: str, reading: common.ReadingFlags, flags: ProgramFlags
) -> tuple[Request, str]:
    size = flags.image_size
    options: dict[str, Any] = asdict(flags)
    del options["image_size"]
    pairs = tuple(_pair(text, "--slot-precision") for text in flags.slot_precision)
    options["slot_precision"] = pairs
    if size is not None:
        options |= {"height": size, "width": size}
    if (subject / "manifest.json").is_file():
        from flax_resblock.export.exported import open_exported

        exported = open_exported(subject)
        side = size or exported.image_size
        if flags.dtype != "float32" or flags.slot_precision:
            raise InputError(
                f"{subject} is an exported network and brings its own dtype and precision; "
                f"leave --dtype and --slot-precision out."
            )
        options |= {"height": side, "width": side, "precision": exported.precision}
        request = Request(subject=str(subject.resolve()), exported=True, target=target, **options)
        request.check()
        return request, f"{exported.architecture} as exported to {subject}"
    named = common.is_architecture(subject)
    config = reading.named(str(subject)) if named else reading.open(subject).config
    return request_for(config, target, **options), name_of(config)


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise InputError(f"{flag} {text!r} must be NAME=VALUE.")
    return name, value


_CHANGEABLE: dict[str, Any] = {
    "target": str,
    "what": What,
    "batch": int,
    "image-size": int,
    "dtype": Dtype,
    "precision": Precision,
    "batch-norm": BatchStatistics,
    "slices": int,
}
"""Type, or choices, of what --compare can change."""


def _changed(request: Request, pairs: tuple[str, ...]) -> Request:
    changes: dict[str, Any] = {"hlo": None}
    for text in pairs:
        name, value = _pair(text, "--compare")
        if name not in _CHANGEABLE:
            raise InputError(
                f"--compare {text!r}: {name!r} cannot be changed; these can: "
                f"{', '.join(_CHANGEABLE)}."
            )
        kind = _CHANGEABLE[name]
        choices = get_args(kind)
        if choices and value not in choices:
            raise InputError(f"--compare {text!r}: choose from {', '.join(choices)}.")
        if kind is int and not value.isdigit():
            raise InputError(f"--compare {text!r}: {value!r} is no number.")
        fields = ("height", "width") if name == "image-size" else (name.replace("-", "_"),)
        changes |= dict.fromkeys(fields, int(value) if kind is int else value)
    other = request.but(**changes)
    other.check()
    return other


def _compile(requests: list[Request], name: str) -> list[Outcome]:
    with common.status.status(f"compiling {name}") as spinner:

        def progress(done: int, seconds: float) -> None:
            of = f" {done + 1} of {len(requests)}" if len(requests) > 1 else ""
            spinner.update(
                f"compiling {name} for {requests[min(done, len(requests) - 1)].target}{of}, "
                f"{seconds:.0f} s (a large training step takes minutes)"
            )

        return compile_ahead(requests, progress)


def _largest(request: Request, name: str, result: ResultFlags) -> int:
    def compile_one(trial: Request) -> Outcome:
        (outcome,) = _compile([trial], f"{name}, batch {trial.batch}")
        verdict = "fits" if outcome.fits else "does not fit"
        needed, capacity = aot_report.gib(outcome.needed), aot_report.gib(outcome.capacity)
        common.say(f"  batch {trial.batch}: {needed} of {capacity} per device, {verdict}", "dim")
        return outcome

    found = largest_batch(request, compile_one)
    if found.outcome is None:
        raise InputError(
            f"not even one image per device of the {request.what} of {name} fits on "
            f"{request.parsed_target}. Choose a chip with more memory."
        )
    best = request.but(batch=found.batch)
    common.output.print(
        f"the largest batch that fits: [bold]{found.batch}[/]; {found.too_large} does not",
        soft_wrap=True,
    )
    aot_report.print_outcome(best, found.outcome, name, result.slots)
    _write(result, [(best, found.outcome)])
    return int(bool(aot_report.problems(best, found.outcome)))


def _write(result: ResultFlags, compiled: list[tuple[Request, Outcome]]) -> None:
    if result.json is None:
        return
    facts = []
    for request, outcome in compiled:
        verdict = {"fits": outcome.fits, "problems": aot_report.problems(request, outcome)}
        facts.append({"request": asdict(request), **asdict(outcome), **verdict})
    common.write_json(result.json, {"schema": 1, "programs": facts}, result.force)
