"""What names of weights consist of, and what they lead to."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flax_resblock.errors import InputError, visible

HUB_PREFIX, TORCHVISION_PREFIX = "hf-hub:", "torchvision:"
HUB = "hub"
"""Metadata: the name that a checkpoint was fetched by, with its revision."""


@dataclass(frozen=True)
class Fetched:
    """Files that were fetched.

    Attributes:
      path: The weights, or the index of their shards.
      metadata: What is known of them beside what the files say.
    """

    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)


class RepositoryName(NamedTuple):
    """``REPOSITORY[/FILE][@REVISION]``."""

    repository: str
    file: str | None
    revision: str | None


def parsed(name: str) -> RepositoryName:
    """The parts of a name; raises InputError for one that has none."""
    rest, at, revision = name.removeprefix(HUB_PREFIX).partition("@")
    parts = rest.split("/")
    if not all(parts) or (at and not revision):
        raise InputError(
            f"{visible(name)} is no name of a repository; it looks like "
            f"hf-hub:USER/NAME, hf-hub:USER/NAME@REVISION or hf-hub:USER/NAME/FILE@REVISION."
        )
    return RepositoryName("/".join(parts[:2]), "/".join(parts[2:]) or None, revision or None)


def say(text: str) -> None:
    """Prints a line on standard error, where the progress of a download is."""
    print(f"flax-resblock: {visible(text)}", file=sys.stderr)
