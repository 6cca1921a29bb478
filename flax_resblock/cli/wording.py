"""Arguments in messages, as flags.

A message of the library names arguments as Python spells them, in backticks: ``stride=1``. On the
command line the same message names flags, ``--stride 1``."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

SPELLED_DIFFERENTLY: Mapping[str, str] = {
    "flax_resblock.load": "--weights-only",
    "load_run": "--resume auto",
    "naming=flax_resblock.Naming(...)": "--naming FILE.toml",
    "example_inputs=...": "--inputs '2,3,64,64;2,10'",
    "lr_lambda=FUNCTION": "--lr-lambda FILE.py:NAME",
    "train=False": "--eval-only",
    "run=...": "--with-optimizer",
    "certificate=False": "--no-certificate",
}
"""What the command line calls by another name than Python."""

_QUOTED = re.compile(r"`([^`\n]+)`")
_ASSIGNED = re.compile(r"(?:(?P<call>save|Limits)\()?(?P<name>[a-z]\w*)=(?P<value>.*)", re.DOTALL)
_FIELD = re.compile(r"(?P<name>[a-z]\w*)=(?P<value>\S+) must be ")
"""How the message about a field of a configuration begins."""


def in_flags(text: str) -> str:
    """A message of the library with flags in place of arguments."""
    if found := _FIELD.match(text):
        text = f"{_flag(found['name'], found['value'])} must be {text[found.end() :]}"
    return _QUOTED.sub(lambda found: as_flag(found[1]) or found[0], text)


def as_flag(code: str) -> str | None:
    """The flag for an argument; None for other code.

    ``image_size=(8, 8)`` is ``--image-size 8 8``, ``Limits(max_bytes=9)`` is ``--max-bytes 9``,
    ``save(naming="flax")`` is ``--to-naming flax``, and an assumption is the flag of its name."""
    if code in SPELLED_DIFFERENTLY:
        return SPELLED_DIFFERENTLY[code]
    found = _ASSIGNED.fullmatch(code)
    if found is None:
        return None
    name, value = found["name"], found["value"]
    if found["call"]:
        value = value.removesuffix(")")
        name = f"to_{name}" if found["call"] == "save" else name
    if name == "assumptions":
        assumed: dict[str, Any] = ast.literal_eval(value)
        return " ".join(_flag(key, repr(one)) for key, one in assumed.items())
    return _flag(name, value)


def _flag(name: str, value: str) -> str:
    flag = f"--{name.replace('_', '-')}"
    if value == "True" and not _is_switch(name):
        return f"{flag} True"
    return f"{flag} {_value(value)}".rstrip()


def _is_switch(name: str) -> bool:
    """Whether a flag that is on or off has no value."""
    from flax_resblock.cli.option_flags import OptionFlags  # tyro, which takes long to import

    return name not in OptionFlags.__dataclass_fields__


def _value(text: str) -> str:
    """A value as it is typed. ``...`` and True are left out, ``|`` separates alternatives, and what
    is no literal stays, such as ``FILE.py:NAME``."""
    if text in ("...", "True"):
        return ""
    if "|" in text:
        return "|".join(map(_value, text.split("|")))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text.strip("()").replace(",", "")
    if isinstance(value, dict):
        return shlex.quote(json.dumps(value))
    if isinstance(value, tuple | list):
        return " ".join(map(str, value))
    return shlex.quote(value) if isinstance(value, str) else text
