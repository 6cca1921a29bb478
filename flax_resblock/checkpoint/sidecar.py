"""Beside a ``.pth``, which has no place for them: the SHA-256 of everything in it, in
``NAME.pth.sha256.json``. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flax_resblock.checkpoint.record import arrays_in, digests
from flax_resblock.errors import CheckpointError, InputError

SUFFIX = ".sha256.json"
KIND = "flax-resblock digests"
_LARGEST = 64 << 20


@dataclass(frozen=True)
class Sidecar:
    """What a ``.pth`` held when it was written.

    Attributes:
      identity: PyTorch's own mark of that file. Another file under the same name, written later by
        something else, has another, and damage to a tensor leaves it as it is: the two are told
        apart.
      tensors: SHA-256 of every tensor, by name.
      extras: SHA-256 of every tensor beside the state dict, by the path that leads to it.
      rest: SHA-256 of what is no tensor there: learning rates, counters.
    """

    identity: str
    tensors: dict[str, str]
    extras: dict[str, str] = field(default_factory=dict)
    rest: str = ""


def sidecar_of(path: Path) -> Path:
    """Where the digests of a file are."""
    return path.with_name(path.name + SUFFIX)


def of_extras(extras: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Digests of the arrays in ``extras``, and of everything else there."""
    return digests(arrays_in(extras)), hashlib.sha256(
        repr(_without_arrays(extras)).encode("utf-8", "backslashreplace")
    ).hexdigest()


def _without_arrays(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *map(_without_arrays, value)]
    return None if hasattr(value, "tobytes") and getattr(value, "ndim", 0) else value


def write(path: Path, sidecar: Sidecar) -> None:
    """Writes the digests of the file at ``path``."""
    sidecar_of(path).write_text(
        json.dumps({"kind": KIND, **asdict(sidecar)}, indent=1) + "\n", encoding="utf-8"
    )


def read(path: Path) -> Sidecar | None:
    """The digests of the file at ``path``; None where there are none.

    Raises:
      CheckpointError: They cannot be read, or are something else.
    """
    place = sidecar_of(path)
    if not place.is_file():
        return None
    try:
        if place.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        content = json.loads(place.read_text(encoding="utf-8"))
        if content.pop("kind") != KIND:
            raise ValueError("it is of another kind")
        found = Sidecar(**content)
        flat = [*found.tensors.items(), *found.extras.items(), (found.identity, found.rest)]
        if not all(isinstance(name, str) and isinstance(sha, str) for name, sha in flat):
            raise ValueError("its digests are no text")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{place} should hold the SHA-256 of the tensors in {path.name}, and cannot be "
            f"read ({str(error)[:120]}). It is damaged: remove it to read "
            f"{path.name} without that check, or copy both again."
        ) from error
    return found


def refuse_foreign(path: Path) -> None:
    """Raises InputError where the digests of ``path`` would replace a file that is something
    else.
    """
    place = sidecar_of(path)
    if not os.path.lexists(place):
        return
    try:
        content = json.loads(place.read_bytes())
        ours = isinstance(content, dict) and content.get("kind") == KIND
    except (OSError, ValueError, RecursionError):
        ours = False
    if not ours:
        raise InputError(
            f"{place} exists and is something else; the SHA-256 of the tensors in {path.name} "
            f"go there. Move it, or choose another name."
        )
