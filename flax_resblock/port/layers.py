"""Which layer or function of :mod:`flax_resblock.nn` a leaf module of ``torch.nn`` is."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from flax_resblock.errors import InputError
from flax_resblock.port.layer import Layer
from flax_resblock.port.layer_rows import ROWS
from flax_resblock.port.random_layers import stochastic_depth

if TYPE_CHECKING:
    import torch

__all__ = ["Layer", "direct_calls_seen", "layer_of", "stochastic_depth_seen"]

_VOLUMES = "three spatial axes"
_RECURRENT = "recurrent layers"
_REFUSED: dict[str, str] = {
    **{
        f"torch.nn.{name}3d": _VOLUMES
        for name in (
            *("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "Dropout", "MaxPool"),
            *("AvgPool", "LPPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "FractionalMaxPool"),
            *("MaxUnpool", "ConstantPad", "ZeroPad", "ReflectionPad", "ReplicationPad"),
            "CircularPad",
        )
    },
    **{
        f"torch.nn.{name}": _RECURRENT
        for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
    },
    "torch.nn.FractionalMaxPool2d": "random pooling regions",
    "torch.nn.MaxUnpool1d": "the indices of a max pool",
    "torch.nn.MaxUnpool2d": "the indices of a max pool",
    "torch.nn.FeatureAlphaDropout": "channels dropped to SELU's limit",
    "torch.nn.Embedding": "inputs of integers",
    "torch.nn.EmbeddingBag": "inputs of integers",
}
"""Classes that cannot be ported, and what is not supported."""


def layer_of(module: torch.nn.Module) -> Layer | None:
    """The layer that a module is, or None if it is no leaf that is known.

    Subclasses are not known: their forward may be another. Of the user's own modules those are
    known that drop images at random. A known module whose axes depend on its
    input (``Flatten``, ``Softmax(dim=-1)``) is None too.

    Raises:
      InputError: The module is known and has an option or hook that is not supported.
    """
    name = _name(module)
    if name in _REFUSED:
        raise InputError(
            f"{module} cannot be ported: {_REFUSED[name]} are not supported. A port takes networks "
            f"of convolutions over one or two spatial axes."
        )
    row = ROWS.get(name)
    if row is None:
        found = stochastic_depth(module)
        return None if found is None else found.layer
    layer = row(module)
    if layer is not None:
        _refuse_changed(module)
    return layer


@contextmanager
def stochastic_depth_seen(module: torch.nn.Module) -> Iterator[None]:
    """Within it a layer that drops whole images leaves an operator in the trace. In evaluation mode
    it hands on the very tensor that it is given, so that the trace would know nothing of its call.
    """

    import torch

    def forward(*arguments: Any, **named: Any) -> torch.Tensor:
        return torch.nn.functional.dropout([*arguments, *named.values()][0], training=False)

    parts: list[Any] = [part for part in module.modules() if _drops_images(part)]
    for part in parts:
        part.forward = forward
    try:
        yield
    finally:
        for part in parts:
            del part.forward


@contextmanager
def direct_calls_seen(module: torch.nn.Module) -> Iterator[None]:
    """Within it ``part.forward(x)`` is ``part(x)`` to a trace, which knows the calls of modules
    alone: their code and their names would be lost.
    """
    import torch

    running: set[int] = set()

    def through_call(part: Any, original: Any) -> Any:
        def forward(*arguments: Any, **named: Any) -> Any:
            called = sys._getframe(1).f_code.co_filename == torch.nn.modules.module.__file__
            if called or id(part) in running:
                return original(*arguments, **named)
            running.add(id(part))
            try:
                return part(*arguments, **named)
            finally:
                running.discard(id(part))

        return forward

    parts: list[Any] = [] if not _calls_forward(module) else list(module.modules())[1:]
    parts = [one for one in parts if "forward" not in vars(one)]
    for part in parts:
        part.forward = through_call(part, part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _calls_forward(module: torch.nn.Module) -> bool:
    """Whether the code of a module, or of one in it, has a direct call of ``forward``."""
    for kind in {type(part) for part in module.modules()}:
        with suppress(OSError, TypeError):
            if not kind.__module__.startswith("torch.") and re.search(
                r"(?<!\))\.forward\(", inspect.getsource(kind)
            ):
                return True
    return False


def _drops_images(part: torch.nn.Module) -> bool:
    try:
        layer = layer_of(part)
    except InputError:  # said where the layer is read
        return False
    return layer is not None and layer.call == "nn.StochasticDepth"


def _name(module: torch.nn.Module) -> str:
    kind = type(module)
    home = "torch.nn" if kind.__module__.startswith("torch.nn.modules.") else kind.__module__
    return f"{home}.{kind.__qualname__}"


def _refuse_changed(module: torch.nn.Module) -> None:
    """Hooks, and a forward of its own, may change what the class computes."""
    hooks = [
        name
        for name in (
            "_forward_hooks",
            "_forward_pre_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
        if getattr(module, name)
    ]
    if hooks or "forward" in vars(module):
        what = " and ".join(name.strip("_").replace("_", " ") for name in hooks)
        raise InputError(
            f"{module} has {what or 'a forward that was replaced'}, which may change what it "
            f"computes. Remove it first."
        )
