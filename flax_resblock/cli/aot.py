"""``flax-resblock aot``."""

from __future__ import annotations

import json as json_module
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.table import Table

from flax_resblock.aot.compiler import compile_ahead
from flax_resblock.aot.memory import largest_batch, suggestions
from flax_resblock.aot.outcome import Outcome, computed_in, findings
from flax_resblock.aot.request import BatchStatistics, Dtype, Precision, Request, What, request_for
from flax_resblock.aot.sharding import differences, expected, is_step_on_several
from flax_resblock.checkpoint.atomic import refuse_existing, replacing
from flax_resblock.cli.common import ReadingFlags, output, print_table, status
from flax_resblock.config import ARCHITECTURES, architecture, name_of
from flax_resblock.errors import InputError, some

_GIB = 2**30

Subject = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CKPT|ARCHITECTURE",
        help="A checkpoint, the name of an architecture, or a folder that export wrote.",
    ),
]


@dataclass(frozen=True)
class ProgramFlags:
    """What is compiled."""

    what: What = "forward"
    """Inference, or one training step: forward, backward and an update of SGD with momentum."""
    batch: int = 8
    """Images over all devices."""
    image_size: int | None = None
    """Side of the images; 224 for ImageNet stems, 32 for CIFAR stems, 16 for a bare block."""
    dtype: Dtype = "float32"
    """Of the computation; parameters are float32."""
    precision: Precision = "highest"
    """Of convolutions and products: highest is float32, the strict mode of this library; default is
    bfloat16 on TPU and TF32 on CUDA.
    """
    slot_precision: tuple[str, ...] = ()
    """Slots that differ, as in head=default stem.conv=high."""
    batch_norm: BatchStatistics = "global"
    """Statistics of the global batch, or of each device's share."""
    slices: int = 1
    """TPU slices that train together over the network."""


@dataclass(frozen=True)
class ResultFlags:
    """What is reported."""

    compare: tuple[str, ...] = ()
    """Compile a second program that differs, as in precision=default batch=512, and set both side
    by side.
    """
    largest_batch: bool = False
    """Find the largest batch that fits, by compiling several times."""
    slots: bool = False
    """List every convolution and product."""
    json: Path | None = None
    """Write everything to this file."""
    hlo: Path | None = None
    """Write the optimised program to this file, as text."""
    force: bool = False
    """Replace these files if they exist."""


def aot(
    subject: Subject, target: str, reading: ReadingFlags, program: ProgramFlags, result: ResultFlags
) -> int:
    """Compiles a network for TPUs or GPUs that are not there, and reports what decides parity and
    cost on them: whether it fits in memory, the precision of every convolution and product, the
    communication.

    Exit status 1 when the program does not hold the precision that was asked for, or communicates
    more than it must; 2 when it does not fit.

    Args:
      target: tpu:v4, tpu:v5e, tpu:v5p, tpu:v6e, tpu:7x, with a topology as in tpu:v5e:4x4;
        cuda:a100, cuda:l4, cuda:h100, cuda:h200, with a number as in cuda:h100:8.
      reading: How to read the checkpoint.
      program: What is compiled.
      result: What is reported.
    """
    for path in (result.json, result.hlo):
        if path is not None:
            refuse_existing(path, result.force)
    request, name = _request(subject, target, reading, program)
    if result.hlo is not None:
        request = request.but(hlo=str(result.hlo.resolve()))
    if result.largest_batch:
        return _largest(request, name, result)
    other = _changed(request, result.compare) if result.compare else None
    outcomes = _compile([request] + ([other] if other is not None else []), name)
    _print(request, outcomes[0], name, result.slots)
    if other is not None:
        _print(other, outcomes[1], name, result.slots)
        _print_comparison(request, other, outcomes)
    _write(result, [(request, outcomes[0])] + ([(other, outcomes[1])] if other is not None else []))
    for one, outcome in zip(
        [request] if other is None else [request, other], outcomes, strict=True
    ):
        if not outcome.fits:
            raise InputError(_does_not_fit(one, outcome, name))
    return int(bool(_problems(request, outcomes[0])))


