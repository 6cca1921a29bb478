"""A checkpoint with the one reading of it that fits. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from flax_resblock import checkpoint
from flax_resblock import config as arch
from flax_resblock.checkpoint import LIMITS, Limits, Record
from flax_resblock.checkpoint.unwrap import strip
from flax_resblock.convert.detection.assumptions import (
    KNOWN,
    SPELLED_DIFFERENTLY,
    Assumptions,
    assumptions_of,
    told_by_entries,
)
from flax_resblock.convert.detection.backbones import (
    describe_left_out,
    find_backbone,
    refuse_ignored_blocks,
    refuse_untold_dilation,
)
from flax_resblock.convert.detection.candidates import Match, identify
from flax_resblock.convert.detection.heads import find_head, refuse_head_left_out
from flax_resblock.convert.detection.learning import NotLearned, learn_naming
from flax_resblock.convert.detection.refusal import explained
from flax_resblock.convert.detection.unsupported import unsupported
from flax_resblock.convert.hubs import read_hub
from flax_resblock.convert.metadata import (
    EPS,
    MOMENTUM,
    NAMING,
    written_config,
    written_naming,
    written_norm_options,
)
from flax_resblock.convert.namings import NAMINGS
from flax_resblock.convert.opened import OpenedCheckpoint, ReadOptions
from flax_resblock.convert.own import refuse_own
from flax_resblock.convert.run_names import EMA, averaged, weights_among
from flax_resblock.convert.state_map import TensorInfo, describe, matches_any
from flax_resblock.errors import CheckpointError, some, visible

HEADLESS = "no classification head: the network returns pooled features"
"""Note on a network without head."""


def ignored(record: Record, patterns: Sequence[str]) -> list[str]:
    """The tensors that a pattern names, as they are called in the file or without its prefixes."""
    return [
        key
        for key in record.tensors
        if matches_any(key, patterns) or matches_any(record.names.get(key, key), patterns)
    ]


def without(tensors: Mapping[str, np.ndarray], dropped: Sequence[str]) -> dict[str, np.ndarray]:
    """The tensors that are not called so."""
    left_out = set(dropped)
    return {key: value for key, value in tensors.items() if key not in left_out}


def interpret(record: Record, reading: ReadOptions | None = None) -> OpenedCheckpoint:
    """The checkpoint with the one reading that fits; raises CheckpointError where nothing fits, or
    several readings do. The message shows the nearest and the flags to use."""
    reading = reading or ReadOptions()
    refuse_own(record)
    dropped = ignored(record, reading.ignore)
    tensors = without(record.tensors, dropped)
    tensors = weights_among(tensors, record.metadata)
    kept, notes = list(tensors), list(record.notes)
    if dropped:
        notes.append(f"ignored {some(dropped)}")
        tensors = strip(tensors, notes)
    beside = describe(tensors)
    backbone = find_backbone(beside, (*record.extras, *record.notes))
    if backbone is not None:
        notes.append(describe_left_out(backbone, tensors))
        held = [key for key in tensors if backbone.holds(key)]
        tensors = {key.removeprefix(backbone.prefix): tensors[key] for key in held}
    if reading.naming is None and (scheme := written_naming(record)) is not None:
        # an Orbax folder of such a network is written under Flax's own names
        own = any(scheme.is_inside_block(key) or scheme.is_in_bare_block(key) for key in tensors)
        reading = replace(reading, naming=scheme if own else "flax")
    hub = read_hub(record.metadata, record.source)
    by_entries, said = told_by_entries(record.extras)
    notes += said
    if hub is not None:
        notes.append(hub.sentence)
    wanted = reading.architecture if reading.architecture is not None else written_config(record)
    by_file = {**by_entries, **(hub.told if hub else {})} if wanted is None else {}
    if record.format == "msgpack":  # transformers' Flax models have no downsample_in_bottleneck
        by_file.pop("stride_on", None)
    reading = replace(reading, architecture=wanted, assumptions={**by_file, **reading.assumptions})
    if backbone is not None:
        known = isinstance(wanted, arch.ResNetConfig) or "dilated_stages" in reading.assumptions
        refuse_untold_dilation(backbone, known, record.source)
    try:
        match = _identify(tensors, reading, record.source)
        if backbone is not None:
            refuse_head_left_out(backbone, beside, match.state_map.config, record.source)
    except CheckpointError as error:
        refuse_ignored_blocks(dropped, kept, backbone, None, record.source)
        headed = _with_head(tensors, reading, record.source) if backbone is None else None
        why = ""
        if headed is None and backbone is None:
            headed, why = _with_learned_names(tensors, reading, record.source)
        if headed is None:
            _refuse_own_naming(record, reading)
            is_told = backbone is not None
            raise _refusal(record, reading, beside, error, why, is_told) from error
        tensors, match, note = headed
        notes.append(note)
    if match.misfit.afresh:
        notes.append(f"absent, and initialised with new values: {some(match.misfit.afresh)}")
    counters = match.misfit.filled_counters
    if counters:
        every = len(counters) == sum(one.role == "counter" for one in match.state_map.entries)
        frozen = " (`norm='frozen'` if training never changes the norms)" if every else ""
        words = "absent num_batches_tracked with 0, as PyTorch does"
        notes.append(f"filled {len(counters)} {words}{frozen}")
        tensors |= {key: np.zeros((), np.int64) for key in counters}
    refuse_ignored_blocks(dropped, kept, backbone, match.state_map, record.source)
    config, naming = match.state_map.config, match.state_map.naming
    notes += [naming.note] if naming.note else []
    if isinstance(config, arch.ResNetConfig) and config.num_classes is None:
        notes.append(HEADLESS)
    assumed = Assumptions()
    if (wanted is None or isinstance(wanted, str)) and reading.assume != KNOWN:
        said = {**naming.told, **reading.assumptions}
        by_file = hub is not None or wanted is not None
        assumed = assumptions_of(config, naming, said, by_file=by_file)
        assumed = assumed if wanted is None else assumed.of(SPELLED_DIFFERENTLY)
    norms = {**naming.told, **written_norm_options(record), **reading.assumptions}
    norms = {name: norms[name] for name in (EPS, MOMENTUM) if name in norms}
    known = record, match.state_map, tensors, tuple(notes), tuple(match.misfit.afresh), norms
    return OpenedCheckpoint(*known, hub=hub, assumed=assumed)


def _identify(tensors: Mapping[str, np.ndarray], reading: ReadOptions, source: str) -> Match:
    return identify(
        describe(tensors),
        architecture=reading.architecture,
        naming=reading.naming,
        num_classes=reading.num_classes,
        stride=reading.stride,
        allow_missing=reading.allow_missing,
        assumptions=reading.assumptions,
        source=source,
    )


def _with_head(
    tensors: Mapping[str, np.ndarray], reading: ReadOptions, source: str
) -> tuple[dict[str, np.ndarray], Match, str] | None:
    """The network under the names of its scheme, its reading, and a note, where its head has
    another name than the scheme gives it; None where the rest is no network. Raises CheckpointError
    where the rest is one, and the head does not fit it."""
    head = find_head(describe(tensors))
    if head is None:
        return None
    others = {key: value for key, value in tensors.items() if not head.holds(key)}
    rest = {key.removeprefix(head.prefix): value for key, value in others.items()}
    wanted = reading.architecture
    if isinstance(wanted, arch.ResNetConfig):
        wanted = replace(wanted, num_classes=None)
    try:
        match = _identify(rest, replace(reading, architecture=wanted, num_classes=None), source)
    except CheckpointError:
        return None
    if not isinstance(match.state_map.config, arch.ResNetConfig):
        return None
    naming = match.state_map.naming
    name = naming.modules.get("head")
    if name is None:
        raise CheckpointError(
            f"{source} is {match.title} with the classification head {head.module}, and this "
            f"naming scheme has no name for a head. A head is never left out."
        )
    own = {key: tensors[key] for key in tensors if head.holds(key)}
    rest |= {f"{name}.{key.rpartition('.')[2]}": value for key, value in own.items()}
    try:
        return rest, _identify(rest, replace(reading, naming=naming.name), source), head.note(name)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\n{head.module} was read as its head, {name}.") from error


def _with_learned_names(
    tensors: Mapping[str, np.ndarray], reading: ReadOptions, source: str
) -> tuple[tuple[dict[str, np.ndarray], Match, str] | None, str]:
    """The network under its author's names, in the form of :func:`_with_head`; else why not."""
    if reading.naming is not None:
        return None, ""
    naming = learn_naming(describe(tensors))
    if isinstance(naming, NotLearned):
        return None, naming.why
    try:
        match = _identify(tensors, replace(reading, naming=naming), source)
    except CheckpointError:
        return None, ""
    note = (
        "no known naming scheme fits, and the layers were recognised by their shapes and order "
        "(`flax-resblock inspect --show-naming` prints the place of each name)"
    )
    return (dict(tensors), match, note), ""


