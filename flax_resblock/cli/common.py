"""What several commands share: flags, the terminal, and writing files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.text import Text

from flax_resblock.checkpoint import LIMITS, Limits, refuse_existing, replacing
from flax_resblock.cli.option_flags import OptionFlags
from flax_resblock.cli.wording import in_flags
from flax_resblock.cli.wrapping import wrapped
from flax_resblock.config import ARCHITECTURES, Config, architecture
from flax_resblock.convert.detection.assumption_rules import ASSUMABLE_FIELDS
from flax_resblock.convert.metadata import EPS
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.naming_file import read_naming
from flax_resblock.convert.opening import (
    OpenedCheckpoint,
    ReadOptions,
    open_checkpoint,
    refuse_afresh,
)
from flax_resblock.convert.own import OpenedTensors
from flax_resblock.convert.run_names import holds_run
from flax_resblock.errors import InputError, some, visible
from flax_resblock.runs.optimizer_state import find_optimizer
from flax_resblock.runs.run import Run
from flax_resblock.runs.run_file import Opened, run_of

if TYPE_CHECKING:
    from rich.table import Table


class _Console(Console):
    """A terminal that escapes control characters and line breaks in names that come from files."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Escapes every string that is printed or shown in the cell of a table."""
        return super().render_str(visible(text), **options)

    def status(self, status: Any, **options: Any) -> Status:
        """Shows progress; brackets in its text are not markup."""
        return super().status(escape(visible(str(status))), **options)


output = _Console(soft_wrap=False, highlight=False)
"""Results."""

status = _Console(stderr=True, highlight=False)
"""Progress, on standard error."""

Force = Annotated[bool, tyro.conf.arg(help="Replace output files that exist.")]
AllowNonfinite = Annotated[
    bool, tyro.conf.arg(help="Accept a checkpoint with NaN, infinities or negative variances.")
]
Mean = Annotated[
    tuple[float, ...] | None,
    tyro.conf.arg(help="Mean of each channel, for pixels from 0 to 1; needs --std."),
]
Std = Annotated[tuple[float, ...] | None, tyro.conf.arg(help="Standard deviation of each channel.")]

Checkpoint = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CKPT",
        help=(
            ".pth, .pt, .th, .safetensors (or its index), .msgpack, .npz, .h5, a pickle of "
            "arrays, an Orbax folder, or a folder of transformers or timm; or a name, "
            "hf-hub:USER/NAME or torchvision:WEIGHTS."
        ),
    ),
]


@dataclass(frozen=True)
class ReadingFlags(OptionFlags):
    """How to read the checkpoint, where its weights do not show it. Most checkpoints need none of
    these."""

    architecture: str | None = None
    """Architecture by name, such as resnet50."""
    naming: str | None = None
    """Naming scheme: torchvision, sequential, kuangliu, akamaster, huggingface, detectron2, flax
    ...; docs/families.md lists them. Or a FILE.toml with one of your own, see `inspect
    --show-naming`."""
    num_classes: int | None = None
    """Number of classes."""
    stride: int | None = None
    """Stride of a bare block with a projection, which cannot be inferred from its weights."""
    ignore: tuple[str, ...] = ()
    """Keys to drop, as shell-style patterns; none of them in a block of the network."""
    allow_missing: tuple[str, ...] = ()
    """Keys that may be absent and are initialised afresh in `train --init`, as shell-style
    patterns."""
    entry: str | None = None
    """Entry of a training checkpoint that holds the weights, such as model_ema for averaged
    weights."""
    assume: Literal["known"] | None = None
    """known accepts everything that had to be assumed, and prints no list of it."""
    limits: Limits = LIMITS
    """Limits on what the file may declare before it is refused; docs/security.md explains them."""

    def open(self, path: Path, *, run: bool = False, afresh: bool = False) -> OpenedCheckpoint:
        """Opens a checkpoint with the one reading that fits: ``run`` also reads what a training run
        left in files beside it, ``afresh`` allows absent weights, as ``allow_missing`` says."""
        reading = self.options()
        source = open_checkpoint(path, reading, entry=self.entry, run=run)
        if not afresh:
            refuse_afresh(source)
        return source

    def options(self) -> ReadOptions:
        """The flags as the library takes them."""
        assumptions = {
            name: value
            for name in (*ASSUMABLE_FIELDS, EPS)
            if (value := getattr(self, name)) is not None
        }
        naming: str | Naming | None = self.naming
        if self.naming is not None and self.naming.endswith(".toml"):
            naming = read_naming(Path(self.naming))
        network = self.architecture, naming, self.num_classes, self.stride
        keys = self.ignore, self.allow_missing
        return ReadOptions(*network, *keys, self.limits, assumptions, self.assume)

    def named(self, name: str) -> Config:
        """An architecture by name, with ``--num-classes`` if given, or raises InputError."""
        classes = {} if self.num_classes is None else {"num_classes": self.num_classes}
        try:
            return architecture(name, **classes)
        except ValueError as error:
            raise InputError(str(error)) from error


