"""What several commands share: the flags that say how to read a checkpoint, and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from rich.status import Status
from rich.text import Text

from flax_resblock.checkpoint import LIMITS, Limits
from flax_resblock.convert.detection.assumptions import ASSUMABLE_FIELDS
from flax_resblock.convert.opening import (
    OpenedCheckpoint,
    ReadOptions,
    open_checkpoint,
    refuse_afresh,
)
from flax_resblock.convert.run_names import holds_run
from flax_resblock.errors import InputError, some, visible
from flax_resblock.runs.optimizer_state import find_optimizer
from flax_resblock.runs.run import Run
from flax_resblock.runs.run_file import run_of

if TYPE_CHECKING:
    from rich.table import Table


class _Console(Console):
    """A terminal that shows what acts on terminals in names from files as escapes, line breaks too,
    in lines, tables and progress alike.
    """

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is printed or stands in a cell of a table comes through here."""
        return super().render_str(visible(text), **options)

    def status(self, status: Any, **options: Any) -> Status:
        """Progress; its text is plain, whatever brackets a path may have."""
        return super().status(escape(visible(str(status))), **options)


output = _Console(soft_wrap=False, highlight=False)
"""Results."""

status = _Console(stderr=True, highlight=False)
"""Progress; stays out of pipes."""

Checkpoint = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CKPT",
        help=(
            ".pth, .pt, .th, .safetensors (or its index), an Orbax folder, or one of transformers "
            "or timm."
        ),
    ),
]


@dataclass(frozen=True)
class ReadingFlags:
    """How to read the checkpoint where its names and shapes leave it open. All are found by
    themselves in most cases.
    """

    architecture: str | None = None
    """Architecture by name, such as resnet50."""
    naming: str | None = None
    """Naming scheme: torchvision, sequential, kuangliu, akamaster, huggingface, detectron2, flax
    ...; docs/families.md lists them.
    """
    num_classes: int | None = None
    """Size of the logits."""
    stride: int | None = None
    """Stride of a bare block with a projection; its weights do not tell."""
    ignore: tuple[str, ...] = ()
    """Keys to drop, shell-style patterns; none of them in a block of the network."""
    allow_missing: tuple[str, ...] = ()
    """Keys that may be absent and start afresh in `train --init`, shell-style patterns."""
    entry: str | None = None
    """Entry of a training checkpoint that holds the weights, such as model_ema for averaged
    weights.
    """
    stride_on: Literal["3x3", "1x1"] | None = None
    """Which convolution of a bottleneck carries the stride: 3x3 as in torchvision, 1x1 as in
    Caffe's networks. The weights do not show it.
    """
    first_stride: Literal[1, 2] | None = None
    """Stride of the first stage. Tensors tell it for basic blocks only."""
    antialias: Literal["none", "blur"] | None = None
    """Whether strides are blurred, as in timm's resnetblur. The weights do not show it."""
    activation: Literal["relu", "leaky_relu", "gelu", "silu"] | None = None
    """Activation of the stem and the blocks, relu unless told. The weights do not show it."""
    dilated_stages: tuple[int, ...] | None = None
    """Stages (from 1) whose stride is replaced by dilation. The weights do not show it."""
    limits: Limits = LIMITS
    """What the file may declare before it is refused; docs/security.md says why."""

    def open(self, path: Path, *, run: bool = False, afresh: bool = False) -> OpenedCheckpoint:
        """The checkpoint, with the one reading that fits.

        Args:
          path: The checkpoint.
          run: Also read what a training run left in files beside it.
          afresh: Whether weights that are absent may start afresh, as ``allow_missing`` says.
        """
        assumptions = {
            name: value for name in ASSUMABLE_FIELDS if (value := getattr(self, name)) is not None
        }
        reading = ReadOptions(
            self.architecture,
            self.naming,
            self.num_classes,
            self.stride,
            self.ignore,
            self.allow_missing,
            self.limits,
            assumptions,
        )
        source = open_checkpoint(path, reading, entry=self.entry, run=run)
        if not afresh:
            refuse_afresh(source)
        return source


@dataclass(frozen=True)
class RunFlags:
    """What to do with the training run in a checkpoint: optimizer, schedule, counters."""

    with_optimizer: bool = False
    """Carry optimizer, learning-rate schedule and counters too, so that the run goes on where it
    stopped.
    """
    weights_only: bool = False
    """Carry the weights and BatchNorm statistics alone, whatever else is there."""
    optimizer: Literal["sgd", "adam", "adamw", "lars", "lamb"] | None = None
    """The optimizer: of the run in a checkpoint, where the file does not tell (torch before 2.6
    writes Adam and AdamW alike), or of a new run.
    """
    schedule_unit: Literal["batch", "epoch"] | None = None
    """What the learning-rate scheduler counted, where the file does not tell."""

    def of(self, source: OpenedCheckpoint) -> Run:
        """The run in an opened checkpoint."""
        return run_of(
            source,
            optimizer=self.optimizer,
            per_epoch=None if self.schedule_unit is None else self.schedule_unit == "epoch",
        )


def optimizer_left_out(source: OpenedCheckpoint) -> str | None:
    """Where an opened checkpoint has an optimizer; None where it has none."""
    if holds_run(source.record.metadata):
        return "its optimizer"
    found = find_optimizer(source.record.extras)
    return None if found is None else f"its optimizer, entry '{found[0]}',"


def print_found(run: Run) -> None:
    """Every entry of a training checkpoint, and what became of it."""
    for found in run.found:
        output.print(
            f"  {'used   ' if found.used else 'ignored'} {found.name}: {found.use}",
            style="" if found.used else "dim",
            markup=False,
            soft_wrap=True,
        )
    if run.problem:
        output.print(
            f"  note    no schedule: {run.problem}", style="yellow", markup=False, soft_wrap=True
        )


def refuse_unhealthy(source: OpenedCheckpoint, allow: bool) -> None:
    """Raises InputError for NaN, infinities and negative variances, unless they are allowed."""
    if source.unhealthy and not allow:
        raise InputError(
            f"{source.record.source} has values that no healthy checkpoint has: "
            f"{some(source.unhealthy)}. "
            "The training run diverged, or the file is damaged. Pass --allow-nonfinite to "
            "carry them bit for bit."
        )


def print_notes(notes: tuple[str, ...]) -> None:
    """Everything that was unwrapped, dropped or filled."""
    for note in notes:
        output.print(f"  note  {note}", style="yellow", markup=False)


def print_table(table: Table) -> None:
    """A table, at least 100 columns wide where the output is no terminal, so that nothing is cut
    from a log.
    """
    console = (
        output if output.is_terminal else _Console(width=max(output.width, 120), highlight=False)
    )
    console.print(table)


def megabytes(count: int) -> str:
    """``102.0 MB``; small sizes in kB."""
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
