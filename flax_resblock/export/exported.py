"""Exported networks, opened: a folder with a StableHLO program of ``jax.export``
(``model.stablehlo``), ``weights.safetensors`` and ``manifest.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from flax_resblock import config as arch
from flax_resblock.errors import CheckpointError, InputError, optional, reason

PROGRAM, WEIGHTS, MANIFEST = "model.stablehlo", "weights.safetensors", "manifest.json"
FORMAT = "flax-resblock export"
SCHEMA = 1
COMPATIBILITY = (
    "jax reads an exported program for at least six months after the jax that wrote it was "
    "released, and one up to three weeks newer than itself"
)


def require_flatbuffers() -> None:
    optional(
        "flatbuffers",
        "jax writes and reads exported programs with flatbuffers, which is not installed: pip "
        "install flatbuffers.",
    )


def sha256_of(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class Exported:
    """An exported model, opened: its folder, and its manifest as written."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def config(self) -> arch.Config | None:
        """The network's configuration; None if it is none of this library's."""
        content = self.manifest["config"]
        return None if content is None else arch.from_json(content)

    @property
    def architecture(self) -> str:
        """Its name."""
        return str(self.manifest["architecture"])

    @property
    def precision(self) -> str:
        """Of convolutions and products."""
        return str(self.manifest["precision"])

    @property
    def fixed_size(self) -> int | None:
        """Side of the images; None if the program takes any size."""
        size = self.manifest["input"]["shape"][1]
        return size if isinstance(size, int) else None

    @property
    def image_size(self) -> int:
        """Side of the images; 224 if the program takes any size."""
        return self.fixed_size or 224

    @property
    def channels(self) -> int:
        """Of the images."""
        return int(self.manifest["input"]["shape"][3])

    @cached_property
    def program(self) -> jax.export.Exported:
        """The program.

        Raises:
          InputError: This jax cannot read it.
        """
        require_flatbuffers()
        try:
            return jax.export.deserialize(bytearray((self.folder / PROGRAM).read_bytes()))
        except Exception as error:  # jax raises ValueError, the parser of StableHLO other classes
            written = self.manifest.get("versions", {}).get("jax", "an unknown jax")
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.folder / PROGRAM} was written by jax {written} and jax "
                f"{jax.__version__} cannot read it ({reason}). {COMPATIBILITY}."
            ) from error

    @cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The weights by dotted path; empty if they are constants of the program."""
        try:
            return safetensors.numpy.load_file(self.folder / WEIGHTS)
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.folder / WEIGHTS} cannot be read ({reason(error)}). Export again."
            ) from error

    def __call__(self, images: Any) -> jax.Array:
        """Outputs of a batch ``(N, H, W, C)``, float32, normalised as the manifest says.

        Raises:
          InputError: Images that the program does not take, or a platform that it was not exported
            for.
        """
        wanted, given = self.manifest["input"]["shape"], tuple(images.shape)
        fits = len(given) == 4 and all(
            isinstance(size, str) or size == there
            for size, there in zip(wanted, given, strict=True)
        )
        if not fits:
            raise InputError(
                f"{self.folder} takes images of shape ({', '.join(map(str, wanted))}); got {given}."
            )
        platform = jax.default_backend()
        here = {platform, "cuda" if platform == "gpu" else platform}
        if not here & set(self.manifest["platforms"]):
            raise InputError(
                f"{self.folder} was exported for {', '.join(self.manifest['platforms'])}; jax "
                f"computes on {platform} here. Export with `platforms={platform}`."
            )
        return self.program.call(self.weights, jnp.asarray(images, jnp.float32))


def is_exported(folder: str | Path) -> bool:
    """Whether this is the folder of an exported model."""
    return (Path(folder) / MANIFEST).is_file()


def open_exported(folder: str | Path) -> Exported:
    """An exported model; its files are compared with the SHA-256 in the manifest.

    Raises:
      CheckpointError: Not such a folder, or a damaged one.
      InputError: Written by a jax that is too new for the one installed.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST} cannot be read ({reason(error)}). Give a folder that "
            f"`flax-resblock export` wrote."
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / MANIFEST} is no manifest of an exported network. Give a folder that "
            f"`flax-resblock export` wrote."
        )
    if manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{folder} was written by another version of this library (schema "
            f"{manifest.get('schema')}, here {SCHEMA}). Use that version, or export again."
        )
    newest = jax.export.maximum_supported_calling_convention_version
    oldest = jax.export.minimum_supported_calling_convention_version
    convention = manifest.get("calling_convention_version", 0)
    if not oldest <= convention <= newest:
        written = manifest.get("versions", {}).get("jax")
        when, remedy = "a much older", "export again"
        if convention > newest:
            when, remedy = "a newer", f"install jax {written} or newer"
        raise InputError(
            f"{folder} was written by {when} jax, {written} (calling convention {convention}); jax "
            f"{jax.__version__} reads {oldest} to {newest}. {COMPATIBILITY}. To go on, {remedy}."
        )
    for name, sha in manifest.get("sha256", {}).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing. Copy the whole folder.")
        if sha256_of(folder / name) != sha:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 differs from the manifest's. Copy "
                f"the folder again."
            )
    return Exported(folder, manifest)
