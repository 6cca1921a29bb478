"""A layer as emitted source calls it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from flax_resblock import nn
from flax_resblock.convert.codecs import Codec

if TYPE_CHECKING:
    import torch

Inputs = Literal["channels_last", "elementwise", "last_axis"]


@dataclass(frozen=True)
class Layer:
    """How the source calls a layer, and where its tensors go.

    Attributes:
      call: ``"nn.Conv"``, or a function such as ``"nn.max_pool"`` for a layer without state.
      positional: Arguments that are printed by position, after ``x`` for a function.
      options: Arguments that are printed by keyword: those that differ from the defaults.
      tensors: PyTorch's name of a parameter or buffer -> attribute of the layer, and the change of
        its memory layout.
      stateful: Whether it is an attribute, built with ``rngs=rngs``; otherwise a function of ``x``.
      random: Whether it draws random numbers in training mode.
      inputs: The memory layout that it needs. ``"channels_last"``: PyTorch's axis 1 last;
        ``"last_axis"``: it acts on PyTorch's last axis, which has to be the last here too;
        ``"elementwise"``: any.
    """

    call: str
    positional: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    tensors: Mapping[str, tuple[str, Codec]] = field(default_factory=dict)
    stateful: bool = False
    random: bool = False
    inputs: Inputs = "elementwise"


def layer(call: str, *positional: Any, **rest: Any) -> Layer:
    """A layer; of the options those that differ from the defaults of ``call``."""
    places = ("tensors", "stateful", "random", "inputs")
    places = {name: rest.pop(name) for name in places if name in rest}
    called = getattr(nn, call)
    known = inspect.signature(called.__init__ if isinstance(called, type) else called).parameters
    options = {
        name: plain(value)
        for name, value in rest.items()
        if plain(value) != plain(known[name].default)
    }
    return Layer(f"nn.{call}", tuple(map(plain, positional)), options, **places)


def plain(size: Any) -> Any:
    """``(3, 3)`` and ``(3,)`` as 3."""
    if isinstance(size, (tuple, list)):
        same = all(isinstance(one, int) and one == size[0] for one in size)
        return size[0] if size and same else tuple(size)
    return size


def present(
    module: torch.nn.Module, **places: tuple[str, Codec]
) -> Mapping[str, tuple[str, Codec]]:
    """The places of the tensors that the module has."""
    return {name: place for name, place in places.items() if getattr(module, name) is not None}
