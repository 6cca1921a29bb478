"""Weight norm in both of PyTorch's spellings, as a weight that is computed where it is read.

``torch.nn.utils.weight_norm`` computes the weight in a hook, ``torch.nn.utils.parametrizations``
in modules of its own. Here both are a class with a property, which a trace shows as the operator
that it is, in the module that uses it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.utils.weight_norm import WeightNorm


def without_hooks(module: torch.nn.Module) -> None:
    """Replaces the hooks in a module; its state dict stays as it is. With them it could not be
    copied any more once it was called."""
    for part in module.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, WeightNorm):
                del part._forward_pre_hooks[key], part.__dict__[hook.name]
                part.__class__ = _with_property(type(part), hook.name, hook.dim)


def without_parametrizations(module: torch.nn.Module) -> dict[str, str]:
    """Replaces the parametrizations in a module, whose weights are then ``weight_g`` and
    ``weight_v``, as with the hook.

    Returns:
      The old key in the state dict of every tensor that has another one now.
    """
    old = {}
    parts = list(module.named_modules(remove_duplicate=False))
    normed = {part: normed_weights(part) for _, part in parts}
    for path, part in parts:
        for name in normed[part]:
            now = f"{path}.{name}".lstrip(".")
            before = f"{path}.parametrizations.{name}.original".lstrip(".")
            old |= {f"{now}_g": f"{before}0", f"{now}_v": f"{before}1"}
    for part, names in normed.items():
        cls: Any = type(part).__base__
        for name, steps in names.items():
            part.register_parameter(f"{name}_g", steps.original0)
            part.register_parameter(f"{name}_v", steps.original1)
            cls = _with_property(cls, name, steps[0].dim)
        if names:
            del part._modules["parametrizations"]
            part.__class__ = cls
    return old


def normed_weights(module: torch.nn.Module) -> dict[str, Any]:
    """The parametrizations of a module by the names of its weights; empty unless all of them are
    weight norms."""
    every: Any = module._modules.get("parametrizations", {})
    kinds = {type(one).__name__ for steps in every.values() for one in steps}
    return dict(every.items()) if kinds == {"_WeightNorm"} else {}


@cache
def _with_property(cls: type, name: str, dim: int) -> type:
    """A class whose attribute of this name is computed from two parameters.

    Args:
      dim: The axis whose slices have norms of their own; -1 if there is one norm for all.
    """

    computed: Any = torch.ops.aten._weight_norm

    def weight(part: Any) -> torch.Tensor:
        return computed(getattr(part, f"{name}_v"), getattr(part, f"{name}_g"), dim)

    return type(cls.__name__, (cls,), {name: property(weight), "__module__": WeightNorm.__module__})