def _request(
    subject: Path, target: str, reading: ReadingFlags, flags: ProgramFlags
) -> tuple[Request, str]:
    """What to compile, and what to call it."""
    size: dict[str, Any] = (
        {} if flags.image_size is None else {"height": flags.image_size, "width": flags.image_size}
    )
    options: dict[str, Any] = {
        "slices": flags.slices,
        "what": flags.what,
        "batch": flags.batch,
        "dtype": flags.dtype,
        "precision": flags.precision,
        "slot_precision": tuple(_pair(text, "--slot-precision") for text in flags.slot_precision),
        "batch_norm": flags.batch_norm,
        **size,
    }
    if (subject / "manifest.json").is_file():
        from flax_resblock.export.stablehlo import open_exported

        exported = open_exported(subject)
        side = flags.image_size or exported.image_size
        if flags.dtype != "float32" or flags.slot_precision:
            raise InputError(
                f"{subject} is an exported network and brings its own dtype and precision; "
                f"leave --dtype and --slot-precision out."
            )
        options |= {"height": side, "width": side, "precision": exported.precision}
        request = Request(subject=str(subject.resolve()), exported=True, target=target, **options)
        request.check()
        return request, f"{exported.architecture} as exported to {subject}"
    if str(subject) in ARCHITECTURES and not subject.exists():
        config = architecture(
            str(subject),
            **({} if reading.num_classes is None else {"num_classes": reading.num_classes}),
        )
    else:
        config = reading.open(subject).config
    return request_for(config, target, **options), name_of(config)


