"""A layer as emitted source calls it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

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
    if places.get("random"):
        positional = tuple(Rate(one) if isinstance(one, float) else one for one in positional)
    return Layer(f"nn.{call}", tuple(map(plain, positional)), options, **places)


class Rate(float):
    """A probability, written as people write it: those of stochastic depth often have 17 digits.

    It is a shorter number or a fraction if that is right to a unit in the last place.
    """

    def __repr__(self) -> str:
        value = float(self)
        share = Fraction(value).limit_denominator(1000)
        for text, near in (
            (f"{value:.10g}", float(f"{value:.10g}")),
            (f"{share.numerator} / {share.denominator}", share.numerator / share.denominator),
        ):
            if math.isclose(near, value, rel_tol=np.finfo(float).eps):
                return text if "." in text or "/" in text else f"{text}.0"
        return repr(value)


def plain(size: Any) -> Any:
    """``(3, 3)`` and ``(3,)`` as 3."""
    if isinstance(size, (tuple, list)):
        same = all(isinstance(one, int) and one == size[0] for one in size)
        return size[0] if size and same else tuple(size)
    return size


def whole(number: Any) -> Any:
    """``2.0`` as 2."""
    return int(number) if isinstance(number, float) and number.is_integer() else number


def present(
    module: torch.nn.Module, **places: tuple[str, Codec]
) -> Mapping[str, tuple[str, Codec]]:
    """The places of the tensors that the module has."""
    return {name: place for name, place in places.items() if getattr(module, name) is not None}


def celu_options(alpha: float, inplace: bool) -> dict[str, Any]:
    """The arguments of ``nn.celu``, whose ``inplace`` only matters to a rounded ``alpha``."""
    return {"alpha": alpha, "inplace": inplace and alpha != float(np.float32(alpha))}
