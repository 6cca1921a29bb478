"""Orbax folders, as JAX programs write them. Needs no torch."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.jax_tree import record_of_tree, strings_of, tree_of
from flax_resblock.checkpoint.limits import LIMITS, Limits, check_content
from flax_resblock.checkpoint.orbax_check import DamagedFolderError, check_folder, unreadable
from flax_resblock.checkpoint.record import DIGESTS, Record
from flax_resblock.errors import CheckpointError, damaged, first_line, some

_IN_FLIGHT = 16 << 20
"""Bytes that Orbax may hold in its own buffers at a time."""

_STEP, _TREE = "_CHECKPOINT_METADATA", "_METADATA"
"""Orbax's own metadata of a whole checkpoint, and of a tree in it."""
METADATA_FILE = "flax_resblock.json"
"""Beside Orbax's own files: the architecture and a SHA-256 of every tensor."""


@functools.cache
def _silence_leftovers() -> None:
    """Keeps tracebacks off the terminal when a folder is damaged.

    When one read fails, Orbax closes its event loop under the reads still in flight, and each of
    them reports that from its own thread, now or later. The failure itself reaches the caller;
    those reports say nothing more. Everything else that is reported goes where it went before."""
    previous = sys.unraisablehook

    def hook(report: Any) -> None:
        error = report.exc_value
        if not isinstance(error, RuntimeError) or str(error) != "Event loop is closed":
            previous(report)

    def worth_it(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "exception was never retrieved" not in text or "zarr" not in text

    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(worth_it)


def _orbax() -> Any:
    _silence_leftovers()
    logging.getLogger("absl").setLevel(logging.ERROR)  # one line of INFO per call otherwise
    from orbax.checkpoint import v1

    return v1


def _frugal(v1: Any, largest: int) -> Any:
    """A context in which Orbax neither copies the arrays nor holds many of them in flight."""
    context = v1.Context()
    context.memory.deepcopy_host_arrays = False
    most = max(_IN_FLIGHT, largest)
    context.memory.write_concurrent_bytes = context.memory.read_concurrent_bytes = most
    context.array.saving.use_compression = False
    for name, value in (_alone() or {}).items():
        setattr(context.multiprocessing, name, value)
    return context


def _alone() -> dict[str, Any] | None:
    """Options that let Orbax work without waiting for other processes; None if there are none."""
    import jax

    if not jax.distributed.is_initialized():
        return None
    process = jax.process_index()
    return {
        "primary_host": process,
        "active_processes": {process},
        "barrier_sync_key_prefix": f"process{process}",
    }


def _flatten(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(tree, Mapping):
        items = tree.items()
    elif isinstance(tree, list | tuple):
        items = ((str(i), value) for i, value in enumerate(tree))
    else:
        return {prefix: np.asarray(tree)}
    return {
        name: leaf
        for key, value in items
        for name, leaf in _flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def read_orbax(path: Path, limits: Limits = LIMITS) -> Record:
    """Reads an Orbax checkpoint; names are the paths of its tree joined by dots. Raises
    CheckpointError for any other folder, a damaged one, or one beyond the limits."""
    try:
        check_folder(path, limits)
    except DamagedFolderError as error:
        raise CheckpointError(f"{error}{_lost(path)}") from error
    try:
        v1 = _orbax()
        with _frugal(v1, _IN_FLIGHT):
            tree = _loaded(v1, path.resolve())
    except Exception as error:  # Orbax and TensorStore raise their own and each other's types
        raise CheckpointError(
            f"{path} is not an Orbax checkpoint, or a damaged one ({first_line(error)}). Copy it "
            f"again.{_lost(path)}"
        ) from error

    def size(value: Any) -> int | None:
        return int(getattr(value, "nbytes", 0)) if hasattr(value, "dtype") else None

    check_content(tree, limits, size, str(path))
    if metadata := read_metadata(path / METADATA_FILE):
        return Record(str(path), "orbax", _flatten(tree), metadata)
    return record_of_tree(_with_arrays(tree), str(path), "orbax", limits)


def _loaded(v1: Any, path: Path) -> Any:
    """The tree in a folder; where it has several parts ("items"), their trees by name."""
    if not (path / _STEP).exists() and (path.parent / _STEP).exists():  # a part alone
        return v1.load(path.parent, checkpointable_name=path.name)
    parts = sorted(child.name for child in path.iterdir() if (child / _TREE).is_file())
    if len(parts) < 2:
        return v1.load(path)
    return {name: v1.load(path, checkpointable_name=name) for name in parts}


def _with_arrays(tree: Any) -> Any:
    """The same containers with numpy arrays for jax's."""
    if isinstance(tree, Mapping):
        return {str(key): _with_arrays(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_with_arrays(value) for value in tree]
    return np.asarray(tree) if hasattr(tree, "dtype") else tree


def _lost(path: Path) -> str:
    """A sentence on the tensors that cannot be read; empty where the metadata do not list them."""
    try:
        lost = unreadable(path, json.loads(read_metadata(path / METADATA_FILE).get(DIGESTS, "{}")))
    except (CheckpointError, ValueError, RecursionError):
        return ""
    return f" Of its tensors, {some(lost)} cannot be read." if lost else ""


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata in a file beside an Orbax checkpoint; empty if there is none. Raises
    CheckpointError if it is damaged."""
    if not file.is_file():
        return {}
    with damaged(f"{file} is damaged", "Copy the folder again, or remove that file."):
        return strings_of(file.read_text(encoding="utf-8"))


def _save_alone(path: Path, tree: dict[str, Any], alone: Mapping[str, Any]) -> None:
    """The same with Orbax's older interface, which can save in one process of several."""
    import orbax.checkpoint as v0

    options = v0.options.MultiprocessingOptions(**alone)
    with v0.Checkpointer(
        v0.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
    ) as checkpointer:
        checkpointer.save(path, v0.args.PyTreeSave(tree))


def write_orbax(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes an Orbax checkpoint with ``metadata`` in a JSON file beside it."""
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    tree = tree_of(arrays, str(path), ".")

    def save() -> None:
        v1 = _orbax()
        alone = _alone()
        if alone is not None:  # v1 cannot save without the other processes
            _save_alone(path.resolve(), tree, alone)
            return
        with _frugal(v1, max((value.nbytes for value in tensors.values()), default=0)):
            v1.save(path.resolve(), tree)

    # Orbax writes from threads of its own, which an interrupt of the main thread does not stop. In
    # a thread of ours the save ends before the interrupt is raised, so that whoever cleans up after
    # it removes everything.
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(save).result()
    (path / METADATA_FILE).write_text(json.dumps(dict(metadata), indent=1) + "\n", encoding="utf-8")
