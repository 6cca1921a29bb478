"""Modules that do something else in their next call, which a trace of one call does not show."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flax_resblock.errors import InputError
from flax_resblock.port.calls import Calls, EndlessError, never_ends
from flax_resblock.port.graphs import leaves
from flax_resblock.port.modules import tensors_held


def refuse_unsteady(module: torch.nn.Module, images: Sequence[torch.Tensor]) -> None:
    """Refuses a module that does something else in its next call.

    Args:
      module: In evaluation mode; left as it was.
      images: Its inputs.
    Raises:
      InputError: It counts its calls, draws random numbers that are not PyTorch's, changes its
        parameters, or never ends.
    """
    name = type(module).__name__
    for mode in ("evaluation", "training"):
        copied = copy.deepcopy(module).train(mode == "training")
        tensors = tensors_held(copied) if mode == "evaluation" else dict(copied.named_parameters())
        before = {key: value.detach().clone() for key, value in tensors.items()}
        memories = []
        for _ in range(2):
            try:
                with Calls(draws=True) as calls:
                    copied(*images)
            except EndlessError as error:
                raise InputError(never_ends(name, error)) from error
            except Exception:  # whatever the user's code raises; the trace says what
                break
            if calls.drawn:
                raise InputError(
                    f"{name} cannot be ported: in {mode} mode it draws from Python's or NumPy's "
                    f"random numbers, in front of {calls.drawn}. A port would do for ever what it "
                    f"drew once. To drop values or branches at random, use torch.nn.Dropout or "
                    f"torchvision.ops.StochasticDepth."
                )
            memories.append(dict(_memory(copied)))
        now = tensors_held(copied)
        for key, value in before.items():
            if not torch.equal(value, now[key]) and not value.isnan().any():
                raise InputError(
                    f"{name} cannot be ported: a call in {mode} mode changes {key}. If the first "
                    f"batch initialises it, call the module with such a batch before you port it; "
                    f"otherwise compute what changes outside of forward."
                )
        if len(memories) == 2:
            first, second = memories
            changed = [key for key in second if first.get(key) != second[key]]
            if changed:
                key = changed[0]
                raise InputError(
                    f"{name} cannot be ported: every call in {mode} mode changes {key} (from "
                    f"{str(first.get(key))[:50]} to {str(second[key])[:50]}), so that what it "
                    f"computes may depend on how often it was called. A port has no such memory: "
                    f"remove it, or set it outside of forward."
                )


def _memory(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The numbers and random states that the code of a module can keep from one call to the next:
    in its attributes, those of its class, and global ones."""
    for path, part in module.named_modules():
        cls = type(part)
        places: list[tuple[str, Mapping[str, Any]]] = [(path, vars(part))]
        if not cls.__module__.startswith("torch."):
            of_file = getattr(getattr(cls, "forward", None), "__globals__", {})
            places += [(cls.__name__, vars(cls)), (cls.__module__, of_file)]
        for place, attributes in places:
            for name, value in list(attributes.items()):
                kept = None if name.startswith("__") else _plain(value)
                if kept is not None:
                    yield f"{place}.{name}".strip("."), kept


def _plain(value: Any) -> str | None:
    """A number, what holds nothing but numbers, or a random state, as text."""
    if isinstance(value, random.Random):
        return f"random state {hash(value.getstate())}"
    if isinstance(value, np.random.Generator):
        return f"random state {value.bit_generator.state['state']}"
    inside = list(leaves(value)) if isinstance(value, list | dict | tuple) else [value]
    plain = len(inside) < 1000 and all(isinstance(one, int | float | str) for one in inside)
    return repr(value) if plain else None
