"""Training a network of the user's own: ``flax-resblock train --model FILE.py:NAME``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_resblock import checkpoint
from flax_resblock.checkpoint import Limits
from flax_resblock.cli import common
from flax_resblock.cli.train_start import Start, Wanted, enable_x64, goes_on
from flax_resblock.config import BlockConfig
from flax_resblock.config import Path as ModelPath
from flax_resblock.convert.hubs import Preprocessing
from flax_resblock.convert.image_facts import ImageFacts, read_images
from flax_resblock.convert.metadata import PORT
from flax_resblock.convert.opening import read_entry
from flax_resblock.convert.own import OpenedTensors, open_own
from flax_resblock.errors import InputError
from flax_resblock.images import default_preprocessing
from flax_resblock.parity.user_code import load_factory

if TYPE_CHECKING:
    from flax import nnx

    from flax_resblock.port.table import Table

_OF_ANY_NETWORK = ("entry", "limits")
"""Flags of a checkpoint that say nothing about its network."""


@dataclass(frozen=True)
class OwnCode:
    """The code of a network: its name, ``FILE.py:NAME`` or ``package.module:NAME``; the class or
    function; the file, if it was named; and the table of the tensors, if ``port`` wrote that file.
    """

    spec: str
    factory: Callable[..., Any]
    file: Path | None
    table: Table | None

    @property
    def name(self) -> str:
        """Of the class or function."""
        return self.spec.rpartition(":")[2]

    def fresh(self, seed: int) -> nnx.Module:
        """The network with the values that its own code draws; else InputError."""
        from flax import nnx

        try:
            made = self.factory(rngs=nnx.Rngs(seed))
        except Exception as error:  # whatever the user's code raises
            raise InputError(
                f"--model {self.spec}: calling it with rngs=nnx.Rngs({seed}) raised "
                f"{type(error).__name__}: {error}. It has to be the class of an nnx module that "
                f"needs nothing else, such as `flax-resblock port` writes; a PyTorch module is "
                f"ported first."
            ) from error
        if not isinstance(made, nnx.Module):
            raise InputError(
                f"--model {self.spec} made a {type(made).__name__}, not an nnx module. A PyTorch "
                f"module is ported first: flax-resblock port {self.spec} weights.pth out"
            )
        return made


def own_code(spec: str, reading: common.ReadingFlags) -> OwnCode:
    """Imports the code of a network, which runs it; InputError for flags that describe one too."""
    usual = common.ReadingFlags()
    for name in (one.name for one in fields(reading) if one.name not in _OF_ANY_NETWORK):
        if getattr(reading, name) != getattr(usual, name):
            raise InputError(
                f"--{name.replace('_', '-')} has no place beside --model: the code says what the "
                f"network is, and its tensors fit or do not. Leave it out."
            )
    where = spec.rpartition(":")[0]
    file = Path(where) if where.endswith(".py") else None
    factory = load_factory(spec, "model")
    return OwnCode(spec, factory, file, _table_beside(file, spec.rpartition(":")[2]))


def _table_beside(file: Path | None, name: str) -> Table | None:
    """What ``port`` wrote beside a file, or a run beside its copy; None where it did not."""
    if file is None:
        return None
    from flax_resblock.port.folder import read_table

    table = read_table(file.parent)
    said = {} if table is None else table.about
    return table if (said.get("network"), said.get("file")) == (name, file.name) else None


@dataclass(frozen=True)
class ModelValues:
    """The values of a model, where they come from, and what the model carries."""

    values: Mapping[ModelPath, np.ndarray]
    opened: OpenedTensors
    table: Table | None

    @property
    def channels(self) -> int | None:
        """Of the images, if a table says it."""
        return None if self.table is None else self.table.about.get("channels")

    def no_images(self, spec: str, path: Path) -> str:
        """The message where :attr:`images` says nothing."""
        if self.table is not None:
            shapes = " and ".join(map(str, self.table.about["inputs"]))
            return f"{spec} takes inputs of the shapes {shapes}, and no image alone."
        return (
            f"{path} does not say which images {spec} takes. Train it with `flax-resblock train`, "
            f"which keeps that beside the weights."
        )

    @property
    def images(self) -> ImageFacts:
        """What the checkpoint says about images and classes; where it does not say how images are
        prepared, as usual for so many channels, in the size that the network was ported with."""
        record = self.opened.record
        facts = read_images(record.metadata, record.source)
        if facts.preprocessing is not None or self.table is None or self.table.about["inputs"]:
            return facts
        channels, size = int(self.table.about["channels"]), tuple(self.table.about["image_size"])
        usual = default_preprocessing(BlockConfig(in_channels=channels, out_channels=channels))
        return replace(facts, preprocessing=replace(usual, size=size))


def _read(
    code: OwnCode, path: Path, reading: common.ReadingFlags, allow_nonfinite: bool, *, run: bool
) -> ModelValues:
    """Reads a checkpoint as the weights of a network; raises InputError if it is not one of it."""
    from flax import nnx

    from flax_resblock.port.folder import opened_folder, opened_ported
    from flax_resblock.runs.own import open_for

    limits: Limits = reading.limits
    with common.status.status(f"reading {path}"):
        table = code.table
        if checkpoint.is_ported(path):
            weights, opened = opened_folder(path, limits)
            table = weights.table
        else:
            record = read_entry(path, reading.entry, run=run, limits=limits)
            if PORT in record.metadata:
                weights, opened = opened_ported(record)
                table = weights.table
            elif table is not None:
                opened = open_own(record, table, code.name)
                table = table.with_content(unused=opened.unused)
            else:
                opened = open_for(nnx.eval_shape(lambda: code.fresh(0)), record)
        common.refuse_unhealthy(opened, allow_nonfinite)
    common.print_notes(opened.notes)
    return ModelValues(opened.values, opened, table)


def _model(code: OwnCode, weights: ModelValues, dtype: str, *, widen: bool) -> nnx.Module:
    """The network with the weights; ``widen`` makes them as wide as ``dtype``."""
    from flax import nnx

    from flax_resblock.port.network import filled

    values = dict(weights.values)
    wide = any(value.dtype.name == "float64" for value in values.values())
    enable_x64(wide or dtype == "float64")
    if dtype == "float64" and widen:
        values = _widened(values)
    nnx.eval_shape(lambda: code.fresh(0))  # for the message, if it raises
    return filled(code.factory, values, weights.table)


def _widened(values: Mapping[ModelPath, np.ndarray]) -> dict[ModelPath, np.ndarray]:
    """The values with floating ones as float64."""
    floating = {path: value for path, value in values.items() if value.dtype.kind == "f"}
    return {**values, **{path: value.astype(np.float64) for path, value in floating.items()}}


def begun(
    code: OwnCode, wanted: Wanted, resume: Path | None, init: Path | None, schedule: str | None
) -> Start:
    """Where a run of one's own network begins; InputError if code, file and flags disagree."""
    wanted = replace(wanted, preset=replace(wanted.preset, model=None))
    source = init or resume
    if source is None:
        return _afresh(code, wanted)
    if resume is not None:
        _refuse_other_code(code, resume)
    whole = resume is not None and not wanted.training.weights_only
    weights = _read(code, source, wanted.reading, wanted.allow_nonfinite, run=whole)
    common.print_title(code.name, str(source))
    run = wanted.training.of(weights.opened) if whole else None
    config, run, splits = goes_on(run, wanted, schedule, weights.channels, source)
    _refuse_bfloat16(config.dtype)
    model = _model(code, weights, config.dtype, widen=run is None)
    return Start(model, run, config, splits, code.file)


