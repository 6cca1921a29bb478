"""Finds the state dict inside training checkpoints, wrapped modules and moving averages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from flax_resblock.checkpoint.record import Record
from flax_resblock.errors import CheckpointError, some

WRAPPERS = (
    "state_dict", "model_state_dict", "model_state", "model", "network", "net", "module",
    "model_ema", "state_dict_ema", "ema_state_dict", "ema", "online_network_state_dict",
    "teacher", "student",
)  # fmt: skip
"""Entries that hold a state dict, in order of preference: trained weights before their average."""

PREFIXES = (
    "module.", "_orig_mod.", "backbone.", "model.", "encoder.", "network.", "net.", "resnet.",
    "timm_model.", "bottom_up.", "body.", "base_model.model.", "0.body.",
)  # fmt: skip
"""Prefixes left on every key by DataParallel, torch.compile, Lightning, hubs, detectors."""

_INSIDE = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
"""Wrappers that PyTorch puts around single modules; no layer has such a name of its own."""

_STRAY = ("n_averaged",)
"""Tensors that wrappers add: the counter of torch.optim.swa_utils.AveragedModel."""


class Unwrapped(NamedTuple):
    """A state dict without what was around it: tensors by name, the entries beside it, a sentence
    on each thing that was done, and the names of the same tensors in what was unwrapped."""

    state: dict[str, Any]
    extras: dict[str, Any]
    notes: list[str]
    names: dict[str, str]


def without_wrappers(name: str) -> str:
    """A name without the wrappers that PyTorch puts around single modules."""
    return _INSIDE.sub("", f"{name}.")[:-1]


def unwrap(
    content: Any, *, is_tensor: Callable[[Any], bool], source: str, entry: str | None = None
) -> Unwrapped:
    """The state dict in ``content``, as ``entry`` or found; raises CheckpointError if none is."""
    notes: list[str] = []
    extras: dict[str, Any] = {}
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(content).__name__}, not a state dict. Save "
            f"model.state_dict() and convert that."
        )
    while True:
        # beside tensors, such as a random state, too
        found = [name for name in WRAPPERS if _holds_tensors(content.get(name), is_tensor)]
        if entry is None and not found and any(map(is_tensor, content.values())):
            break
        if entry is not None:
            if not _holds_tensors(content.get(entry), is_tensor):
                held = ", ".join(map(str, content)) or "nothing"
                raise CheckpointError(
                    f"{source} has no entry {entry!r} with a state dict; it holds: {held}."
                )
            chosen, entry = entry, None
        elif found or len(found := _all_tensors(content, is_tensor)) == 1:
            chosen = found[0]
        else:
            _refuse_optimizer(content, source)
            held = some([f"{key!s}: {type(value).__name__}" for key, value in content.items()], 6)
            raise CheckpointError(
                f"{source} holds no state dict; its entries are {held or 'nothing'}. Save "
                f"model.state_dict() and convert that."
            )
        others = [name for name in found if name != chosen]
        also = f" (also there: {', '.join(others)}; choose with `entry=...`)" if others else ""
        notes.append(f"the weights are those of entry '{chosen}'{also}")
        extras |= {str(key): value for key, value in content.items() if key != chosen}
        content = content[chosen]
    state = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise CheckpointError(
                f"{source} has a tensor under the key {key!r}; names of tensors are strings."
            )
        if is_tensor(value):
            state[key] = value
        else:
            extras[key] = value
            notes.append(f"left out {key!r}, a {type(value).__name__}")
    stripped = strip(state, notes)
    kept = [key for key in state if key not in _STRAY or key in stripped]
    return Unwrapped(stripped, extras, notes, dict(zip(stripped, kept, strict=True)))


def _refuse_optimizer(content: Mapping[Any, Any], source: str) -> None:
    """Raises CheckpointError for what holds the state of an optimizer, and no weights."""

    def is_optimizer(value: Any) -> bool:
        return isinstance(value, Mapping) and {"state", "param_groups"} <= value.keys()

    found = [str(name) for name, value in content.items() if is_optimizer(value)]
    if found or is_optimizer(content):
        where = f" in its entry {some(found)}" if found else ""
        raise CheckpointError(
            f"{source} holds the state of an optimizer{where}, and no weights: optimizer."
            "state_dict() has averages and step counts alone. Save model.state_dict() and convert "
            "that."
        )


def record_of(state: Mapping[str, Any], name: str) -> Record:
    """A state dict of tensors or arrays as if it had been read from a file called ``name``."""
    content, extras, notes, names = unwrap(
        state, is_tensor=lambda one: hasattr(one, "shape") and hasattr(one, "dtype"), source=name
    )
    tensors = {key: _to_numpy(value, key) for key, value in content.items()}
    return Record(name, "state dict", tensors, {}, tuple(notes), extras, names)


def _to_numpy(value: Any, key: str) -> np.ndarray:
    if type(value).__module__.split(".")[0] == "torch":
        from flax_resblock.checkpoint.torch_file import to_numpy

        return to_numpy(value, key)
    array = np.asarray(value)  # neither jax nor torch knows the other byte order
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _all_tensors(content: Mapping[Any, Any], is_tensor: Callable[[Any], bool]) -> list[Any]:
    """Entries under names of the program's own that are nothing but tensors by name."""
    mappings = ((name, value) for name, value in content.items() if isinstance(value, Mapping))
    return [name for name, value in mappings if value and all(map(is_tensor, value.values()))]


def _holds_tensors(value: Any, is_tensor: Callable[[Any], bool]) -> bool:
    if not isinstance(value, Mapping):
        return False
    inner = (_holds_tensors(value.get(name), is_tensor) for name in WRAPPERS)
    return any(map(is_tensor, value.values())) or any(inner)


def strip(state: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Removes prefixes that all keys have, and wrappers inside the names; ``notes`` say which."""
    for stray in _STRAY:
        if stray in state and len(state) > 1:
            state = {key: value for key, value in state.items() if key != stray}
            notes.append(f"left out '{stray}'")
    state = _without_prefixes(state, notes)
    inner = {without_wrappers(key): value for key, value in state.items()}
    if len(inner) == len(state) and inner.keys() != state.keys():
        notes.append("removed the names of wrappers inside the names of tensors")
        state = _without_prefixes(inner, notes)
    return state


def _without_prefixes(state: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    prefixes = shared_prefixes(state)
    notes.extend(f"removed the prefix '{prefix}'" for prefix in prefixes)
    return {key.removeprefix("".join(prefixes)): value for key, value in state.items()}


def shared_prefixes(names: Iterable[str]) -> list[str]:
    """The prefixes of wrappers that all names begin with, one after the other."""
    found, rest = [], list(names)
    while rest and (prefix := next((p for p in PREFIXES if all_start(rest, p)), "")):
        found.append(prefix)
        rest = [name.removeprefix(prefix) for name in rest]
    return found


def all_start(names: Iterable[str], prefix: str) -> bool:
    """Whether all names begin with a prefix."""
    return all(name.startswith(prefix) for name in names)
