"""``flax-resblock train --eval-only``: what a checkpoint makes of the test images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from flax_resblock import checkpoint
from flax_resblock.cli.common import ReadingFlags, output, print_notes, print_table, status
from flax_resblock.cli.train_start import model_of, opened
from flax_resblock.config import ResNetConfig, name_of
from flax_resblock.convert.run_names import holds_run
from flax_resblock.errors import InputError
from flax_resblock.runs.run_file import run_of

if TYPE_CHECKING:
    from flax_resblock.training import TrainConfig

_SHOWN = 12
"""Classes up to which the whole confusion matrix is shown; above, the pairs that are confused most
often.
"""


def classify(
    path: Path,
    reading: ReadingFlags,
    preset: TrainConfig,
    given: dict[str, Any],
    devices: int | None,
    out: Path | None,
    strict: bool,
) -> int:
    """Prints accuracy and confusion matrix of a checkpoint on the test images, each counted once;
    writes them to ``out`` where given.
    """
    from flax_resblock.training import data_mesh
    from flax_resblock.training.config import with_settings
    from flax_resblock.training.devices import Placement
    from flax_resblock.training.evaluation import confusion_matrix, evaluate_source

    if out is not None:
        checkpoint.refuse_existing(out, force=False)
    with status.status(f"reading {path}"):
        source = reading.open(path)
    if not isinstance(source.config, ResNetConfig) or source.config.num_classes is None:
        raise InputError(
            f"{path} has no head, so it has no classes to tell. Give a network with one."
        )
    record = source.record
    stored = run_of(source).settings if holds_run(record.metadata) else {}
    of_data = {name: stored[name] for name in ("data", "image_size") if name in stored}
    config = with_settings(
        replace(preset, model=source.config),
        of_data | {name: value for name, value in given.items() if name != "freeze"},
    )
    print_notes(source.notes)
    test = opened(config, strict).test
    if test.num_classes > source.config.num_classes or test.shape[-1] != source.config.in_channels:
        raise InputError(
            f"{path} takes {source.config.in_channels} channels and knows "
            f"{source.config.num_classes} classes; {test.name} has {test.shape[-1]} channels "
            f"and "
            f"{test.num_classes} classes. Choose its data with --data."
        )
    with status.status(f"classifying {len(test):,} images"):
        found = evaluate_source(
            model_of(source, config.dtype),
            test,
            placement=Placement(data_mesh(devices)),
            workers=config.workers,
        )
    counts = confusion_matrix(test.labels, found.predictions, source.config.num_classes)
    names = test.class_names or tuple(str(number) for number in range(source.config.num_classes))
    names += tuple(str(number) for number in range(len(names), source.config.num_classes))
    output.print(f"[bold]{name_of(source.config)}[/]  {path}  on {test.name}", soft_wrap=True)
    output.print(
        f"accuracy {found.accuracy:.2%}  ({int(np.trace(counts)):,} of {len(test):,})   "
        f"cross-entropy {found.loss:.4f}"
    )
    print_table(_confusion_table(counts, names))
    if out is not None:
        _write(out, found.accuracy, found.loss, counts, names, test.name)
        output.print(f"wrote {out}", markup=False)
    return 0


def _confusion_table(counts: np.ndarray, names: tuple[str, ...]) -> Table:
    present = np.flatnonzero(counts.sum(axis=1) + counts.sum(axis=0))
    if len(present) <= _SHOWN:
        table = Table(
            title="rows: what the images show; columns: what they were taken for",
            title_justify="left",
        )
        for column in ("", *(names[number] for number in present), "right"):
            table.add_column(column, justify="right")
        for row in present:
            right = counts[row, row] / max(counts[row].sum(), 1)
            cells = [
                ("[bold]{}[/]" if row == column else "{}").format(counts[row, column] or "·")
                for column in present
            ]
            table.add_row(names[row], *cells, f"{right:.1%}")
        return table
    table = Table(title="most frequent confusions", title_justify="left")
    for column in ("shown", "taken for", "times", "share"):
        table.add_column(column, justify="right")
    wrong = counts - np.diag(np.diag(counts))
    for place in np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN]:
        row, column = np.unravel_index(place, wrong.shape)
        if wrong[row, column]:
            table.add_row(
                names[row],
                names[column],
                f"{wrong[row, column]:,}",
                f"{wrong[row, column] / counts[row].sum():.1%}",
            )
    return table


def _write(
    out: Path, accuracy: float, loss: float, counts: np.ndarray, names: tuple[str, ...], data: str
) -> None:
    from flax_resblock.training.curves import draw_confusion

    content = {
        "data": data,
        "accuracy": accuracy,
        "loss": loss,
        "classes": list(names),
        "confusion": counts.tolist(),
    }
    with checkpoint.replacing(out) as temporary:
        temporary.mkdir()
        (temporary / "evaluation.json").write_text(
            json.dumps(content, indent=1) + "\n", encoding="utf-8"
        )
        draw_confusion(counts, names, temporary / "confusion.png")
