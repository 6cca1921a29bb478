"""Layers in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from flax_resblock.nn.conv import cpu_forms
from flax_resblock.nn.scopes import in_slot


class Sequential(nnx.Module):
    """Calls its layers one after the other, as ``torch.nn.Sequential`` does.

    ``nnx.Sequential`` spreads a layer's tuple over the arguments of the next one; this one hands
    on what a layer returns as it is. The parameters of the first have the path
    ``("layers", 0, ...)``.

    Args:
      *layers: Modules and functions of one argument.
    """

    def __init__(self, *layers: Callable[[Any], Any]) -> None:
        self.layers = nnx.List(layers)

    @in_slot
    def __call__(self, x: Any) -> Any:
        """What the last layer returns; ``x`` without any."""
        forms = cpu_forms()
        for layer in self.layers:
            x = layer(x)
            if forms is not None and isinstance(x, jax.Array) and _is_block(layer):
                x = forms.kept(x)  # see flax_resblock.nn.layers.joined
        return x

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]


def _is_block(layer: Any) -> bool:
    """Whether a layer consists of other modules."""
    return isinstance(layer, nnx.Module) and any(True for _ in nnx.iter_children(layer))