@dataclass(frozen=True)
class RunFlags:
    """What to do with the training run in a checkpoint: optimizer, schedule, counters."""

    with_optimizer: bool = False
    """Carry the optimizer, the learning-rate schedule and the counters too, so that the run can
    continue."""
    weights_only: bool = False
    """Carry only the weights and running statistics."""
    optimizer: Literal["sgd", "adam", "adamw", "lars", "lamb"] | None = None
    """The optimizer of a new run, or of a checkpoint that does not say (PyTorch before 2.6 writes
    Adam and AdamW alike)."""
    schedule_unit: Annotated[str | None, tyro.conf.arg(metavar="batch|epoch|N")] = None
    """What the learning-rate scheduler counted, if the checkpoint does not say: batches, epochs, or
    N per optimizer step."""
    lr_lambda: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE.py:NAME")] = ()
    """The function of a LambdaLR or MultiplicativeLR, which no checkpoint holds; one for all param
    groups, or one for each. This runs its code."""

    @property
    def carry(self) -> bool:
        """Whether the run is carried."""
        return self.with_optimizer and not self.weights_only

    def carried(self, source: OpenedCheckpoint | OpenedTensors) -> tuple[Run | None, str | None]:
        """The run to carry, and in words what stays behind unnoticed."""
        if self.carry:
            return self.of(source), None
        return None, None if self.weights_only else optimizer_left_out(source)

    def of(self, source: Opened) -> Run:
        """The run in an opened checkpoint."""
        functions: Any = None
        if self.lr_lambda:
            from flax_resblock.parity.user_code import load_factory

            functions = [load_factory(spec, "lr_lambda") for spec in self.lr_lambda]
            functions = functions if len(functions) > 1 else functions[0]
        return run_of(
            source, optimizer=self.optimizer, schedule_unit=self.schedule_unit, lr_lambda=functions
        )


def arguments_of(kwargs: str | None) -> dict[str, Any] | None:
    """What ``--kwargs`` holds, or raises InputError."""
    try:
        arguments = None if kwargs is None else json.loads(kwargs)
    except ValueError as error:
        raise InputError(
            f"--kwargs {kwargs!r} is no JSON ({error}). Write it like --kwargs "
            f'\'{{"in_channels": 8, "out_channels": 16}}\'.'
        ) from error
    if arguments is not None and not isinstance(arguments, dict):
        raise InputError(f"--kwargs {kwargs!r} must be a JSON object, argument names to values.")
    return arguments


def is_architecture(path: Path) -> bool:
    """Whether an argument is the name of an architecture, and no file of that name exists."""
    return str(path) in ARCHITECTURES and not path.exists()


def say(text: str, style: str = "") -> None:
    """Prints a line as it is, without markup; a terminal shows it in several, see
    :func:`flax_resblock.cli.wrapping.wrapped`. Arguments that a message of the library names
    appear as flags."""
    text = in_flags(text)
    for line in wrapped(text, output.width) if output.is_terminal else [text]:
        output.print(line, style=style, markup=False, soft_wrap=True)


def print_note(text: str) -> None:
    """Prints what the user should know about the input."""
    say(f"  note  {text}", "yellow")


def print_notes(notes: Iterable[str]) -> None:
    """Prints several notes."""
    for note in notes:
        print_note(note)


def print_title(title: str, rest: str) -> None:
    """Prints a line that begins with a name in bold."""
    output.print(f"[bold]{escape(title)}[/]  {escape(rest)}", soft_wrap=True)


def print_table(table: Table) -> None:
    """Prints a table; outside a terminal at least 120 columns wide, so that logs lose nothing."""
    wide = _Console(width=max(output.width, 120), highlight=False)
    (output if output.is_terminal else wide).print(table)


def print_found(run: Run) -> None:
    """Prints every entry of a training checkpoint, and how it is used."""
    for found in run.found:
        style = "" if found.status == "used" else "dim"
        say(f"  {found.status:7} {found.name}: {found.use}", style)
    print_notes(run.assumed)
    if run.problem:
        print_note(f"no schedule: {run.problem}")


def print_carried(run: Run | None, left: str | None) -> None:
    """Prints what :meth:`RunFlags.carried` gave."""
    if run is not None:
        print_found(run)
    elif left:
        words = f"the weights alone; {left} stays behind"
        print_note(f"{words} (--with-optimizer carries the run)")


def refuse_all_existing(force: bool, *paths: Path | None) -> None:
    """Raises InputError if one of the output files exists, unless ``force``."""
    for path in paths:
        if path is not None:
            refuse_existing(path, force)


def write_text(path: Path, text: str, force: bool) -> None:
    """Writes a file, complete or not at all, and says so."""
    with replacing(path, force=force) as temporary:
        temporary.write_text(text, encoding="utf-8")
    say(f"wrote {path}")


def write_json(path: Path, content: Any, force: bool) -> None:
    """Writes a JSON file, complete or not at all, and says so."""
    write_text(path, json.dumps(content, indent=1) + "\n", force)


def optimizer_left_out(source: OpenedCheckpoint | OpenedTensors) -> str | None:
    """Names the optimizer state in an opened checkpoint; None if it has none."""
    if holds_run(source.record.metadata):
        return "its optimizer"
    found = find_optimizer(source.record.extras)
    return None if found is None else f"its optimizer, entry '{found[0]}',"


def refuse_unhealthy(source: OpenedCheckpoint | OpenedTensors, allow: bool) -> None:
    """Raises InputError for NaN, infinities and negative variances, unless they are allowed."""
    if source.unhealthy and not allow:
        raise InputError(
            f"{source.record.source} has values that no healthy checkpoint has: "
            f"{some(source.unhealthy)}. The training run diverged, or the file is damaged. Pass "
            "--allow-nonfinite to carry them bit for bit."
        )


def megabytes(count: int) -> str:
    """``102.0 MB``; small sizes in kB."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
