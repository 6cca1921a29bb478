"""Writes exported networks, which need neither Flax nor this library.

docs/export.md has the ten lines that run one.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from flax_resblock import config as arch
from flax_resblock.checkpoint.atomic import replacing
from flax_resblock.errors import InputError, some
from flax_resblock.export.exported import (
    COMPATIBILITY,
    FORMAT,
    MANIFEST,
    PROGRAM,
    SCHEMA,
    WEIGHTS,
    is_exported,
    require_flatbuffers,
    sha256_of,
)
from flax_resblock.nn.outputs import logits_of
from flax_resblock.nn.variables import KEPT, flat_arrays

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "safetensors")
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_SMALLEST = 32
"""The least side of an image in pixels, so that no stage is empty."""


def weights_of(model: nnx.Module) -> dict[str, np.ndarray]:
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


def forward_of(model: nnx.Module) -> Callable[[Mapping[str, Any], Any], Any]:
    """``(weights, images) -> outputs`` in evaluation mode; see :func:`weights_of`."""
    graphdef, state, rest = nnx.split(model, KEPT, ...)  # the rest are random streams
    names = {path: ".".join(map(str, path)) for path in dict(nnx.to_flat_state(state))}

    def forward(weights: Mapping[str, Any], images: Any) -> Any:
        flat = {
            path: jnp.zeros((), jnp.int32) if path[-1] == "num_batches_tracked" else weights[name]
            for path, name in names.items()
        }
        values = [(path, one.replace(flat[path])) for path, one in nnx.to_flat_state(state)]
        module: Any = nnx.merge(graphdef, nnx.from_flat_state(values), rest)
        if config_of(model) is not None:
            return module(images, use_running_average=True)
        module.eval()
        output, others = logits_of(module(images))
        if others:
            raise InputError(
                f"{type(model).__name__} returns {1 + len(others)} arrays, and an exported "
                f"program returns one. Put a module around it that chooses."
            )
        return output

    return forward


def config_of(model: nnx.Module) -> arch.Config | None:
    """The configuration of a network or block of this library; None of any other module."""
    config = getattr(model, "config", None)
    return config if isinstance(config, arch.Config) else None


def _input_spec(channels: int, image_size: int | None) -> jax.ShapeDtypeStruct:
    size, constraints = f"{image_size}, {image_size}", ["batch >= 1"]
    if image_size is None:
        size = "height, width"
        constraints += [f"height >= {_SMALLEST}", f"width >= {_SMALLEST}"]
    text = f"batch, {size}, {channels}"
    shape = jax.export.symbolic_shape(text, constraints=constraints)
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _described(array: Any) -> dict[str, Any]:
    sizes = [size if isinstance(size, int) else str(size) for size in array.shape]
    return {"shape": sizes, "dtype": str(array.dtype)}


def export_model(
    model: nnx.Module,
    folder: str | Path,
    *,
    image_size: int | None,
    channels: int = 3,
    platforms: Sequence[str] = PLATFORMS,
    precision: str = "highest",
    bake_weights: bool = False,
    facts: Mapping[str, Any] | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Writes the folder of an exported model, whole or not at all.

    Args:
      model: Of this library, or folded by :func:`flax_resblock.export.fold.fold_batch_norm`; or any
        nnx module from images to one array.
      folder: To write.
      image_size: Side of the images in pixels; None: any height and width from 32 on. The batch is
        always free.
      channels: Of the images of a model that is none of this library's.
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
    require_flatbuffers()
    unknown = [platform for platform in platforms if platform not in PLATFORMS]
    if unknown or not platforms:
        raise InputError(
            f"platforms {', '.join(unknown) or 'none'}: choose from {', '.join(PLATFORMS)}."
        )
    if precision not in ("default", "high", "highest"):
        raise InputError(f"precision {precision!r} is unknown; choose from default, high, highest.")
    if image_size is not None and image_size < 1:
        raise InputError(f"image size {image_size} must be positive.")
    config = config_of(model)
    zero_padded = config is not None and config.shortcut in ("zero_pad", "zero_pad_behind")
    if image_size is None and zero_padded:
        raise InputError(
            "a network with zero-padded shortcuts is exported for one image size: jax cannot "
            "prove that their sizes meet. Say which, `image_size=...`."
        )
    weights = weights_of(model)
    forward = forward_of(model)
    images = _input_spec(channels if config is None else config.in_channels, image_size)
    kept = {} if bake_weights else weights
    specs = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in kept.items()}
    network = jax.jit(lambda given, images: forward(weights if bake_weights else given, images))
    with jax.default_matmul_precision(precision):
        try:
            exported = jax.export.export(network, platforms=list(map(str, platforms)))(
                specs, images
            )
        except Exception as error:
            if config is not None or isinstance(error, InputError):
                raise
            raise InputError(
                f"{type(model).__name__} cannot be exported for images {images.shape}: "
                f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}. "
                f"Try the size that it was ported with, with `image_size=(HEIGHT, WIDTH)`."
            ) from error
    program = exported.serialize()
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "architecture": type(model).__name__ if config is None else arch.name_of(config),
        "config": None if config is None else arch.to_json(config),
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
        manifest["sha256"] = {name: sha256_of(temporary / name) for name in (PROGRAM, WEIGHTS)}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest
