"""Models to state dicts and checkpoints."""

from __future__ import annotations

import warnings
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, cast

import numpy as np
from flax import nnx

from flax_resblock import checkpoint
from flax_resblock.config import Config
from flax_resblock.convert import Naming, StateMap, naming_of
from flax_resblock.convert.hubs import files_of
from flax_resblock.convert.image_facts import carried_images
from flax_resblock.convert.metadata import EPS, MOMENTUM, metadata_of
from flax_resblock.convert.opened import JAX_FORMATS, refuse_layout, refuse_other_function
from flax_resblock.convert.own import carried
from flax_resblock.errors import InputError
from flax_resblock.hub import is_name
from flax_resblock.hub.names import say
from flax_resblock.nn.layers import NormLayer
from flax_resblock.nn.resnet import Model
from flax_resblock.nn.variables import flat_arrays
from flax_resblock.port.folder import save_model
from flax_resblock.port.network import ported_of
from flax_resblock.runs.own import save_own, state_dict_of
from flax_resblock.runs.run import Run
from flax_resblock.runs.run_file import write_with_run
from flax_resblock.runs.tensors import config_of

LEFT_OUT = "left_out"
"""Attribute of models that were loaded without some tensors of their file: what :func:`to_torch`
says of them. A text is static, so that it survives ``nnx.split`` and ``nnx.merge``."""


def model_config(model: Any, naming: str | Naming | None) -> Config | None:
    """The configuration of a model that is written by it; None for one with names of its own."""
    config = None if carried(model) is not None and naming is None else config_of(model)
    if config is None and naming is not None:
        raise InputError(
            f"a naming scheme names the tensors of a ResNet, ResidualBlock or BottleneckBlock of "
            f"flax_resblock, not those of a {type(model).__name__}. Leave out naming."
        )
    return config


def to_torch(model: nnx.Module, naming: str | Naming | None = None) -> dict[str, np.ndarray]:
    """The state dict of a model, in PyTorch's order, names and layouts; bit for bit the tensors
    that :func:`from_torch` took.

    Args:
      model: A model of this library, or a ported one, from :func:`from_torch`,
        :func:`load_ported` or ``PortedNetwork.create()``.
      naming: Naming scheme, or the name of one of :data:`flax_resblock.NAMINGS`; None is
        torchvision's, or the names of the module that a ported network came from.
    Returns:
      New writable arrays by name; ``num_batches_tracked`` is int64. ``torch.from_numpy`` of each
      loads with ``strict=True`` (bfloat16 goes through
      :func:`flax_resblock.checkpoint.torch_file.from_numpy`).
    Raises:
      InputError: A model without names in PyTorch, an unknown naming scheme, or one that cannot
        name this network's parts.
    Warns:
      UserWarning: The model was loaded without some tensors of its file, such as a projection head,
        so that this is not all that came in.
    """
    config = model_config(model, naming)
    if config is None:
        return state_dict_of(model)
    state_map = StateMap(config, naming or "torchvision")
    if words := getattr(model, LEFT_OUT, ""):
        warnings.warn(words, stacklevel=2)
    return state_map.to_torch(flat_arrays(model), copy=True)


def norm_options(model: nnx.Module) -> dict[str, float | None]:
    """``eps`` and ``momentum`` that all norms of the model share."""
    norms = [module for _, module in nnx.iter_modules(model) if isinstance(module, NormLayer)]
    shared = {(norm.eps, getattr(norm, "momentum", 0.1)) for norm in norms}
    if len(shared) > 1:
        raise InputError(
            f"the model's norms differ in (eps, momentum): {sorted(map(str, shared))}; a "
            f"checkpoint holds one pair for all."
        )
    return dict(zip((EPS, MOMENTUM), next(iter(shared)), strict=True))


def save(
    model: nnx.Module,
    path: str | PathLike[str],
    *,
    run: Run | None = None,
    naming: str | Naming | None = None,
    force: bool = False,
) -> None:
    """Writes a model, and the run that trains it, to a checkpoint, whole or not at all.

    Args:
      model: A model of this library; or a ported one, which keeps the names of your module; or any
        other, for an Orbax folder only.
      path: The suffix decides the format: ``.pth`` (``.pt``, ``.th``), ``.safetensors``, or none
        for an Orbax folder, which holds Flax's own names; with the naming scheme ``"huggingface"``
        or ``"timm"``, for a folder that transformers or timm loads. None for a ported model: the
        folder that ``flax-resblock port`` writes, for :func:`flax_resblock.load_ported`.
        ``hf-hub:USER/NAME`` pushes such a folder to Hugging Face's hub, with a model card and the
        certificate that PyTorch and Flax agree on it.
      run: Optimizer, schedule and counters, as :func:`load_run` and
        :func:`flax_resblock.training.fit` give them. A ``.pth`` then is a training checkpoint, with
        the entries ``"model"``, ``"optimizer"``, ``"lr_scheduler"``, ``"epoch"`` and ``"step"``.
      naming: Naming scheme of ``.pth`` and ``.safetensors``, or the name of a known one; None is
        torchvision's, or the names of the module that a ported network came from. A scheme of your
        own is stored in the file, or beside it. ``"flax"`` keeps Flax's names and layouts in a
        ``.safetensors``.
      force: Replace what is there.
    Raises:
      InputError: An unknown suffix or naming scheme, a destination that exists, a folder that
        cannot be written to.
    """
    if is_name(path):
        if run is not None:
            raise InputError(
                f"{path}: a hub holds models, not runs. Leave out run, or write it to a file."
            )
        from flax_resblock.io.pushing import push

        say(f"pushed; {push(model, str(path), naming)} names this revision for good.")
        return
    path, scheme = FilePath(path), naming_of(naming or "torchvision")
    config = model_config(model, naming)
    if config is None:
        ported = ported_of(model)
        if run is None and ported is not None and checkpoint.output_format(path) == "orbax":
            save_model(ported, model, path, force=force)
        else:
            save_own(model, path, run, force=force)
        return
    StateMap(config, scheme)  # refuses a scheme that cannot name this network, whatever the format
    kind = checkpoint.output_format(path)
    facts, files = carried_images(model), None
    if kind == "orbax" and scheme.hub:
        files = files_of(scheme.hub, config, {}, facts)
    if kind in JAX_FORMATS and naming is None:
        scheme = naming_of("flax")
    refuse_layout(scheme, kind)
    refuse_other_function(scheme, config)
    checkpoint.refuse_existing(path, force, checkpoint.is_orbax)
    state_map = StateMap(config, "flax" if kind == "orbax" and files is None else scheme)
    tensors = state_map.written(state_map.to_torch(flat_arrays(model), copy=True))
    metadata = metadata_of(config, scheme, norm_options(cast(Model, model)), facts.metadata)
    write_with_run(path, tensors, metadata, run, state_map, files=files, force=force)
