"""Modules whose names or tensors the code of a trace cannot have: they get others there."""

from __future__ import annotations

import copy
import keyword
from typing import Any

import torch

from flax_resblock.errors import InputError
from flax_resblock.port.modules import identifier
from flax_resblock.port.weight_norm import without_parametrizations


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


def renamed(module: torch.nn.Module) -> tuple[torch.nn.Module, dict[str, str]]:
    """A module in which no child has a name that a trace cannot have, such as a Python keyword, and
    no weight is a parametrized one.

    Args:
      module: Left as it is; it is returned itself if there is nothing to rename.
    Returns:
      The module, or a copy that finds renamed children under their old names too; and the old name
      of every module and every tensor that has another one now.
    Raises:
      InputError: A parameter or buffer has such a name.
    """
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if _is_taken(path.rpartition(".")[2]):
            kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
            raise InputError(
                f"{type(module).__name__} cannot be ported: the code that "
                f"torch.export writes cannot have a {kind} called {path!r}. Rename it."
            )
    names = {path.rpartition(".")[2] for path, _ in module.named_modules(remove_duplicate=False)}
    if not (any(map(_is_taken, names)) or "parametrizations" in names):
        return module, {}
    copied = copy.deepcopy(module)
    old = without_parametrizations(copied)
    _rename(copied, "", "", old, set())
    return copied, old


def _is_taken(name: str) -> bool:
    """Whether Python or a graph's own attributes have this name."""
    return keyword.iskeyword(name) or name in _OF_GRAPHS


_OF_GRAPHS = {"graph", "meta", *dir(torch.fx.GraphModule)} - {*dir(torch.nn.Module)}
"""Attributes of the modules that a trace consists of."""


def _rename(
    part: torch.nn.Module, path: str, was: str, old: dict[str, str], done: set[int]
) -> None:
    children = {**part._modules}
    if id(part) not in done:
        new_name = {}
        for name in filter(_is_taken, children):
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
