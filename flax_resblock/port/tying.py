"""One parameter of several modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from flax_resblock.errors import InputError
from flax_resblock.port.modules import tensors_held
from flax_resblock.port.parts import (
    Body,
    LayerPart,
    ModulePart,
    ParameterPart,
    Part,
    parts_of,
    tensors_of,
)  # fmt: skip


def tie(module: torch.nn.Module, body: Body) -> None:
    """Lets the layers of a network share what its modules share.

    Args:
      module: The network.
      body: Of the network; gets the assignments that make one variable of two, and only one of
        them keeps its place in the state dict.
    Raises:
      InputError: The modules hold it in different memory layouts.
    """
    held = tensors_held(module)
    groups: dict[int, list[Any]] = {}
    for one in tensors_of(body.parts):
        groups.setdefault(id(held.get(one.key, one)), []).append(one)
    places = {key: (part, name) for key, part, name in _places(body.parts)}
    for group in groups.values():
        first, *others = sorted(group, key=lambda one: one.path)  # nnx keeps the first path
        for other in others:
            if first.codec.axes != other.codec.axes or body.sequence is not None:
                raise InputError(
                    f"{type(module).__name__} cannot be ported: {first.key} and {other.key} are "
                    f"one parameter of two modules, which cannot share it in Flax. Call one module "
                    f"twice, or give the second one a parameter of its own."
                )
            part, name = places[other.key]
            if isinstance(part, ParameterPart):
                part.tied = True
            else:
                left = {key: one for key, one in part.layer.tensors.items() if key != name}
                part.layer = replace(part.layer, tensors=left)
            body.ties.append((_text(other.path), _text(first.path)))


def _places(
    parts: Mapping[str, Part], prefix: str = ""
) -> Iterator[tuple[str, LayerPart | ParameterPart, str]]:
    """The key of every tensor, the part that has it, and its name there."""
    for part in parts.values():
        if isinstance(part, LayerPart):
            yield from ((f"{part.prefix}{name}", part, name) for name in part.layer.tensors)
        elif isinstance(part, ParameterPart):
            yield f"{prefix}{part.name}", part, part.name
        elif isinstance(part, ModulePart):
            yield from _places(parts_of(part.body), f"{part.body.path}.")
        else:
            yield from _places(part.items, prefix)


def _text(path: tuple[Any, ...]) -> str:
    """``self.layers[1].kernel`` for ``("layers", 1, "kernel")``."""
    steps = (f".{s}" if isinstance(s, str) and s.isidentifier() else f"[{s!r}]" for s in path)
    return "self" + "".join(steps)
