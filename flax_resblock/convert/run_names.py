"""The names under which a training run lies in a file beside the weights.

This package has to know them to tell the weights from the rest; what they mean is the business of
:mod:`flax_resblock.runs`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from flax_resblock.checkpoint import Record
from flax_resblock.errors import CheckpointError

RUN = "run"
"""Metadata entry with the run as JSON."""
OPTIMIZER = "optimizer."
"""Prefix of the optimizer's tensors where they lie beside the weights."""
AVERAGED = "ema."
"""Prefix of averaged weights and statistics where they lie beside the weights."""
EMA = "model_ema"
"""Entry of a ``.pth`` with the averaged weights, as torchvision's reference scripts name it."""

Value = TypeVar("Value")


def holds_run(metadata: Mapping[str, str]) -> bool:
    """Whether this library wrote a training run into the file with this metadata."""
    return RUN in metadata


def weights_among(tensors: Mapping[str, Value], metadata: Mapping[str, str]) -> dict[str, Value]:
    """The tensors of a file without those of the training run that was written beside them."""
    of_run = (OPTIMIZER, AVERAGED) if holds_run(metadata) else ()
    return {key: value for key, value in tensors.items() if not key.startswith(of_run)}


def averaged(record: Record) -> Record:
    """A checkpoint that this library wrote, with its averaged weights in place of the trained ones,
    and without the run; raises CheckpointError if it has none."""
    tensors = {
        name.removeprefix(AVERAGED): value
        for name, value in record.tensors.items()
        if name.startswith(AVERAGED)
    }
    if not tensors:
        raise CheckpointError(
            f"{record.source} keeps no averaged weights: the run had `ema=0`. Leave out "
            f"`entry={EMA}`."
        )
    metadata = {name: value for name, value in record.metadata.items() if name != RUN}
    return replace(record, tensors=tensors, metadata=metadata)
