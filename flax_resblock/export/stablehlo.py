"""Exported networks, which need neither Flax nor this library: a folder with a StableHLO program of
``jax.export`` (``model.stablehlo``), ``weights.safetensors`` and ``manifest.json``.

docs/export.md has the ten lines that run one.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from flax_resblock import config as arch
from flax_resblock.checkpoint.atomic import replacing
from flax_resblock.errors import CheckpointError, InputError, MissingDependencyError, some
from flax_resblock.nn.resnet import Model
from flax_resblock.nn.variables import flat_arrays

PROGRAM, WEIGHTS, MANIFEST = "model.stablehlo", "weights.safetensors", "manifest.json"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
FORMAT = "flax-resblock export"
SCHEMA = 1
COMPATIBILITY = (
    "jax reads an exported program for at least six months after the jax that wrote it was "
    "released, and one up to three weeks newer than itself"
)

_SMALLEST = 32
"""The least side of an image in pixels, so that no stage is empty."""


def _require_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "jax writes and reads exported programs with flatbuffers, which is not installed: "
            "pip install flatbuffers."
        ) from error


def weights_of(model: Model) -> dict[str, np.ndarray]:
    """The arrays that evaluation needs, by dotted path.

    Raises:
      InputError: Some are float64.
    """
    found = {
        ".".join(map(str, path)): value
        for path, value in flat_arrays(model).items()
        if path[-1] != "num_batches_tracked"
    }
    wide = [name for name, value in found.items() if value.dtype == np.float64]
    if wide:
        raise InputError(
            f"{some(wide)} are float64, in which accelerators do not compute. Convert the "
            f"checkpoint to float32 first."
        )
    return found


def forward_of(model: Model) -> Callable[[Mapping[str, Any], Any], Any]:
    """``(weights, images) -> outputs`` in evaluation mode; see :func:`weights_of`."""
    graphdef, state = nnx.split(model)
    names = {path: ".".join(map(str, path)) for path in dict(nnx.to_flat_state(state))}

    def forward(weights: Mapping[str, Any], images: Any) -> Any:
        flat = {
            path: jnp.zeros((), jnp.int32) if path[-1] == "num_batches_tracked" else weights[name]
            for path, name in names.items()
        }
        values = [(path, one.replace(flat[path])) for path, one in nnx.to_flat_state(state)]
        module = nnx.merge(graphdef, nnx.from_flat_state(values))
        return module(images, use_running_average=True)

    return forward


def _input_spec(config: arch.Config, image_size: int | None) -> jax.ShapeDtypeStruct:
    size, constraints = f"{image_size}, {image_size}", ["batch >= 1"]
    if image_size is None:
        size = "height, width"
        constraints += [f"height >= {_SMALLEST}", f"width >= {_SMALLEST}"]
    text = f"batch, {size}, {config.in_channels}"
    shape = jax.export.symbolic_shape(text, constraints=constraints)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _described(array: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {"shape": sizes, "dtype": str(array.dtype)}


def export_model(
    model: Model,
    folder: str | Path,
    *,
    image_size: int | None,
    platforms: Sequence[str] = PLATFORMS,
    precision: str = "highest",
    bake_weights: bool = False,
    facts: Mapping[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the folder of an exported model, whole or not at all.

    Args:
      model: Of this library, or folded by :func:`flax_resblock.export.fold.fold_batch_norm`.
      folder: To write.
      image_size: Side of the images in pixels; None: any height and width from 32 on. The batch is
        always free.
      platforms: Where the program shall run, of :data:`PLATFORMS`.
      precision: ``"highest"`` is float32 everywhere; ``"high"`` and ``"default"`` are faster on TPU
        and CUDA and lose bits.
      bake_weights: Make them constants of the program; the compiler then computes some of them in
        advance, which changes last bits.
      facts: Further entries of the manifest.
      force: Replace an exported folder that is there.
    Returns:
      The manifest.
    Raises:
      InputError: An unknown platform or precision, float64 weights, zero-padded shortcuts with any
        image size, a folder that exists.
    """
    _require_flatbuffers()
    unknown = [platform for platform in platforms if platform not in PLATFORMS]
    if unknown or not platforms:
        raise InputError(
            f"platforms {', '.join(unknown) or 'none'}: choose from {', '.join(PLATFORMS)}."
        )
    if precision not in ("default", "high", "highest"):
        raise InputError(f"precision {precision!r} is unknown; choose from default, high, highest.")
    if image_size is not None and image_size < 1:
        raise InputError(f"image size {image_size} must be positive.")
    if image_size is None and model.config.shortcut == "zero_pad":
        raise InputError(
            "a network with zero-padded shortcuts is exported for one image size: jax cannot "
            "prove that their sizes meet. Say which, --image-size."
        )
    weights = weights_of(model)
    forward = forward_of(model)
    images = _input_spec(model.config, image_size)
    kept = {} if bake_weights else weights
    specs = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in kept.items()}
    network = jax.jit(lambda given, images: forward(weights if bake_weights else given, images))
    with jax.default_matmul_precision(precision):
        exported = jax.export.export(network, platforms=list(map(str, platforms)))(specs, images)
    program = exported.serialize()
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "architecture": arch.name_of(model.config),
        "config": arch.to_json(model.config),
        "input": {**_described(images), "layout": "NHWC"},
        "output": _described(exported.out_avals[0]),
        "platforms": list(platforms),
        "precision": precision,
        "weights": "constants of the program" if bake_weights else WEIGHTS,
        "calling_convention_version": exported.calling_convention_version,
        "compatibility": COMPATIBILITY,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES},
        **(facts or {}),
    }
    folder = Path(folder)
    with replacing(folder, force=force, replaceable=is_exported) as temporary:
        temporary.mkdir()
        (temporary / PROGRAM).write_bytes(program)
        contiguous = {name: np.ascontiguousarray(value) for name, value in kept.items()}
        (temporary / WEIGHTS).write_bytes(safetensors.numpy.save(contiguous))
        manifest["sha256"] = {name: _sha256(temporary / name) for name in (PROGRAM, WEIGHTS)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@dataclass(frozen=True)
class Exported:
    """An exported model, opened.

    Attributes:
      folder: Where it is.
      manifest: As written.
    """

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def config(self) -> arch.Config:
        """The network's configuration."""
        return arch.from_json(self.manifest["config"])

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
        _require_flatbuffers()
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
                f"{self.folder / WEIGHTS} cannot be read ({error}). Export again."
            ) from error

    @property
    def weight_specs(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Shape and dtype by name."""
        return {name: (value.shape, value.dtype) for name, value in self.weights.items()}

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
                f"computes on {platform} here. Export with --platforms {platform}."
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
            f"{folder / MANIFEST} cannot be read ({error}). Give a folder that `flax-resblock "
            f"export` wrote."
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
        if _sha256(folder / name) != sha:
            raise CheckpointError(
                f"{folder / name} is damaged: its SHA-256 differs from the manifest's. Copy "
                f"the folder again."
            )
    return Exported(folder, manifest)
