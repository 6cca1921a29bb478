"""Random layers and calls switched off, on both sides of a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from flax import nnx

from flax_resblock.nn.stochastic import AlphaDropout, RReLU, StochasticDepth
from flax_resblock.port.random_layers import stochastic_depth


def drop_nothing(model: nnx.Module) -> None:
    """Sets the rates of random layers of the ported network to zero, and random slopes to their
    mean."""
    for _, part in nnx.iter_modules(model):
        if isinstance(part, nnx.Dropout | AlphaDropout | StochasticDepth):
            part.rate = 0.0
        elif isinstance(part, RReLU):
            part.lower = part.upper = (part.lower + part.upper) / 2


def switch_off(module: torch.nn.Module) -> None:
    """Sets the rates of random layers to zero, and random slopes to their mean."""
    for part in module.modules():
        if isinstance(part, torch.nn.RReLU):
            part.lower = part.upper = (part.lower + part.upper) / 2
        found = stochastic_depth(part)
        if found is not None:
            setattr(part, found.name, found.off)
        kind = type(part).__name__
        for name in ("p", "drop_prob", "rate"):
            value = getattr(part, name, None)
            random = "Drop" in kind or "StochasticDepth" in kind
            if random and isinstance(value, float):
                setattr(part, name, 0.0)


@contextmanager
def no_functional_dropout() -> Iterator[None]:
    """Within it ``F.dropout`` and its kin return their input."""
    functional = torch.nn.functional
    names = (
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_alpha_dropout",
    )
    before = {name: getattr(functional, name) for name in names}
    for name in names:
        setattr(functional, name, lambda input, *_, **__: input)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(functional, name, function)
