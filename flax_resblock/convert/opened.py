"""A checkpoint that was read: how, as what, and the naming scheme of what is written from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from flax_resblock import config as arch
from flax_resblock.checkpoint import LIMITS, Limits, Record
from flax_resblock.convert.detection.assumptions import Assumptions
from flax_resblock.convert.health import unhealthy
from flax_resblock.convert.hubs import HubConfig
from flax_resblock.convert.image_facts import ImageFacts, read_images
from flax_resblock.convert.metadata import NAMING, written_naming
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.namings import NAMINGS, naming_of
from flax_resblock.convert.state_map import StateMap
from flax_resblock.errors import InputError, visible


@dataclass(frozen=True)
class ReadOptions:
    """How to read a checkpoint where its names and shapes leave it open, or where a person knows
    better: the arguments of :func:`flax_resblock.from_torch`. Patterns are of keys as they are in
    the file or as ``inspect`` shows them; only training starts anything afresh, see
    :func:`refuse_afresh`."""

    architecture: str | arch.Config | None = None
    naming: str | Naming | None = None
    num_classes: int | None = None
    stride: int | None = None
    ignore: Sequence[str] = ()
    allow_missing: Sequence[str] = ()
    limits: Limits = LIMITS
    assumptions: Mapping[str, Any] = field(default_factory=dict)
    assume: Literal["known"] | None = None


@dataclass(frozen=True)
class OpenedCheckpoint:
    """A checkpoint that fits. ``tensors`` are its arrays by name, without ignored ones, absent
    counters filled with zero; ``notes`` say everything that was unwrapped, dropped or filled;
    ``afresh`` are keys that are absent and allowed to be; ``hub`` is what its ``config.json`` says;
    and ``assumed`` what had to be assumed without evidence."""

    record: Record
    state_map: StateMap
    tensors: Mapping[str, np.ndarray]
    notes: tuple[str, ...]
    afresh: tuple[str, ...] = ()
    norm_options: Mapping[str, float | None] = field(default_factory=dict)
    hub: HubConfig | None = None
    assumed: Assumptions = field(default_factory=Assumptions)

    @property
    def all_notes(self) -> tuple[str, ...]:
        """:attr:`notes`, and what was assumed."""
        return (*self.notes, *self.assumed.notes)

    @property
    def images(self) -> ImageFacts:
        """What it says of its images: as this library stored it, else its ``config.json``."""
        stored = read_images(self.record.metadata, self.record.source)
        if stored or self.hub is None:
            return stored
        return ImageFacts(self.hub.preprocessing, tuple(self.hub.labels))

    @cached_property
    def left_out(self) -> list[str]:
        """Tensors of the file that are no part of what was read."""
        used = {id(array) for array in self.tensors.values()}
        return [key for key, array in self.record.tensors.items() if id(array) not in used]

    @property
    def config(self) -> arch.Config:
        """The network or bare block."""
        return self.state_map.config

    @cached_property
    def unhealthy(self) -> list[str]:
        """Tensors with non-finite values or negative variances."""
        return unhealthy(self.state_map, self.tensors)

    @property
    def parameter_count(self) -> int:
        """Number of trainable values (statistics and counters are not)."""
        statistics = ("mean", "var", "num_batches_tracked")
        return sum(
            int(np.prod(entry.flax_shape))
            for entry in self.state_map.entries
            if entry.flax_path[-1] not in statistics
        )


JAX_FORMATS = ("msgpack", "npz", "h5")
"""Formats that hold arrays as Flax has them."""


def refuse_layout(naming: Naming, output_format: str) -> None:
    """Raises InputError for a format that holds arrays as the other framework has them."""
    if naming.as_in_flax and output_format == "pytorch":
        raise InputError(
            f"a .pth file holds PyTorch names; use .safetensors, .msgpack or an Orbax folder for "
            f"naming scheme {naming.name!r}."
        )
    if not naming.as_in_flax and output_format in JAX_FORMATS:
        known = ", ".join(name for name, one in NAMINGS.items() if one.as_in_flax)
        raise InputError(
            f"a .{output_format} file holds arrays as JAX programs have them, and naming scheme "
            f"{naming.name!r} is PyTorch's. Choose one of {known}."
        )


def refuse_other_function(naming: Naming, config: arch.Config) -> None:
    """Raises InputError where the program that reads these names would compute something else."""
    fields = {name: value for name, value in naming.told.items() if hasattr(config, name)}
    if not naming.as_in_flax and naming.hub:
        fields |= {"padding": "symmetric"}
    found = {name: getattr(config, name) for name in fields}
    differing = [name for name, value in fields.items() if found[name] != value]
    if isinstance(config, arch.ResNetConfig) and differing:
        theirs = ", ".join(f"{name} {fields[name]}" for name in differing)
        ours = ", ".join(f"{name} {found[name]}" for name in differing)
        raise InputError(
            f"networks in the naming scheme {naming.name!r} ({naming.origin}) have {theirs}, and "
            f"this one has {ours}: with these weights, that program would compute something else. "
            f"Choose another naming scheme, such as flax."
        )


def target_naming(source: OpenedCheckpoint, output_format: str, naming: str | None) -> Naming:
    """The naming scheme of an output: what was asked for; else Flax's own for Orbax (a name without
    suffix), unless it is a hub's, and for the others the scheme that the network came in. Raises
    InputError for PyTorch's file format with Flax's names, Orbax with others, or a network that
    came in a naming scheme which is not one of this library's."""
    if output_format == "orbax":
        scheme = naming_of(naming or "flax")
        if scheme.name != "flax" and not scheme.hub:
            raise InputError(
                f"an Orbax folder holds Flax names; `save(naming={naming})` is for .pth and "
                f".safetensors."
            )
        return scheme
    here = source.state_map.naming
    scheme = None if naming is None else naming_of(naming)
    if output_format in JAX_FORMATS:
        scheme = scheme or (here if here.as_in_flax else naming_of("flax"))
    if scheme is not None:
        refuse_layout(scheme, output_format)
        refuse_other_function(scheme, source.config)
        return scheme
    if not here.as_in_flax or (output_format == "safetensors" and here.name != "flax"):
        return here
    if (scheme := written_naming(source.record)) is not None:
        return scheme
    first = source.record.metadata.get(NAMING, "torchvision")
    if first in NAMINGS and NAMINGS[first].as_in_flax:
        first = "torchvision"
    if first not in NAMINGS:
        raise InputError(
            f"{source.record.source} came in the naming scheme {visible(first)!r}, which is not "
            f"one of this library's. Choose one for the output: `save(naming='torchvision')`."
        )
    return NAMINGS[first]