def _pair(text: str, flag: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign or not name or not value:
        raise InputError(f"{flag} {text!r} must be NAME=VALUE.")
    return name, value


def _changed(request: Request, pairs: tuple[str, ...]) -> Request:
    """The second program of a comparison."""
    kinds: dict[str, type] = {
        "target": str,
        "what": str,
        "batch": int,
        "image-size": int,
        "dtype": str,
        "precision": str,
        "batch-norm": str,
        "slices": int,
    }
    values = {
        "what": ("forward", "train-step"),
        "dtype": ("float32", "bfloat16"),
        "precision": ("default", "high", "highest"),
        "batch-norm": ("global", "replica"),
    }
    changes: dict[str, Any] = {"hlo": None}
    for text in pairs:
        name, value = _pair(text, "--compare")
        if name not in kinds:
            raise InputError(
                f"--compare {text!r}: {name!r} cannot be changed; these can: {', '.join(kinds)}."
            )
        if name in values and value not in values[name]:
            raise InputError(f"--compare {text!r}: choose from {', '.join(values[name])}.")
        if kinds[name] is int and not value.isdigit():
            raise InputError(f"--compare {text!r}: {value!r} is no number.")
        changes |= dict.fromkeys(
            ("height", "width") if name == "image-size" else (name.replace("-", "_"),),
            kinds[name](value),
        )
    other = request.but(**changes)
    other.check()
    return other


def _compile(requests: list[Request], name: str) -> list[Outcome]:
    with status.status(f"compiling {name}") as spinner:

        def progress(done: int, seconds: float) -> None:
            of = f" {done + 1} of {len(requests)}" if len(requests) > 1 else ""
            spinner.update(
                f"compiling {name} for {requests[min(done, len(requests) - 1)].target}{of}, "
                f"{seconds:.0f} s (a large training step takes minutes)"
            )

        return compile_ahead(requests, progress)


def _problems(request: Request, outcome: Outcome) -> list[str]:
    if outcome.program is None:
        return []
    return [finding.sentence for finding in findings(request, outcome.program)] + differences(
        request, outcome.program, outcome.devices
    )


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _title(request: Request, outcome: Outcome, name: str) -> str:
    where = f"{request.parsed_target}{f' x {request.slices} slices' if request.slices > 1 else ''}"
    share = f" ({request.batch // outcome.devices} per device)" if outcome.devices > 1 else ""
    mode = (
        f", {request.batch_norm} batch statistics"
        if request.what == "train-step" and outcome.devices > 1
        else ""
    )
    size = f"{request.height} x {request.width}"
    return (
        f"[bold]{name}[/]  {request.what}, batch {request.batch}{share}, {size}, "
        f"{request.dtype}, {request.precision}{mode}; {where}"
    )


def _print(request: Request, outcome: Outcome, name: str, every_slot: bool) -> None:
    output.print(_title(request, outcome, name), soft_wrap=True)
    verb = "refused" if outcome.program is None else "compiled"
    output.print(
        f"  devices      {outcome.devices} x {outcome.device_kind}, {verb} in "
        f"{outcome.seconds:.0f} s with none of them present",
        markup=False,
        soft_wrap=True,
    )
    memory, program = outcome.memory, outcome.program
    if memory is None or program is None:
        return
    room = outcome.capacity - outcome.needed
    verdict = (
        f"fits, {_gib(room)} ({room / outcome.capacity:.0%}) to spare"
        if room >= 0
        else "does not fit"
    )
    parts = (
        f"arguments {_gib(memory.arguments)}, temporaries {_gib(memory.temporaries)}, code "
        f"{_gib(memory.code)}"
    )
    output.print(
        f"  memory       {_gib(outcome.needed)} of {_gib(outcome.capacity)} per device: "
        f"{verdict} ({parts})",
        markup=False,
        soft_wrap=True,
    )
    wrong = findings(request, program)
    narrow = Counter({one.dtype: 0 for one in program.narrow})
    for one in program.narrow:
        narrow[one.dtype] += one.count
    values = (
        ", ".join(f"{count} values of type {dtype}" for dtype, count in narrow.items())
        or "no value narrower than float32"
    )
    held = "as asked for" if not wrong else f"{len(wrong)} not as asked for"
    output.print(
        f"  precision    {len(program.products)} convolutions and products, {held}; {values}",
        style="" if not wrong else "bold red",
        markup=False,
        soft_wrap=True,
    )
    _print_collectives(request, outcome)
    if program.cycles:
        output.print(
            f"  cycles       {program.cycles:,} by the compiler's estimate; good for "
            f"--compare, not for time",
            markup=False,
            soft_wrap=True,
        )
    _print_products(request, outcome, every_slot)
    for sentence in _problems(request, outcome)[:20]:
        output.print(f"  {sentence}", style="red", markup=False, soft_wrap=True)


def _print_collectives(request: Request, outcome: Outcome) -> None:
    assert outcome.program is not None
    kinds = Counter(collective.kind for collective in outcome.program.collectives)
    size = sum(collective.bytes for collective in outcome.program.collectives)
    words = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    several = (
        is_step_on_several(request, outcome.devices) and request.parsed_target.platform == "tpu"
    )
    if several and not differences(request, outcome.program, outcome.devices):
        words += (
            f"; {_gib(size)} per device and run; as expected: "
            f"{expected(request.config, request.batch_norm).reason}"
        )
    elif kinds:
        words += f"; {_gib(size)} per device and run"
    output.print(f"  collectives  {words}", markup=False, soft_wrap=True)


def _print_products(request: Request, outcome: Outcome, every_slot: bool) -> None:
    assert outcome.program is not None
    platform = request.parsed_target.platform
    products = outcome.program.products
    rows: Counter[tuple[str, ...]] = Counter()
    slots: dict[tuple[str, ...], list[str]] = {}
    for product in products:
        facts = (
            product.kind,
            product.direction,
            "{" + ",".join(product.precision) + "}",
            computed_in(platform, product),
        )
        key = ((product.slot or "-", *facts)) if every_slot else facts
        rows[key] += 1
        slots.setdefault(key, []).append(product.slot or "-")
    table = Table(
        *(["slot"] if every_slot else []),
        "kind",
        "direction",
        "precision",
        "computed in",
        "number",
        *([] if every_slot else ["slots"]),
    )
    for key, count in rows.items():
        table.add_row(
            *key, str(count), *([] if every_slot else [some(list(dict.fromkeys(slots[key])))])
        )
    print_table(table)


def _print_comparison(request: Request, other: Request, outcomes: list[Outcome]) -> None:
    first, second = outcomes
    changed = ", ".join(f"{field} {old} -> {new}" for field, old, new in _fields(request, other))
    output.print(f"[bold]{changed}[/]", soft_wrap=True)
    if first.program is None or second.program is None:
        return
    if first.program.cycles and second.program.cycles:
        output.print(
            f"  cycles       x {second.program.cycles / first.program.cycles:.2f}", markup=False
        )
    else:
        output.print("  cycles       the CUDA compiler makes no estimate", markup=False)
    output.print(f"  memory       x {second.needed / first.needed:.2f}", markup=False)
    sizes = [
        sum(collective.bytes for collective in outcome.program.collectives)
        for outcome in outcomes
        if outcome.program is not None
    ]
    if all(sizes):
        output.print(f"  communicated x {sizes[1] / sizes[0]:.2f}", markup=False)


def _fields(request: Request, other: Request) -> list[tuple[str, Any, Any]]:
    left, right = asdict(request), asdict(other)
    return [
        (field, left[field], right[field])
        for field in left
        if left[field] != right[field] and field not in ("hlo", "width")
    ]


def _does_not_fit(request: Request, outcome: Outcome, name: str) -> str:
    more = "at least " if outcome.memory is None else ""
    would = [suggestion.flags(request) for suggestion in suggestions(request, outcome)]
    advice = (
        f"By estimate these would: {'; or '.join(would)}"
        if would
        else "A smaller --image-size or --dtype bfloat16 may help"
    )
    return (
        f"the {request.what} of {name} with batch {request.batch} does not fit: it needs "
        f"{more}{_gib(outcome.needed)} on each of the {outcome.devices} devices "
        f"of {request.parsed_target}, which have {_gib(outcome.capacity)} each. {advice}. "
        f"--largest-batch finds what fits here by compiling."
    )


def _largest(request: Request, name: str, result: ResultFlags) -> int:
    def compile_one(trial: Request) -> Outcome:
        (outcome,) = _compile([trial], f"{name}, batch {trial.batch}")
        verdict = "fits" if outcome.fits else "does not fit"
        output.print(
            f"  batch {trial.batch}: {_gib(outcome.needed)} of {_gib(outcome.capacity)} per "
            f"device, {verdict}",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
        return outcome

    found = largest_batch(request, compile_one)
    if found.outcome is None:
        raise InputError(
            f"not even one image per device of the {request.what} of {name} fits on "
            f"{request.parsed_target}. Choose a chip with more memory."
        )
    best = request.but(batch=found.batch)
    output.print(
        f"the largest batch that fits: [bold]{found.batch}[/]; {found.too_large} does not",
        soft_wrap=True,
    )
    _print(best, found.outcome, name, result.slots)
    _write(result, [(best, found.outcome)])
    return int(bool(_problems(best, found.outcome)))


def _write(result: ResultFlags, compiled: list[tuple[Request, Outcome]]) -> None:
    if result.json is None:
        return
    facts = [
        {
            "request": asdict(request),
            **outcome.to_plain(),
            "fits": outcome.fits,
            "problems": _problems(request, outcome),
        }
        for request, outcome in compiled
    ]
    with replacing(result.json, force=result.force) as temporary:
        temporary.write_text(
            json_module.dumps({"schema": 1, "programs": facts}, indent=1), encoding="utf-8"
        )
    output.print(f"wrote {result.json}", markup=False)
