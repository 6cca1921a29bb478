"""Files to flat ``{name: array}`` and back: PyTorch, safetensors, Orbax.

Names are taken as they are; the naming schemes are known to :mod:`flax_resblock.convert`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flax_resblock.checkpoint.atomic import refuse_existing, remove, replacing
from flax_resblock.checkpoint.folders import (
    RUN_FOLDER,
    is_orbax,
    is_ported,
    metadata_in,
    orbax_in,
    texts_beside,
    trainer_files,
    weights_in,
)  # fmt: skip
from flax_resblock.checkpoint.limits import (
    LIMITS,
    UNLIMITED,
    Limits,
    check_files,
    check_names,
)  # fmt: skip
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
from flax_resblock.errors import CheckpointError, InputError, OutputError, first_line, some

__all__ = [
    "FORMATS", "LIMITS", "RUN_FOLDER", "Limits", "Record", "digest", "digests", "is_orbax",
    "is_ported", "metadata_in", "output_format", "read", "refuse_existing", "remove", "replacing",
    "write",
]  # fmt: skip

FORMATS: Mapping[str, tuple[str, ...]] = {
    "pytorch": (".pt", ".pth", ".th", ".bin", ".ckpt"),
    "safetensors": (".safetensors",),
    "orbax": ("",),
}
"""Output formats by file name suffix; a name without suffix is a folder."""


def output_format(path: Path) -> str:
    """The format that a file name asks for.

    Raises:
      InputError: A suffix that no format has.
    """
    for name, suffixes in FORMATS.items():
        if path.suffix.lower() in suffixes:
            return name
    known = ", ".join(suffix for suffixes in FORMATS.values() for suffix in suffixes if suffix)
    raise InputError(
        f"{path}: the suffix {path.suffix!r} names no format. Use {known}, or a name without "
        f"suffix for an Orbax folder."
    )


_SHARD, _PLAN = ".distcp", ".metadata"
"""A shard of ``torch.distributed.checkpoint``, and the file that says what is in which."""


def _resolve(path: Path, limits: Limits) -> tuple[str, Path]:
    """Format and actual file, by content and not by name."""
    if path.is_dir():
        orbax = orbax_in(path)
        if orbax is not None:
            return "orbax", orbax
        weights = weights_in(path)
        if weights is not None:  # which a link may stand for: caches of downloads consist of them
            return ("pytorch" if ".bin" in weights.name else "safetensors"), weights
        if is_ported(path):
            raise CheckpointError(
                f"{path} is the folder of a network that `flax-resblock port` wrote. In Python, "
                f"import the class in it and call flax_resblock.load_ported({str(path)!r}, "
                f"Net); `flax-resblock convert {path} back.pth` returns the state dict of PyTorch."
            )
        _refuse_distributed(path)
        raise CheckpointError(
            f"{path} is a folder without a checkpoint: no Orbax metadata, no "
            f"model.safetensors. Give the checkpoint itself."
        )
    try:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist. Check the path.")
        check_files([path], limits, path)
        with path.open("rb") as handle:
            head = handle.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not head:
        raise CheckpointError(f"{path} is empty. The download or copy failed; get it again.")
    if path.suffix == _SHARD or path.name == _PLAN:
        _refuse_distributed(path.parent)
    if path.name.endswith(".bin.index.json"):
        return "pytorch", path
    if path.name.endswith((".safetensors.index.json", ".safetensors")) or head[8:9] == b"{":
        return "safetensors", path
    if head.startswith((b"PK", b"\x80")):
        return "pytorch", path
    raise CheckpointError(
        f"{path} is neither a PyTorch checkpoint (zip or pickle) nor safetensors: it begins "
        f"with {head!r}. Check that it is the right file."
    )


def _refuse_distributed(folder: Path) -> None:
    """Raises CheckpointError for a folder of ``torch.distributed.checkpoint``."""
    shards = sorted(folder.glob(f"*{_SHARD}"))
    if shards and (folder / _PLAN).is_file():
        raise CheckpointError(
            f"{folder} is a folder of torch.distributed.checkpoint ({_PLAN} and {len(shards)} "
            f"{_SHARD} files), which only PyTorch reads. Make one file of it: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {folder} checkpoint.pth"
        )


def read(
    path: str | Path, *, entry: str | None = None, run: bool = False, limits: Limits = LIMITS
) -> Record:
    """Reads any checkpoint; nothing in it is executed.

    Args:
      path: ``.pt``, ``.pth``, ``.th``, ``.safetensors``, a shard index, an Orbax folder, or a
        folder with ``model.safetensors`` or ``pytorch_model.bin``, whose ``config.json`` then is in
        the metadata.
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
    format_name, file = _resolve(Path(path), limits)
    if format_name == "orbax":
        from flax_resblock.checkpoint.orbax_folder import read_orbax

        record = read_orbax(file, limits)
    elif format_name == "safetensors":
        from flax_resblock.checkpoint.safetensors_file import read_safetensors

        record = read_safetensors(file, entry=entry, limits=limits)
    else:
        from flax_resblock.checkpoint.torch_file import read_torch

        record = read_torch(file, entry=entry, limits=limits)
    check_names(record.tensors, record.source)
    _verify(record, _recorded_digests(record))
    found = metadata_digest(record.metadata)
    if record.metadata.get(METADATA_DIGEST, found) != found:
        raise CheckpointError(
            f"{record.source} is damaged: what it says beside its tensors differs from the "
            f"SHA-256 recorded when it was written. Copy it again."
        )
    # no digest covers what lies beside the file
    record = replace(record, metadata={**texts_beside(file), **record.metadata})
    return _with_run(record, Path(path), limits) if run else record


