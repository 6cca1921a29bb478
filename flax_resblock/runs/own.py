"""Checkpoints of models that are none of this library's: ported networks, and any other module."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from flax import nnx

from flax_resblock import checkpoint
from flax_resblock._version import __version__
from flax_resblock.checkpoint import LIMITS, Limits, Record
from flax_resblock.checkpoint.torch_file import VERSIONS
from flax_resblock.config import Path
from flax_resblock.convert.image_facts import carried_images, carry_images, read_images
from flax_resblock.convert.metadata import NETWORK, PORT
from flax_resblock.convert.own import OpenedTensors, carried, carry, open_own
from flax_resblock.convert.state_map import TensorMap
from flax_resblock.errors import AssumptionWarning, InputError, some
from flax_resblock.nn.variables import flat_arrays, on_device, set_values
from flax_resblock.runs.other_schedules import LRLambda
from flax_resblock.runs.run import Run
from flax_resblock.runs.run_file import run_of, write_with_run
from flax_resblock.runs.tensors import flax_tensors


def state_dict_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """The state dict of the module that a model was ported from; InputError if it was not."""
    tensors = _ported(model)
    return tensors.to_torch(tensors.whole(flat_arrays(model)), copy=True)


def _ported(model: nnx.Module) -> Any:
    tensors = carried(model)
    if tensors is None:
        raise InputError(
            f"{type(model).__name__} is no network of flax_resblock, and carries no names of "
            f"PyTorch's for its tensors, so that it has no state dict. A ported network carries "
            f"them if it comes from flax_resblock.load_ported(folder, "
            f"{type(model).__name__}). Any other can be saved as an Orbax folder, a name without "
            f"suffix."
        )
    return tensors


def save_own(model: nnx.Module, path: FilePath, run: Run | None, *, force: bool) -> None:
    """Writes a model and its run, as :func:`flax_resblock.save` does, for what is none of this
    library's; raises InputError for a format of PyTorch's and a model without names of PyTorch's.
    """
    in_flax = checkpoint.output_format(path) == "orbax"
    tensors = (carried(model) or flax_tensors(model)) if in_flax else _ported(model)
    about, network = carried_images(model).metadata, type(model).__name__
    write_own(path, flat_arrays(model), tensors, run, network, about, force=force)


def write_own(
    path: FilePath,
    values: Mapping[Path, np.ndarray],
    tensors: Any,
    run: Run | None,
    network: str,
    about: Mapping[str, str],
    *,
    force: bool,
) -> None:
    """Writes values by attribute path and a run. The suffix of ``path`` decides the format, and
    with it whether names are Flax's or PyTorch's; what a ported network carries in ``tensors`` is
    stored beside them, and so is ``about``, what is known of its images."""
    names = tensors.in_flax() if checkpoint.output_format(path) == "orbax" else tensors
    metadata = {"written_by": f"flax-resblock {__version__}", NETWORK: network, **about}
    if hasattr(tensors, "content"):
        metadata[PORT] = json.dumps(tensors.content())
        metadata[VERSIONS] = json.dumps(tensors.about.get("versions", {}))
    arrays = names.to_torch(tensors.whole(values), copy=True)
    checkpoint.refuse_existing(path, force, checkpoint.is_orbax)
    write_with_run(path, arrays, metadata, run, names, force=force)


def open_for(model: nnx.Module, record: Record) -> OpenedTensors:
    """The content of a file as the tensors of a model; raises InputError if they are not, or if the
    file has PyTorch's names, and the model does not."""
    in_flax = record.format == "orbax"
    tensors: TensorMap = (carried(model) or flax_tensors(model)) if in_flax else _ported(model)
    return open_own(record, tensors, type(model).__name__)


def fill_own(model: nnx.Module, opened: OpenedTensors) -> None:
    """Gives a model the values of a checkpoint, and what it carries those that it leaves out."""
    tensors: Any = carried(model)
    set_values(model, on_device(opened.values))
    carry_images(model, read_images(opened.record.metadata, opened.record.source))
    if tensors is not None:
        carry(model, tensors.with_content(unused=opened.unused))


def load_run_into(
    model: nnx.Module,
    path: str | PathLike[str],
    *,
    optimizer: str | None = None,
    schedule_unit: str | int | None = None,
    lr_lambda: LRLambda | None = None,
    entry: str | None = None,
    limits: Limits = LIMITS,
) -> Run:
    """The training run in a checkpoint of a network of your own, which receives the weights.

    Args:
      model: A ported network, from :func:`flax_resblock.load_ported` or ``PortedNetwork.create()``;
        for the checkpoint of a run in JAX, any module.
      path: The checkpoint of the PyTorch module that it was ported from, in any spelling that
        :func:`flax_resblock.load_run` takes, or one that :func:`flax_resblock.save` wrote.
      optimizer, schedule_unit, lr_lambda, entry, limits: As for :func:`flax_resblock.load_run`.
    Returns:
      What :func:`flax_resblock.training.fit` goes on with and :func:`flax_resblock.save` writes.
    Raises:
      CheckpointError: The tensors are not those of the model; or there is no optimizer, or one that
        does not fit. The model stays as it was.
    Warns:
      UserWarning: What was unwrapped or filled; non-finite values, which are carried as they are.
      AssumptionWarning: What the file does not show of the run.
    Example:
      >>> model = load_ported("out", Net)
      >>> run = load_run_into(model, "run.pth")
      >>> history = fit(model, images, config, run=run)
    """
    opened = open_for(model, checkpoint.read(FilePath(path), entry=entry, run=True, limits=limits))
    run = run_of(opened, optimizer=optimizer, schedule_unit=schedule_unit, lr_lambda=lr_lambda)
    for said in (*opened.notes, *([some(opened.unhealthy)] if opened.unhealthy else [])):
        warnings.warn(f"{opened.record.source}: {said}.", stacklevel=2)
    for assumed in run.assumed:
        warnings.warn(f"{opened.record.source}: {assumed}.", AssumptionWarning, stacklevel=2)
    fill_own(model, opened)
    return run
