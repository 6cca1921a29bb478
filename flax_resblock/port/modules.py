"""The modules of a network: their names, and what they hold."""

from __future__ import annotations

import inspect
import keyword
from types import FunctionType
from typing import Any

import torch
from flax import nnx

from flax_resblock.errors import InputError
from flax_resblock.port.weight_norm import normed_weights

_SPECTRAL = (
    "spectral_norm, which changes a buffer with every batch in training mode: its estimate of the "
    "largest singular value"
)
_PARAMETRIZATION = (
    "a parametrization other than weight_norm, which recomputes its tensors on every call"
)


def refuse_unready(module: torch.nn.Module) -> None:
    """Refuses modules whose tensors are made by calls, and code that is not Python.

    Raises:
      InputError: It has lazy or recomputed tensors, or is TorchScript.
    """
    for name, part in module.named_modules():
        kind, why = type(part).__name__, ""
        called = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
        hooks = {type(hook).__name__ for hook in part._forward_pre_hooks.values()}
        if "parametrizations" in part._modules and not normed_weights(part):
            kinds = {type(one).__name__ for one in part.get_submodule("parametrizations").modules()}
            spectral = "_SpectralNorm" in kinds
            why = (
                f"has {_SPECTRAL if spectral else _PARAMETRIZATION}. Remove it first: "
                f"torch.nn.utils.parametrize.remove_parametrizations(module, name)"
            )
        elif "SpectralNorm" in hooks:
            why = f"has {_SPECTRAL}. Remove it first: torch.nn.utils.remove_spectral_norm(module)"
        elif any(torch.nn.parameter.is_lazy(one) for one in part.parameters(recurse=False)):
            why = (
                "is lazy: its first call makes its parameters. Call the network with a batch of "
                "images first, or load a checkpoint"
            )
        elif isinstance(part, torch.jit.ScriptModule):
            why = (
                "is TorchScript, which cannot be traced. Give the module that torch.jit.script or "
                "torch.jit.trace was given"
            )
        elif any(map(_holds_a_module, called)):
            why = (
                "has a forward hook that holds a module, as a lambda that uses self does. Both are "
                "compared on copies, and the hook of a copy would still change the module that was "
                "copied. Remove it, and compute in forward what it keeps"
            )
        if why:
            at = f"in module {name}, " if name else ""
            raise InputError(f"{type(module).__name__} cannot be ported: {at}{kind} {why}.")


def _holds_a_module(hook: Any) -> bool:
    if not isinstance(hook, FunctionType):
        return False
    held = inspect.getclosurevars(hook).nonlocals.values()
    return any(isinstance(one, torch.nn.Module) for one in held)


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
