"""Slot names in compiled programs: every operation of a layer carries ``slot=stage1.0.conv1`` in
its metadata, from the tracer to the machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx

from flax_resblock.aot.hlo import SLOT
from flax_resblock.nn.conv import ChannelConv, Conv
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.norm import BatchNorm
from flax_resblock.nn.pooling import Blur

_LAYERS = (Conv, ChannelConv, Linear, BatchNorm, Blur)


@contextmanager
def named_slots(model: nnx.Module) -> Iterator[None]:
    """Within the block, calls of ``model``'s convolutions, blurs, norms and head are traced under a
    scope that names their slot.

    The classes' ``__call__`` is wrapped for that time; instances outside the model are left alone.
    """
    names = {
        id(module): ".".join(map(str, path)) or "block"
        for path, module in nnx.iter_modules(model)
        if isinstance(module, _LAYERS)
    }
    originals = {layer: layer.__call__ for layer in _LAYERS}

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in names:
                return original(self, *args, **kwargs)
            with jax.named_scope(SLOT + names[id(self)]):
                return original(self, *args, **kwargs)

        return call

    for layer, original in originals.items():
        setattr(layer, "__call__", wrap(original))  # noqa: B010
    try:
        yield
    finally:
        for layer, original in originals.items():
            setattr(layer, "__call__", original)  # noqa: B010