def _with_run(record: Record, path: Path, limits: Limits) -> Record:
    extras = dict(record.extras)
    if path.is_dir() and record.format != "orbax":
        extras |= trainer_files(path, limits)
    if not extras or (record.format == "safetensors" and not path.is_dir()):
        return record
    from flax_resblock.checkpoint.torch_file import plain

    return replace(record, extras=plain(extras))


def _recorded_digests(record: Record) -> dict[str, str]:
    try:
        recorded = json.loads(record.metadata.get(DIGESTS, "{}"))
        return {str(key): str(value) for key, value in recorded.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{record.source}: its list of SHA-256 digests is damaged. Copy the checkpoint again."
        ) from error


def _verify(record: Record, expected: Mapping[str, str]) -> None:
    found = digests({key: record.tensors[key] for key in expected if key in record.tensors})
    changed = [key for key, sha in expected.items() if found.get(key) != sha]
    if changed:
        verb = "differs" if len(changed) == 1 else "differ"
        raise CheckpointError(
            f"{record.source} is damaged: {some(changed)} {verb} from the SHA-256 recorded "
            f"when it was written. Copy it again."
        )


def _writer(format_name: str, files: Mapping[str, str] | None) -> Callable[..., None]:
    if files is not None:
        from flax_resblock.checkpoint.safetensors_file import write_hub_folder

        return partial(write_hub_folder, files=files)
    if format_name == "orbax":
        from flax_resblock.checkpoint.orbax_folder import write_orbax

        return write_orbax
    if format_name == "safetensors":
        from flax_resblock.checkpoint.safetensors_file import write_safetensors

        return write_safetensors
    from flax_resblock.checkpoint.torch_file import write_torch

    return write_torch


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
      path: The suffix decides the format: ``.pth`` (``.pt``, ``.th``), ``.safetensors``, none for
        an Orbax folder.
      tensors: Arrays by name.
      metadata: Strings kept beside the tensors where the format has a place for them (not in a
        ``.pth``, whose SHA-256 lie in a file beside it).
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
        companions = (sidecar_of(path).name,)
    with replacing(path, force=force, companions=companions, replaceable=is_orbax) as temporary:
        metadata[METADATA_DIGEST] = metadata_digest(metadata)
        _writing(path, _writer(format_name, files), temporary, tensors, metadata, **beside)
        if release:
            tensors.clear()
        # reading compares with the digests that lie in it or beside it
        written = read(temporary, run=bool(extras), limits=UNLIMITED)
        if _recorded_digests(written) != expected:
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
