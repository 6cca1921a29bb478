"""Folders of weights and ``config.json`` as transformers and timm write and load them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any

from flax_resblock.checkpoint.folders import CONFIG_FILE, PREPROCESSOR_FILE
from flax_resblock.config import Config, ResNetConfig
from flax_resblock.convert.hubs import timm, transformers
from flax_resblock.convert.hubs.common import HubConfig, Preprocessing
from flax_resblock.errors import InputError, damaged, raised

if TYPE_CHECKING:
    from flax_resblock.convert.image_facts import ImageFacts

__all__ = ["HUBS", "HubConfig", "Preprocessing", "files_of", "kept_files", "read_hub"]


HUBS: Mapping[str, ModuleType] = MappingProxyType({"transformers": transformers, "timm": timm})
"""One module for each package: ``recognises`` its ``config.json``, ``read`` says what the files of
a folder say (CheckpointError for a network that computes something else than this library's), and
``write`` gives the files of a folder that the package loads (InputError for a network that it
cannot build). ``kept`` is the ``config.json`` that the network came with, if the package wrote it.
"""


def _json(metadata: Mapping[str, str], name: str, source: str) -> dict[str, Any]:
    advice = "Copy the folder again, or remove that file."
    with damaged(f"{source}: its {name} is no JSON", advice):
        content = json.loads(metadata.get(name, "{}"))
    return content if isinstance(content, dict) else {}


def read_hub(metadata: Mapping[str, str], source: str) -> HubConfig | None:
    """What the ``config.json`` that came with a checkpoint says; None where there is none, or one
    of another package. Raises CheckpointError for a damaged file, or a network that computes
    something else than this library's."""
    content = _json(metadata, CONFIG_FILE, source)
    preprocessor = _json(metadata, PREPROCESSOR_FILE, source)
    hub = next((hub for hub in HUBS.values() if hub.recognises(content)), None)
    if hub is None:
        return None
    words = f"{source}: its {CONFIG_FILE}"
    with damaged(f"{words} is damaged", "Copy the folder again.", says=raised):
        return hub.read(content, preprocessor, words)


def kept_files(metadata: Mapping[str, str]) -> dict[str, str]:
    """The JSON files that came with a checkpoint, to be kept with what is made of it."""
    return {name: metadata[name] for name in (CONFIG_FILE, PREPROCESSOR_FILE) if name in metadata}


def files_of(
    hub: str, config: Config, metadata: Mapping[str, str], facts: ImageFacts
) -> dict[str, str]:
    """The JSON files of a folder that the package ``hub`` loads, by name, for a network that came
    from a checkpoint with this metadata; raises InputError for a bare block, or a network that the
    package cannot build."""
    if not isinstance(config, ResNetConfig):
        raise InputError(
            f"a folder for {hub} holds a whole network, not a bare block. Write a .safetensors "
            f"instead."
        )
    said = read_hub(metadata, "the checkpoint")
    own = said is not None and said.hub == hub
    kept = _json(metadata, CONFIG_FILE, "the checkpoint") if own else {}
    files = HUBS[hub].write(config, facts.labels, kept, facts.preprocessing)
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}