def _refusal(
    record: Record,
    reading: ReadOptions,
    found: Mapping[str, TensorInfo],
    error: CheckpointError,
    why: str,
    is_told: bool,
) -> CheckpointError:
    """The error with everything that is seen in a checkpoint that is no network. ``why`` is a
    sentence on the names that were not learned, ``is_told`` whether it is known where in the file
    the network is."""
    told = (reading.architecture, reading.naming, reading.num_classes)
    if is_told or any(one is not None for one in told) or reading.ignore or reading.allow_missing:
        first, *more = str(error).split("\n")
        return CheckpointError("\n".join([first, *unsupported(found), *more]))
    return explained(error, found, why, record.source)


def refuse_afresh(source: OpenedCheckpoint) -> None:
    """Raises CheckpointError where weights or running statistics are absent.

    Only training draws new ones.
    """
    if source.afresh:
        raise CheckpointError(
            f"{source.record.source} lacks {some(list(source.afresh))}. Weights and running "
            "statistics that a checkpoint does not hold are never made up; only the counters "
            "num_batches_tracked may be absent, and start at 0."
        )


def _refuse_own_naming(record: Record, reading: ReadOptions) -> None:
    """Raises CheckpointError if tensors that do not fit have a naming scheme of the caller's."""
    name = record.metadata.get(NAMING)
    if name is not None and name not in NAMINGS and reading.naming is None:
        raise CheckpointError(
            f"{record.source} was written in the naming scheme {visible(name)!r}, which is not one "
            f"of this library's. Read it in Python with naming=, the flax_resblock.Naming that it "
            f"was written with; flax_resblock.save then writes it under names that every command "
            f"reads, such as naming='torchvision'."
        )


def open_checkpoint(
    path: str | Path,
    reading: ReadOptions | None = None,
    *,
    entry: str | None = None,
    run: bool = False,
) -> OpenedCheckpoint:
    """Reads any checkpoint and finds what it is; see ``checkpoint.read`` and :func:`interpret`."""
    limits = LIMITS if reading is None else reading.limits
    return interpret(read_entry(path, entry, run=run, limits=limits), reading)


def read_entry(
    path: str | Path, entry: str | None = None, *, run: bool = False, limits: Limits = LIMITS
) -> Record:
    """``checkpoint.read``, also for averaged weights in formats without entries."""
    flat = entry == EMA and Path(path).suffix in ("", ".safetensors")
    record = checkpoint.read(path, entry=None if flat else entry, run=run, limits=limits)
    return averaged(record) if flat else record
