"""Numbers in the ``training_args.bin`` of Hugging Face's Trainer, an object of a class of its own.

The object is not made, and nothing of its pickle is executed: its instructions are listed, and the
number that follows an attribute's name is its value.
"""

from __future__ import annotations

import itertools
import pickletools
from pathlib import Path
from typing import Any

from flax_resblock.checkpoint.limits import Limits
from flax_resblock.checkpoint.zip_directory import read_record, records
from flax_resblock.errors import CheckpointError

TRAINER_ARGUMENTS = "training_args.bin"
_NUMBERS = frozenset({"BINFLOAT", "BININT", "BININT1", "BININT2"})
_BETWEEN = frozenset({"BINPUT", "LONG_BINPUT", "MEMOIZE"})


def trainer_arguments(file: Path, names: frozenset[str], limits: Limits) -> dict[str, float] | None:
    """The numbers of these names that the arguments hold, but for an attribute that is no number or
    that is named twice; None if the file is no pickle in a zip archive."""
    try:
        place = records(file, limits)["data.pkl"]
        limits.check(file, "max_header_bytes", place.size, "bytes of pickle")
        operations = list(pickletools.genops(read_record(file, place)))
    except (OSError, CheckpointError, ValueError, KeyError):
        return None
    shown: list[tuple[str, Any]] = [
        (operation.name, value)
        for operation, value, _ in operations
        if operation.name not in _BETWEEN
    ]
    found: dict[str, list[float]] = {}
    for (kind, name), (after, value) in itertools.pairwise(shown):
        if "UNICODE" in kind and name in names:
            found.setdefault(name, []).extend([float(value)] if after in _NUMBERS else [])
    return {name: values[0] for name, values in found.items() if len(values) == 1}
