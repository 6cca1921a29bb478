"""What ``flax-resblock aot`` prints about a compiled program."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from rich.table import Table

from flax_resblock.aot.hlo import CompiledProgram
from flax_resblock.aot.memory import suggestions
from flax_resblock.aot.outcome import Outcome, computed_in, findings
from flax_resblock.aot.request import Request
from flax_resblock.aot.sharding import differences, expected, is_step_on_several
from flax_resblock.cli.common import output, print_table, say
from flax_resblock.errors import some

_GIB = 2**30


def problems(request: Request, outcome: Outcome) -> list[str]:
    """Where the program does not hold the precision asked for, or communicates too much."""
    if outcome.program is None:
        return []
    return [finding.sentence for finding in findings(request, outcome.program)] + differences(
        request, outcome.program, outcome.devices
    )


def gib(count: int) -> str:
    """``1.25 GiB``; small sizes in MiB."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def print_outcome(request: Request, outcome: Outcome, name: str, every_slot: bool) -> None:
    """Prints devices, memory, precision, communication and every problem of a program."""
    output.print(_title(request, outcome, name), soft_wrap=True)
    verb = "refused" if outcome.program is None else "compiled"
    say(
        f"  devices      {outcome.devices} x {outcome.device_kind}, {verb} in "
        f"{outcome.seconds:.0f} s with none of them present"
    )
    memory, program = outcome.memory, outcome.program
    if memory is None or program is None:
        return
    left = outcome.capacity - outcome.needed
    verdict = f"fits, {gib(left)} ({left / outcome.capacity:.0%}) to spare"
    say(
        f"  memory       {gib(outcome.needed)} of {gib(outcome.capacity)} per device: "
        f"{verdict if left >= 0 else 'does not fit'} (arguments {gib(memory.arguments)}, "
        f"temporaries {gib(memory.temporaries)}, code {gib(memory.code)})"
    )
    wrong, narrow = findings(request, program), Counter[str]()
    for one in program.narrow:
        narrow[one.dtype] += one.count
    values = ", ".join(f"{count} values of type {dtype}" for dtype, count in narrow.items())
    held = "as asked for" if not wrong else f"{len(wrong)} not as asked for"
    say(
        f"  precision    {len(program.products)} convolutions and products, {held}; "
        f"{values or 'no value narrower than float32'}",
        "bold red" if wrong else "",
    )
    _print_collectives(request, outcome, program)
    if program.cycles:
        say(
            f"  cycles       {program.cycles:,} by the compiler's estimate; good for --compare, "
            "not for time"
        )
    _print_products(request, program, every_slot)
    for sentence in problems(request, outcome)[:20]:
        say(f"  {sentence}", "red")


def _title(request: Request, outcome: Outcome, name: str) -> str:
    several = outcome.devices > 1
    slices = f" x {request.slices} slices" if request.slices > 1 else ""
    share = f" ({request.batch // outcome.devices} per device)" if several else ""
    step = request.what == "train-step"
    mode = f", {request.batch_norm} batch statistics" if step and several else ""
    return (
        f"[bold]{name}[/]  {request.what}, batch {request.batch}{share}, {request.height} x "
        f"{request.width}, {request.dtype}, {request.precision}{mode}; "
        f"{request.parsed_target}{slices}"
    )


def _print_collectives(request: Request, outcome: Outcome, program: CompiledProgram) -> None:
    kinds = Counter(collective.kind for collective in program.collectives)
    words = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
    on_tpu = request.parsed_target.platform == "tpu"
    several = on_tpu and is_step_on_several(request, outcome.devices)
    as_expected = several and not differences(request, program, outcome.devices)
    if kinds or as_expected:
        words += f"; {gib(_communicated(program))} per device and run"
    if as_expected:
        words += f"; as expected: {expected(request.config, request.batch_norm).reason}"
    say(f"  collectives  {words}")


def _communicated(program: CompiledProgram) -> int:
    return sum(collective.bytes for collective in program.collectives)


def _print_products(request: Request, program: CompiledProgram, every_slot: bool) -> None:
    platform = request.parsed_target.platform
    slots: dict[tuple[str, ...], list[str]] = {}
    for product in program.products:
        precision = "{" + ",".join(product.precision) + "}"
        facts = (product.kind, product.direction, precision, computed_in(platform, product))
        slot = product.slot or "-"
        slots.setdefault((slot, *facts) if every_slot else facts, []).append(slot)
    columns = ("kind", "direction", "precision", "computed in", "number")
    table = Table(*(("slot", *columns) if every_slot else (*columns, "slots")))
    for key, names in slots.items():
        listed = [] if every_slot else [some(list(dict.fromkeys(names)))]
        table.add_row(*key, str(len(names)), *listed)
    print_table(table)


def print_comparison(request: Request, other: Request, outcomes: list[Outcome]) -> None:
    """Prints how the costs of two programs differ."""
    left, right = asdict(request), asdict(other)
    fields = [name for name in left if left[name] != right[name] and name not in ("hlo", "width")]
    changed = ", ".join(f"{name} {left[name]} -> {right[name]}" for name in fields)
    output.print(f"[bold]{changed}[/]", soft_wrap=True)
    first, second = (outcome.program for outcome in outcomes)
    if first is None or second is None:
        return
    if first.cycles and second.cycles:
        say(f"  cycles       x {second.cycles / first.cycles:.2f}")
    else:
        say("  cycles       the CUDA compiler makes no estimate")
    say(f"  memory       x {outcomes[1].needed / outcomes[0].needed:.2f}")
    sizes = _communicated(first), _communicated(second)
    if all(sizes):
        say(f"  communicated x {sizes[1] / sizes[0]:.2f}")


def does_not_fit(request: Request, outcome: Outcome, name: str) -> str:
    """The error message for a program that needs more memory than the devices have."""
    more = "at least " if outcome.memory is None else ""
    would = [
        ("" if one.target == request.target else f"--target {one.target} ") + f"--batch {one.batch}"
        for one in suggestions(request, outcome)
    ]
    advice = (
        f"By estimate these would: {'; or '.join(would)}"
        if would
        else "A smaller --image-size or --dtype bfloat16 may help"
    )
    return (
        f"the {request.what} of {name} with batch {request.batch} does not fit: it needs "
        f"{more}{gib(outcome.needed)} on each of the {outcome.devices} devices "
        f"of {request.parsed_target}, which have {gib(outcome.capacity)} each. {advice}. "
        f"--largest-batch finds what fits here by compiling."
    )
