"""``flax-resblock train --eval-only``: evaluates a checkpoint on the test images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.table import Table

from flax_resblock import checkpoint
from flax_resblock.cli.common import output, print_notes, print_table, print_title, say, status
from flax_resblock.cli.images import refuse_nonfinite
from flax_resblock.cli.train_data import OF_DATA, opened, refuse_unnamed_data
from flax_resblock.cli.train_own import OwnCode, evaluated
from flax_resblock.cli.train_start import Wanted, model_of
from flax_resblock.config import ResNetConfig, name_of
from flax_resblock.convert.run_names import holds_run
from flax_resblock.errors import InputError
from flax_resblock.runs.run_file import Opened, run_of
from flax_resblock.training.config import TrainConfig, with_settings
from flax_resblock.training.data import DataSource

if TYPE_CHECKING:
    from flax import nnx

_SHOWN = 12
"""Up to so many classes the whole confusion matrix is shown, else the most frequent confusions."""


_Evaluated: TypeAlias = "tuple[nnx.Module, str, TrainConfig, DataSource]"
"""A network, its name, the configuration, and the images."""


def classify(
    path: Path, wanted: Wanted, devices: int | None, out: Path | None, code: OwnCode | None
) -> int:
    """Prints accuracy and confusion matrix on the test images; ``out`` receives them as files."""
    from flax_resblock.training import data_mesh
    from flax_resblock.training.devices import Placement
    from flax_resblock.training.evaluation import classes_of, confusion_matrix, evaluate_source

    if out is not None:
        checkpoint.refuse_existing(out, force=False)
    model, title, config, test = _own(path, wanted, code) if code else _known(path, wanted)
    classes, placement = classes_of(model, test.shape), Placement(data_mesh(devices))
    with status.status(f"classifying {len(test):,} images"):
        found = evaluate_source(model, test, placement=placement, workers=config.workers)
    refuse_nonfinite(found.logits, [f"{test.name}[{number}]" for number in range(len(test))])
    counts = confusion_matrix(test.labels, found.predictions, classes)
    names = test.class_names or ()
    names += tuple(str(number) for number in range(len(names), classes))
    print_title(title, f"{path}  on {test.name}")
    output.print(
        f"accuracy {found.accuracy:.2%}  ({int(np.trace(counts)):,} of {len(test):,})   "
        f"cross-entropy {found.loss:.4f}"
    )
    print_table(_confusion_table(counts, names))
    if out is not None:
        content = {
            "data": test.name,
            "accuracy": found.accuracy,
            "loss": found.loss,
            "classes": list(names),
            "confusion": counts.tolist(),
        }
        _write(out, content, counts, names)
    return 0


def _known(path: Path, wanted: Wanted) -> _Evaluated:
    """A network of this library."""
    with status.status(f"reading {path}"):
        source = wanted.reading.open(path)
    network = source.config
    if not isinstance(network, ResNetConfig) or network.num_classes is None:
        raise InputError(f"{path} has no head and so no classes to tell. Give a network with one.")
    print_notes(source.all_notes)
    config = _settings(path, source, replace(wanted.preset, model=network), wanted)
    test = opened(config, wanted.strict, network.in_channels).test
    classes, channels = network.num_classes, test.shape[-1]
    if test.num_classes > classes or channels != network.in_channels:
        raise InputError(
            f"{path} takes {network.in_channels} channels and knows {classes} classes; {test.name} "
            f"has {channels} channels and {test.num_classes} classes. Choose its data with --data."
        )
    return model_of(source, config.dtype), name_of(network), config, test


def _own(path: Path, wanted: Wanted, code: OwnCode) -> _Evaluated:
    """A network of the user's own."""
    from flax_resblock.training.evaluation import classes_of

    model, weights = evaluated(code, wanted, path)
    config = _settings(path, weights.opened, replace(wanted.preset, model=None), wanted)
    test = opened(config, wanted.strict, weights.channels).test
    classes = classes_of(model, test.shape)
    if test.num_classes > classes:
        raise InputError(
            f"{path} knows {classes} classes; {test.name} has {test.num_classes}. Choose its data "
            f"with --data."
        )
    return model, code.name, config, test


def _settings(path: Path, source: Opened, preset: TrainConfig, wanted: Wanted) -> TrainConfig:
    """What was asked for, on the data that the run in a checkpoint had."""
    stored = run_of(source).settings if holds_run(source.record.metadata) else {}
    refuse_unnamed_data(path, preset, wanted.settings, stored)
    of_data = {name: stored[name] for name in OF_DATA if name in stored}
    settings = {name: value for name, value in wanted.settings.items() if name != "freeze"}
    return with_settings(preset, of_data | settings)


def _confusion_table(counts: np.ndarray, names: tuple[str, ...]) -> Table:
    present = np.flatnonzero(counts.sum(axis=1) + counts.sum(axis=0))
    if len(present) > _SHOWN:
        return _frequent_confusions(counts, names)
    table = Table(title="rows: true class; columns: predicted class", title_justify="left")
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


def _frequent_confusions(counts: np.ndarray, names: tuple[str, ...]) -> Table:
    table = Table(title="most frequent confusions", title_justify="left")
    for column in ("true class", "predicted class", "times", "share"):
        table.add_column(column, justify="right")
    wrong = counts - np.diag(np.diag(counts))
    for place in np.argsort(-wrong, axis=None, kind="stable")[:_SHOWN]:
        row, column = np.unravel_index(place, wrong.shape)
        if count := wrong[row, column]:
            share = count / counts[row].sum()
            table.add_row(names[row], names[column], f"{count:,}", f"{share:.1%}")
    return table


def _write(
    out: Path, content: dict[str, object], counts: np.ndarray, names: tuple[str, ...]
) -> None:
    from flax_resblock.training.curves import draw_confusion

    text = json.dumps(content, indent=1) + "\n"
    with checkpoint.replacing(out) as temporary:
        temporary.mkdir()
        (temporary / "evaluation.json").write_text(text, encoding="utf-8")
        draw_confusion(counts, names, temporary / "confusion.png")
    say(f"wrote {out}")
