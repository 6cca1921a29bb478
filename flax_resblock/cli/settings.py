"""The settings of a training run as flags, derived from the configuration itself."""

from __future__ import annotations

from dataclasses import field, fields, is_dataclass, make_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from flax_resblock.training.presets import DEFAULT_PRESET, PRESETS

_WITHOUT_FLAG = ("model", "optimizer", "size")
"""Set by --architecture, by the flags of a run in a checkpoint, and by --image-size."""
_SWITCH = Literal["on", "off"] | None
_LIST = tuple[str, ...] | None


def _flags_of(config: Any) -> type:
    """A configuration's fields as flags, with its texts and values; None means not given."""
    flags: list[Any] = []
    kind: Any
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if name in _WITHOUT_FLAG:
            continue
        if is_dataclass(value):
            nested = _flags_of(value)
            flags.append((name, nested, field(default_factory=nested)))
        elif kind is bool:
            shown = {"default": "on" if value else "off"}
            flags.append((name, _SWITCH, field(default=None, metadata=shown)))
        else:
            flags.append((name, kind | None, field(default=None, metadata={"default": value})))
    made = make_dataclass(f"{type(config).__name__}Flags", flags, frozen=True)
    made.__doc__ = type(config).__doc__
    return made


if TYPE_CHECKING:
    SettingFlags = Any
else:
    SettingFlags = _flags_of(PRESETS[DEFAULT_PRESET])


def given(flags: SettingFlags) -> dict[str, Any]:
    """The settings that were given, by field; ``augmentation`` is a mapping."""
    found: dict[str, Any] = {}
    for flag in fields(flags):
        value = getattr(flags, flag.name)
        if is_dataclass(value):
            value = given(value) or None
        elif flag.type == _SWITCH and value is not None:
            value = value == "on"
        elif flag.type == _LIST and value is not None:
            value = tuple(part for item in value for part in item.split(",") if part)
        if value is not None:
            found[flag.name] = value
    return found
