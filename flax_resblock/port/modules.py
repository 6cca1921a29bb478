"""The modules of a network: their names, and what they hold."""

from __future__ import annotations

import keyword

import torch
from flax import nnx


def without_call(path: str) -> str:
    """``"a.b"`` for ``"a.b@1"``, which is the second call of that module."""
    return ".".join(part.partition("@")[0] for part in path.split("."))


def is_container(module: torch.nn.Module) -> bool:
    """Whether a module only holds others: in the emitted code it has no class."""
    return isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict)) or (
        type(module) is torch.nn.Sequential
    )


def children_of(module: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules that a module holds; one that has two names is there twice."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def tensors_held(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Its parameters and buffers by name; one that has two names is there twice."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def is_parameters(module: torch.nn.Module) -> bool:
    """Whether a module is a list or dictionary of parameters."""
    return isinstance(module, (torch.nn.ParameterList, torch.nn.ParameterDict))


def identifier(name: str) -> str:
    """A name that Python accepts, and that no method of ``nnx.Module`` has."""
    name = name if name.isidentifier() else "".join(c if c.isalnum() else "_" for c in f"_{name}")
    return f"{name}_" if keyword.iskeyword(name) or hasattr(nnx.Module, name) else name