def _refuse_other_code(code: OwnCode, run: Path) -> None:
    """Raises InputError if a run was begun with other code: it would not be the same run."""
    copy = run / code.file.name if code.file is not None else run
    if code.file is not None and copy.is_file() and copy.read_bytes() != code.file.read_bytes():
        raise InputError(
            f"{code.file} is not the code that {run} was begun with: {copy} differs. Go on with "
            f"--model {copy}:{code.name}, or begin another run with --init {run}."
        )


def _refuse_bfloat16(dtype: str) -> None:
    if dtype == "bfloat16":
        raise InputError(
            "--dtype bfloat16 is for the networks of this library; one of your own computes in the "
            "dtypes that its code says. Leave it out."
        )


def _afresh(code: OwnCode, wanted: Wanted) -> Start:
    if code.table is not None:
        folder = code.file.parent if code.file is not None else "FOLDER"
        raise InputError(
            f"{code.spec} was ported, and its own initial values are not those of your PyTorch "
            f"code. Begin with weights: --init {folder}, or --init weights.pth. For random ones, "
            f"port the module without a checkpoint: it then has those that it starts with."
        )
    config, _, splits = goes_on(None, wanted, None, None, None)
    _refuse_bfloat16(config.dtype)
    enable_x64(config.dtype == "float64")
    common.print_title(code.name, f"{code.spec}, with the values that its own code draws")
    model = code.fresh(config.seed)
    if config.dtype == "float64":
        from flax_resblock.nn.variables import fill, flat_arrays

        fill(model, _widened(flat_arrays(model)))
    return Start(model, None, config, splits, code.file)


def evaluated(code: OwnCode, wanted: Wanted, path: Path) -> tuple[nnx.Module, ModelValues]:
    """The network with the weights of a checkpoint, to be evaluated."""
    opened = opened_own(code, path, wanted.reading, wanted.allow_nonfinite)
    common.print_title(code.name, str(path))
    return opened


def own_network(
    spec: str, path: Path, reading: common.ReadingFlags, allow_nonfinite: bool
) -> tuple[Any, ImageFacts, Preprocessing]:
    """A network of the user's own, what is known of its images, and how they are prepared."""
    model, weights = opened_own(own_code(spec, reading), path, reading, allow_nonfinite)
    facts = weights.images
    if facts.preprocessing is None:
        raise InputError(weights.no_images(spec, path))
    return model, facts, facts.preprocessing


def opened_own(
    code: OwnCode, path: Path, reading: common.ReadingFlags, allow_nonfinite: bool
) -> tuple[nnx.Module, ModelValues]:
    """The network with the weights of a folder of ``port``, a run or a checkpoint."""
    weights = _read(code, path, reading, allow_nonfinite, run=False)
    return _model(code, weights, "float32", widen=False), weights
