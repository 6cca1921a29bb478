"""Naming schemes as TOML: ``inspect --show-naming`` prints it, ``--naming FILE.toml`` reads it."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from flax_resblock.convert.naming import Naming
from flax_resblock.errors import InputError, visible

_TEMPLATE = re.compile(r"(?:[^{}]|\{stage\}|\{block\})*\Z")
"""A template that formats two numbers and does nothing else."""
_LARGEST = 1 << 20
"""Characters of a scheme."""


def to_toml(naming: Naming) -> str:
    """A naming scheme as TOML; :func:`from_toml` gives it back."""
    lines = [f"name = {json.dumps(naming.name)}", f"origin = {json.dumps(naming.origin)}"]
    if naming.blocks:
        lines.append("blocks = [")
        lines += [f"  {json.dumps(list(stage))}," for stage in naming.blocks]
        lines.append("]")
    else:
        lines.append(f"stage = {json.dumps(naming.stage)}")
        lines.append(f"first_stage = {naming.first_stage}")
    lines += [f"joint = {json.dumps(naming.joint)}"] if naming.joint != "." else []
    lines += ["", "[modules]"]
    lines += [f"{json.dumps(place)} = {json.dumps(name)}" for place, name in naming.modules.items()]
    return "\n".join(lines) + "\n"


def from_toml(text: str, source: str) -> Naming:
    """The naming scheme of a text of :func:`to_toml`; raises InputError for any other text."""
    try:
        if len(text) > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST:,} characters")
        found = tomllib.loads(text)
        name, modules = found.pop("name"), found.pop("modules")
        stage, first = found.pop("stage", ""), found.pop("first_stage", 1)
        blocks, origin = found.pop("blocks", []), found.pop("origin", "your own")
        joint = found.pop("joint", ".")
        if joint not in (".", "_"):
            raise ValueError("joint is '.' or '_'")
        if found:
            raise ValueError(f"it has an unknown entry {next(iter(found))!r}")
        _check(name, origin, modules, stage, first, blocks)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"{source} is no naming scheme: {visible(what)[:200]}. `flax-resblock inspect CKPT "
            f"--show-naming` prints one to start from."
        ) from error
    stages = tuple(tuple(one) for one in blocks)
    return Naming(name, stage, modules, origin, first_stage=first, blocks=stages, joint=joint)


def _check(name: Any, origin: Any, modules: Any, stage: Any, first: Any, blocks: Any) -> None:
    if not all(isinstance(one, str) for one in (name, origin, stage)):
        raise ValueError("name, origin and stage are texts")
    if not isinstance(modules, dict) or not all(isinstance(one, str) for one in modules.values()):
        raise ValueError("modules is a table of texts")
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first < 1000:
        raise ValueError("first_stage is a number from 0 to 999")
    if not _TEMPLATE.match(stage):
        raise ValueError("stage may hold {stage} and {block} and no other braces")
    if not isinstance(blocks, list) or not all(
        isinstance(one, list) and all(isinstance(prefix, str) for prefix in one) for one in blocks
    ):
        raise ValueError("blocks is a list of lists of texts")
    if not stage and not blocks:
        raise ValueError("it has neither stage nor blocks")


def read_naming(path: Path) -> Naming:
    """The naming scheme in a file; raises InputError where there is none."""
    try:
        return from_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise InputError(f"{path} cannot be read: {reason}.") from error
