"""Configurations as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from flax_resblock.config.block import BlockConfig
from flax_resblock.config.network import Config, ResNetConfig


def to_json(config: Config) -> str:
    """A JSON object that :func:`from_json` turns back into ``config``."""
    return json.dumps({"type": type(config).__name__, **asdict(config)})


def from_json(text: str) -> Config:
    """The configuration that :func:`to_json` wrote; raises ValueError for anything else."""
    fields = json.loads(text)
    types = {"ResNetConfig": ResNetConfig, "BlockConfig": BlockConfig}
    if not isinstance(fields, dict) or fields.get("type") not in types:
        raise ValueError("not a configuration of a residual network")
    config = types[fields.pop("type")]
    try:
        return config(**fields)
    except TypeError as error:
        raise ValueError(str(error)) from error
