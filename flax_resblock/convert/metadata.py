"""What this library stores in a checkpoint beside the tensors, written and read."""

from __future__ import annotations

from collections.abc import Mapping

from flax_resblock import config as arch
from flax_resblock._version import __version__
from flax_resblock.checkpoint import Record
from flax_resblock.checkpoint.jax_tree import ROOT
from flax_resblock.convert.hubs import kept_files
from flax_resblock.convert.image_facts import IMAGES
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.naming_file import from_toml, to_toml
from flax_resblock.convert.namings import NAMINGS, naming_of
from flax_resblock.errors import CheckpointError, InputError, damaged

CONFIG, NAMING, SCHEME, EPS, MOMENTUM = "config", "naming", "naming_scheme", "eps", "momentum"
"""Metadata that this library writes beside tensors."""
PORT, NETWORK = "port", "network"
"""Metadata beside the tensors of a network that is none of this library's: the table that ``port``
wrote, as JSON, if there is one; and the name of its class."""


def written_config(record: Record) -> arch.Config | None:
    """The configuration that this library stored in a checkpoint, which says more than names and
    shapes can (strides, dilation); None if there is none. Raises CheckpointError for a damaged one.
    """
    text = record.metadata.get(CONFIG)
    if text is None:
        return None
    advice = "Say `architecture=NAME`, or copy the file again."
    with damaged(f"{record.source}: its stored configuration is damaged", advice):
        config = arch.from_json(text)
        blocks = sum(getattr(config, "depths", ()))
        if blocks > len(record.tensors):
            raise ValueError(
                f"it has {blocks:,} blocks, and the file {len(record.tensors):,} tensors"
            )
        return config


def written_norm_options(record: Record) -> dict[str, float | None]:
    """``eps`` and ``momentum`` if this library stored them; raises CheckpointError for damage."""
    words = f"{record.source}: its stored eps or momentum is no number"
    with damaged(words, "Copy the file again."):
        return {
            name: None if record.metadata[name] == "None" else float(record.metadata[name])
            for name in (EPS, MOMENTUM)
            if name in record.metadata
        }


def written_naming(record: Record) -> Naming | None:
    """A scheme of the user's own, as stored in a checkpoint; raises CheckpointError for damage."""
    text = record.metadata.get(SCHEME)
    if text is None or record.metadata.get(NAMING) in NAMINGS:
        return None
    try:
        return from_toml(text, f"{record.source}: its stored naming scheme")
    except InputError as error:
        raise CheckpointError(f"{error} Or copy the file again.") from error


def metadata_of(
    config: arch.Config,
    naming: str | Naming,
    norm_options: Mapping[str, float | None],
    source: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """What this library stores beside tensors: enough to rebuild the network without any flag. A
    naming scheme that is not this library's is stored itself; of ``source``, the metadata of the
    checkpoint that it came from, ``config.json`` and images are kept."""
    naming = naming_of(naming)
    return {
        "format": "flax" if naming.as_in_flax else "pt",
        "written_by": f"flax-resblock {__version__}",
        "architecture": arch.name_of(config),
        CONFIG: arch.to_json(config),
        NAMING: naming.name,
        **({ROOT: naming.root} if naming.root else {}),
        **({} if naming.name in NAMINGS else {SCHEME: to_toml(naming)}),
        **{name: str(value) for name, value in norm_options.items()},
        **kept_files(source or {}),
        **({IMAGES: source[IMAGES]} if source and IMAGES in source else {}),
    }
