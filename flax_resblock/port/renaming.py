"""Modules that are called like a Python keyword, which the code of a trace cannot name."""

from __future__ import annotations

import copy
import keyword
from typing import Any

import torch

from flax_resblock.errors import InputError
from flax_resblock.port.modules import identifier


class _Aliases(dict[str, Any]):
    """The children of a ``ModuleDict``, found under their old keys as well."""

    def __init__(self, items: Any, new_name: dict[str, str]) -> None:
        super().__init__(items)
        self.new_name = new_name

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(self.new_name.get(key, key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(self.new_name.get(str(key), key))

    def __reduce__(self) -> Any:
        return _Aliases, (dict(self), self.new_name)


def without_keywords(module: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, str]]:
    """A module in which no child has the name of a Python keyword.

    Args:
      module: Left as it is; it is returned itself if there is nothing to rename.
    Returns:
      The module, or a copy that finds renamed children under their old names too; and the old name
      of every module that has another one now.
    Raises:
      InputError: A parameter or buffer has such a name.
    """
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if keyword.iskeyword(path.rpartition(".")[2]):
            kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            raise InputError(
                f"{type(module).__name__} cannot be ported: its {kind} {path!r} has the name of a "
                f"Python keyword, which the code that torch.export writes cannot have. Rename it."
            )
    names = [path.rpartition(".")[2] for path, _ in module.named_modules(remove_duplicate=False)]
    if not any(map(keyword.iskeyword, names)):
        return module, {}
    copied = copy.deepcopy(module)
    old: dict[str, str] = {}
    _rename(copied, "", "", old, set())
    return copied, old


def _rename(
    part: torch.nn.Module, path: str, was: str, old: dict[str, str], done: set[int]
) -> None:
    children = {**part._modules}
    if id(part) not in done:
        new_name = {}
        for name in filter(keyword.iskeyword, children):
            new = identifier(name)
            while new in children or hasattr(part, new):
                new += "_"
            new_name[name] = new
        items: Any = {new_name.get(name, name): child for name, child in children.items()}
        if isinstance(part, torch.nn.ModuleDict) and new_name:
            part._modules = _Aliases(items, new_name)
        elif new_name:
            part._modules = items
            part.__dict__.update({name: children[name] for name in new_name})
        part.__dict__["_renamed"] = {new: name for name, new in new_name.items()}
        done.add(id(part))
    renamed = part.__dict__["_renamed"]
    for name, child in {**part._modules}.items():
        inside, before = f"{path}.{name}".strip("."), f"{was}.{renamed.get(name, name)}".strip(".")
        if inside != before:
            old[inside] = before
        if child is not None:
            _rename(child, inside, before, old, done)


def old_key(key: str, old: dict[str, str]) -> str:
    """The key that a tensor, or the name that a module, had before."""
    holder, dot, name = key.rpartition(".")
    return old.get(key) or f"{old.get(holder, holder)}{dot}{name}"
