"""PyTorch's modules, state dicts and checkpoints to models."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, Literal, Unpack, cast

import jax
import numpy as np
from flax import nnx

from flax_resblock import checkpoint
from flax_resblock.checkpoint import LIMITS, Limits
from flax_resblock.checkpoint.unwrap import record_of
from flax_resblock.config import Config, Path
from flax_resblock.convert import Naming
from flax_resblock.convert.image_facts import carry_images
from flax_resblock.convert.metadata import EPS, MOMENTUM
from flax_resblock.convert.opening import (
    OpenedCheckpoint,
    ReadOptions,
    interpret,
    open_checkpoint,
    refuse_afresh,
)
from flax_resblock.errors import AssumptionWarning, InputError, PortedWarning, some
from flax_resblock.io.writing import LEFT_OUT
from flax_resblock.nn.layers import LayerOptions
from flax_resblock.nn.resnet import Model, build
from flax_resblock.nn.variables import on_device, set_values
from flax_resblock.runs.other_schedules import LRLambda
from flax_resblock.runs.run import Run
from flax_resblock.runs.run_file import run_of


def from_torch(
    source: Any,
    *,
    architecture: str | Config | None = None,
    naming: str | Naming | None = None,
    num_classes: int | None = None,
    stride: int | None = None,
    ignore: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    limits: Limits = LIMITS,
    assumptions: Mapping[str, Any] | None = None,
    assume: Literal["known"] | None = None,
    **options: Unpack[LayerOptions],
) -> Model | Any:
    """A PyTorch network as an nnx model in evaluation mode.

    Every value is carried bit for bit, in its own dtype: float64 weights stay float64 (as numpy
    arrays where jax's x64 mode is off).

    An ``nn.Module`` that is no residual network of this library is ported: written as Flax source
    that computes the same, see :func:`flax_resblock.port`.

    Args:
      source: A state dict of tensors or arrays, an ``nn.Module``, or a path of a checkpoint in any
        format.
      architecture: Name or configuration; None finds it from names and shapes.
      naming: Naming scheme, or the name of one of :data:`flax_resblock.NAMINGS`; None finds it.
      num_classes: Size of the logits; None reads it off.
      stride: Of a bare block whose skip changes shape; its weights do not tell (an ``nn.Module``
        does).
      ignore: Keys to drop, shell-style patterns; none of them in a block of the network.
      allow_missing: Keys that may be absent, shell-style patterns. Only counters may: a model with
        random weights is never returned.
      limits: What a file may declare before it is refused, see
        :class:`flax_resblock.checkpoint.Limits`.
      assumptions: Fields of :class:`~flax_resblock.ResNetConfig` that cannot be inferred from the
        weights, ``{"stride_on": "1x1"}``. An ``nn.Module`` and the ``config.json`` of a folder have
        them.
      assume: ``"known"`` accepts every assumption that is left, and no warning lists them.
      **options: See :class:`flax_resblock.nn.layers.LayerOptions`. ``eps`` and ``momentum`` default
        to those of an ``nn.Module`` source.
    Returns:
      A :class:`~flax_resblock.ResNet`, or a bare block, in evaluation mode; of a module that was
      ported, an ``nnx.Module`` with the names of the module.
    Raises:
      CheckpointError: The tensors fit no network, or several; the message lists the differences.
      InputError: An ``nn.Module`` that no configuration describes and that cannot be ported, or is
        given together with arguments that a port has no place for. The module is run on random
        images and compared with what was built from it; it is left as it was.
    Warns:
      PortedWarning: The module was ported, with the reason.
      AssumptionWarning: What the weights do not show and was assumed, such as the activation. A
        published network under its usual names gets one line. An ``nn.Module`` leaves nothing to
        assume.
      UserWarning: Everything that was left out, ignored, filled or unwrapped, in one warning;
        non-finite values or negative variances, which are carried as they are.
    Example:
      >>> model = from_torch(torchvision.models.resnet18())
    """
    network, keys = (architecture, naming, num_classes, stride), (ignore, allow_missing)
    reading = ReadOptions(*network, *keys, limits, _said(assumptions, options), assume)
    if callable(getattr(source, "state_dict", None)):
        # needs torch
        from flax_resblock.parity.live_module import open_module

        try:
            opened, _ = open_module(source, reading)
        except InputError as refusal:
            from flax_resblock.port.instead import ported_instead

            names = ("architecture", "naming", "num_classes", "stride", "ignore", "allow_missing")
            told = [name for name in names if getattr(reading, name)]
            told += [*(["assumptions"] if assumptions else []), *options]
            ported, words = ported_instead(source, refusal, told)
            warnings.warn(words, PortedWarning, stacklevel=2)
            return ported.create()
    elif isinstance(source, Mapping):
        opened = interpret(record_of(source, "the state dict"), reading)
    elif isinstance(source, str | PathLike):
        opened = interpret(checkpoint.read(FilePath(source), limits=limits), reading)
    else:
        raise InputError(
            f"from_torch takes a state dict, an nn.Module or a path, not a {type(source).__name__}."
        )
    refuse_afresh(opened)
    _warn_about(opened)
    return to_model(opened, **options)


def _said(assumptions: Mapping[str, Any] | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the caller says about the network, also as options of its norms."""
    norms = {name: options[name] for name in (EPS, MOMENTUM) if name in options}
    return {**(assumptions or {}), **norms}


def _warn_about(source: OpenedCheckpoint) -> None:
    """Warns, at the caller's own line, about everything that was not read as it stands."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        level, frame = level + 1, frame.f_back
    name = source.record.source
    if source.notes:
        warnings.warn(f"{name}: {'; '.join(source.notes)}.", stacklevel=level)
    if assumed := source.assumed.notes:
        lines = "\n  ".join(
            [f"{name} was read from its weights, which do not tell this:", *assumed]
        )
        words = (
            f'{lines}\n  (assumptions={{"NAME": VALUE}} changes one of them; assume="known" '
            f"accepts this and silences the warning)"
        )
        warnings.warn(words, AssumptionWarning, stacklevel=level)
    if source.unhealthy:
        warnings.warn(f"{name}: {some(source.unhealthy)}; carried as they are.", stacklevel=level)


def load(
    path: str | PathLike[str],
    *,
    architecture: str | Config | None = None,
    naming: str | Naming | None = None,
    num_classes: int | None = None,
    stride: int | None = None,
    ignore: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    limits: Limits = LIMITS,
    assumptions: Mapping[str, Any] | None = None,
    assume: Literal["known"] | None = None,
    **options: Unpack[LayerOptions],
) -> Model:
    """The nnx model that a checkpoint of any format holds, in evaluation mode; arguments, warnings
    and errors as for :func:`from_torch`. The path may also be the name of weights that are fetched:
    ``"hf-hub:USER/NAME"``, with ``@REVISION`` to pin it, or ``"torchvision:WEIGHTS"``.

    Example:
      >>> model = load("resnet18.pth")
    """
    if not isinstance(path, str | PathLike):
        raise InputError(
            f"load takes a path, not a {type(path).__name__}; from_torch takes state dicts and "
            f"modules."
        )
    return from_torch(
        path,
        architecture=architecture,
        naming=naming,
        num_classes=num_classes,
        stride=stride,
        ignore=ignore,
        allow_missing=allow_missing,
        limits=limits,
        assumptions=assumptions,
        assume=assume,
        **options,
    )


def load_run(
    path: str | PathLike[str],
    *,
    optimizer: str | None = None,
    schedule_unit: str | int | None = None,
    lr_lambda: LRLambda | None = None,
    entry: str | None = None,
    architecture: str | Config | None = None,
    naming: str | Naming | None = None,
    num_classes: int | None = None,
    ignore: Sequence[str] = (),
    allow_missing: Sequence[str] = (),
    limits: Limits = LIMITS,
    assumptions: Mapping[str, Any] | None = None,
    assume: Literal["known"] | None = None,
    **options: Unpack[LayerOptions],
) -> tuple[Model, Run]:
    """Model and training run of a checkpoint: PyTorch's own, Lightning's, a Hugging Face Trainer
    folder, or one of this library's. For a ported network, see :func:`load_run_into`.

    Args:
      path: The checkpoint.
      optimizer: ``"sgd"``, ``"adam"`` or ``"adamw"``, if the file does not tell (torch before 2.6
        writes Adam and AdamW alike).
      schedule_unit: What the learning-rate scheduler counted: ``"batch"``, ``"epoch"``, or how
        often it was stepped per optimizer step, ``4``; None finds it from the counters.
      lr_lambda: The function of a LambdaLR or MultiplicativeLR, or one per param group: it is not
        in the file.
      entry: Which of several state dicts in the file to take as the weights, by name.
      architecture, naming, num_classes, ignore, allow_missing, limits, assumptions, assume: As for
        :func:`from_torch`; so are ``**options``.
    Returns:
      The nnx model in evaluation mode, and the :class:`~flax_resblock.Run`, which
      :func:`flax_resblock.training.fit` goes on with and :func:`save` writes.
    Raises:
      CheckpointError: As for :func:`from_torch`; also if there is no optimizer, or one that does
        not fit the model.
    Warns:
      UserWarning: As for :func:`from_torch`.
      AssumptionWarning: The same, and what the file does not show of the run.
    Example:
      >>> model, run = load_run("run.pth")
    """
    network, keys = (architecture, naming, num_classes, None), (ignore, allow_missing)
    reading = ReadOptions(*network, *keys, limits, _said(assumptions, options), assume)
    source = open_checkpoint(FilePath(path), reading, entry=entry, run=True)
    refuse_afresh(source)
    _warn_about(source)
    run = run_of(source, optimizer=optimizer, schedule_unit=schedule_unit, lr_lambda=lr_lambda)
    for assumed in run.assumed if assume is None else ():
        warnings.warn(f"{source.record.source}: {assumed}.", AssumptionWarning, stacklevel=2)
    return to_model(source, **options), run


def to_model(source: OpenedCheckpoint, **options: Unpack[LayerOptions]) -> Model:
    """The nnx model of an opened checkpoint, in evaluation mode; ``eps`` and ``momentum`` default
    to those that the checkpoint has."""
    options = cast(LayerOptions, {**source.norm_options, **options})
    values = arrays_of(source)
    model = build(source.config, rngs=None, **options)
    if source.afresh:
        drawn = build(source.config, rngs=nnx.Rngs(0), **options)
        fresh = dict(nnx.to_flat_state(nnx.state(drawn)))
        afresh = [one for one in source.state_map.entries if one.torch_key in source.afresh]
        values |= {entry.flax_path: fresh[entry.flax_path][...] for entry in afresh}
    set_values(model, values)
    model.eval()
    carry_images(model, source.images)
    if source.left_out:
        words = (
            f"{len(source.left_out)} tensors of {source.record.source} were left out when it was "
            f"loaded, and are not in the state dict of this model: {some(source.left_out)}."
        )
        setattr(model, LEFT_OUT, words)
    return model


def arrays_of(source: OpenedCheckpoint) -> dict[Path, jax.Array | np.ndarray]:
    """The values of an opened checkpoint by attribute path, in Flax's layout on jax's default
    device. All are copied from its file into one block of memory, which lives as long as any of
    them does."""
    return on_device(source.state_map.to_flax(source.tensors, in_one_block=True))
