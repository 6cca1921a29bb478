"""Files to flat ``{name: array}`` and back: PyTorch, safetensors, Orbax, msgpack, npz, HDF5.

Names are taken as they are; the naming schemes are known to :mod:`flax_resblock.convert`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.atomic import refuse_existing, remove, replacing
from flax_resblock.checkpoint.folders import (
    CONFIG_FILE,
    PREPROCESSOR_FILE,
    RUN_FOLDER,
    WEIGHTS,
    is_orbax,
    is_ported,
    metadata_in,
    shards_of,
    texts_beside,
    trainer_files,
)  # fmt: skip
from flax_resblock.checkpoint.formats import (
    FORMATS,
    output_format,
    read_as,
    resolve,
    writer_of,
)  # fmt: skip
from flax_resblock.checkpoint.limits import LIMITS, UNLIMITED, Limits, check_names
from flax_resblock.checkpoint.record import (
    DIGESTS,
    METADATA_DIGEST,
    Record,
    arrays_in,
    digest,
    digests,
    metadata_digest,
    refuse_foreign_sidecar,
    sidecar_of,
)
from flax_resblock.checkpoint.zero_writing import shard_names
from flax_resblock.errors import CheckpointError, InputError, OutputError, first_line, some
from flax_resblock.hub import fetch, is_name

__all__ = [
    "FORMATS", "LIMITS", "RUN_FOLDER", "Limits", "Record", "digest", "digests", "is_orbax",
    "is_ported", "metadata_in", "output_format", "read", "recorded_digests", "refuse_existing",
    "remove", "replacing", "write",
]  # fmt: skip


def read(
    path: str | Path, *, entry: str | None = None, run: bool = False, limits: Limits = LIMITS
) -> Record:
    """Reads any checkpoint; nothing in it is executed.

    Args:
      path: ``.pt``, ``.pth``, ``.th``, ``.safetensors``, a shard index, ``.msgpack``, ``.npz``,
        ``.h5``, a pickle of arrays, an Orbax folder, or a folder with ``model.safetensors``,
        ``pytorch_model.bin`` or ``flax_model.msgpack``, whose ``config.json`` then is in the
        metadata; or the name of weights elsewhere, see :mod:`flax_resblock.hub`.
      entry: Name of the entry that holds the state dict in a training checkpoint; None finds it.
      run: Also read what a training run left in files beside the weights; and entries beside them
        have numpy arrays for tensors.
      limits: What it may declare; see :class:`Limits`.
    Raises:
      CheckpointError: Not a checkpoint, damaged, beyond the limits, one that would execute code, or
        a tensor that differs from its recorded SHA-256.
      MissingDependencyError: A PyTorch file with something in it that only PyTorch can read, where
        torch is not installed.
    """
    if is_name(path):
        fetched = fetch(str(path), WEIGHTS, (CONFIG_FILE, PREPROCESSOR_FILE))
        record = read(fetched.path, entry=entry, run=run, limits=limits)
        return replace(record, metadata={**fetched.metadata, **record.metadata})
    format_name, file = resolve(Path(path), limits)
    record = read_as(format_name, file, entry, limits)
    check_names(record.tensors, record.source)
    _verify(record, recorded_digests(record))
    found = metadata_digest(record.metadata)
    if record.metadata.get(METADATA_DIGEST, found) != found:
        raise CheckpointError(
            f"{record.source} is damaged: what it says beside its tensors differs from the "
            f"SHA-256 recorded when it was written. Copy it again."
        )
    # no digest covers what lies beside the file
    record = replace(record, metadata={**texts_beside(file), **record.metadata})
    return _with_run(record, Path(path), file, limits) if run else record


def _with_run(record: Record, path: Path, file: Path, limits: Limits) -> Record:
    extras = dict(record.extras)
    if path.is_dir() and record.format != "orbax":
        extras |= trainer_files(path, limits)
    if not extras or (record.format == "safetensors" and not path.is_dir()):
        return record
    from flax_resblock.checkpoint.torch_file import plain
    from flax_resblock.checkpoint.zero_shards import with_optimizer

    record = replace(record, extras=plain(extras))
    shards = shards_of(file)
    if not shards or extras.get("optimizer"):
        return record
    return with_optimizer(record, shards, limits)


def recorded_digests(record: Record) -> dict[str, str]:
    """SHA-256 that were written with a checkpoint, which :func:`read` compares; may be empty."""
    try:
        recorded = json.loads(record.metadata.get(DIGESTS, "{}"))
        return {str(key): str(value) for key, value in recorded.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{record.source}: its list of SHA-256 digests is damaged. Copy the checkpoint again."
        ) from error


def _verify(record: Record, expected: Mapping[str, str]) -> None:
    written = record.as_named
    found = digests({key: written[key] for key in expected if key in written})
    changed = [key for key, sha in expected.items() if found.get(key) != sha]
    if changed:
        verb = "differs" if len(changed) == 1 else "differ"
        raise CheckpointError(
            f"{record.source} is damaged: {some(changed)} {verb} from the SHA-256 recorded "
            f"when it was written. Copy it again."
        )


def write(
    path: str | Path,
    tensors: dict[str, np.ndarray],
    *,
    metadata: Mapping[str, str] | None = None,
    extras: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
    force: bool = False,
    release: bool = False,
) -> None:
    """Writes a checkpoint: to a temporary name, read back and compared by SHA-256, then renamed
    into place.

    Args:
      path: The suffix decides the format: ``.pth`` (``.pt``, ``.th``), ``.safetensors``,
        ``.msgpack``, ``.npz``, ``.h5``, none for an Orbax folder.
      tensors: Arrays by name.
      metadata: Strings kept beside the tensors where the format has a place for them (not in a
        ``.pth``, whose SHA-256 lie in a file beside it, nor in the formats of JAX programs).
      extras: Entries of a training checkpoint, numpy arrays for tensors; for a ``.pth`` only, where
        ``tensors`` then become the entry ``"model"``.
      files: Texts by name; ``path``, without suffix, then becomes a folder of ``model.safetensors``
        and these files.
      force: Replace what is there.
      release: Empty ``tensors`` once they are written, so that they and what is read back are never
        in memory together.
    Raises:
      InputError: An unknown suffix, or a destination that exists.
      OutputError: A full or failing disk, or a folder that cannot be written to; nothing is left.
      CheckpointError: What was read back differs from what was written (a failing disk); nothing is
        left at ``path``.
    """
    path = Path(path)
    format_name = output_format(path)
    expected = digests(tensors)
    metadata = {**(metadata or {}), DIGESTS: json.dumps(expected)}
    beside = {} if extras is None else {"extras": extras}
    companions = ()
    if format_name == "pytorch":
        refuse_foreign_sidecar(path)
        companions = (sidecar_of(path).name, *shard_names(path, extras))
    with replacing(path, force=force, companions=companions, replaceable=is_orbax) as temporary:
        metadata[METADATA_DIGEST] = metadata_digest(metadata)
        _writing(path, writer_of(format_name, files), temporary, tensors, metadata, **beside)
        if release:
            tensors.clear()
        # reading compares with the digests that lie in it or beside it
        written = read(temporary, run=bool(extras), limits=UNLIMITED)
        if recorded_digests(written) != expected:
            _verify(written, expected)
        if extras and digests(arrays_in(written.extras)) != digests(arrays_in(extras)):
            raise CheckpointError(
                f"{path}: the optimizer that was read back differs from what was written; the "
                f"disk may be failing. Nothing was left there."
            )


def _writing(path: Path, write: Callable[..., None], *arguments: Any, **extras: Any) -> None:
    """Writes; what the formats' own writers raise at a full or failing disk becomes one error."""
    try:
        write(*arguments, **extras)
    except (InputError, OSError, MemoryError):
        raise
    # RuntimeError of torch, SafetensorError, ValueError of TensorStore: none of them an OSError
    except Exception as error:
        raise OutputError(
            f"{path} could not be written: {first_line(error)}. Is the disk full? Nothing is left."
        ) from error
