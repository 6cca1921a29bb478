"""What the parameters, tensors and slots of a module are, and where its Flax network has them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import torch

from flax_resblock.config import Path
from flax_resblock.convert.codecs import AS_IS
from flax_resblock.errors import InputError, some
from flax_resblock.port import axes
from flax_resblock.port.body import Reader
from flax_resblock.port.graphs import leaves
from flax_resblock.port.layers import layer_of
from flax_resblock.port.modules import tensors_held
from flax_resblock.port.parts import (
    STEPS,
    Body,
    ContainerPart,
    LayerPart,
    ModulePart,
    Part,
    tensors_of,
)  # fmt: skip
from flax_resblock.port.table import Parameter, PlacedTensor


def parameters_of(module: torch.nn.Module, images: Sequence[torch.Tensor]) -> dict[str, Parameter]:
    """The parameters in the order in which an optimizer has them. Training changes those that ask
    for a gradient and on which an output depends in training mode, also that of an auxiliary head;
    PyTorch has none for others, and leaves them alone.

    Raises:
      InputError: The backward pass changes a buffer.
    """
    changed: list[str] = []
    reached = {name for name, one in module.named_parameters() if one.requires_grad}
    with torch.enable_grad():
        for mode in (False, True):
            copied = copy.deepcopy(module).train(mode)
            copied.zero_grad(set_to_none=True)
            with suppress(Exception):  # whatever the user's code raises here
                sums = [one.float().sum() for one in _outputs(copied, images) if one.requires_grad]
                before = {name: one.clone() for name, one in copied.named_buffers()}
                if sums:
                    torch.stack(sums).sum().backward()
                reached = {n for n, one in copied.named_parameters() if one.grad is not None}
                after = copied.named_buffers()
                changed += [name for name, one in after if not torch.equal(one, before[name])]
    if changed:
        raise InputError(
            f"{type(module).__name__} cannot be ported: its backward pass changes {some(changed)}. "
            f"torch.utils.checkpoint around a batch norm does that: the norm runs twice, and its "
            f"statistics count every batch twice. Keep norms out of what is computed again."
        )
    return {
        name: Parameter(one.requires_grad, name in reached)
        for name, one in module.named_parameters()
    }


def _outputs(module: torch.nn.Module, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that the module returns."""
    return [one for one in leaves(module(*images)) if isinstance(one, torch.Tensor)]


def versions_of(module: torch.nn.Module) -> dict[str, int]:
    """With which version the classes of a module that are not PyTorch's mark its state dict."""
    marks = getattr(module.state_dict(), "_metadata", {})
    return {
        path: mark["version"]
        for path, mark in marks.items()
        if isinstance(mark.get("version"), int)
        and not type(module.get_submodule(path)).__module__.startswith("torch.nn.")
        and type(module.get_submodule(path))._version != torch.nn.Module._version
    }


def placed_tensors(module: torch.nn.Module, body: Body) -> list[PlacedTensor]:
    """Where every tensor of the state dict is; one that is there twice has one place."""
    placed = {one.key: one for one in tensors_of(body.parts)}
    held = tensors_held(module)
    by_identity = {id(held[key]): one for key, one in placed.items() if key in held}
    tensors = []
    for key in module.state_dict():
        one = placed.get(key) or by_identity.get(id(held.get(key)))
        path, codec = (None, AS_IS) if one is None else (one.path, one.codec)
        tensors.append(PlacedTensor(key, path, codec))
    return tensors


def slots_of(reader: Reader, body: Body) -> dict[str, Path]:
    """The modules whose outputs can be compared, by their names in PyTorch, with their paths.

    Left out are those that are called more than once or have several names, and those whose axes
    are in another order.
    """
    live = reader.traced.live
    names = Counter(id(one) for _, one in live.named_modules(remove_duplicate=False))
    found = _slots_in(reader, body.parts, ())
    return {name: path for name, path in found if names[id(live.get_submodule(name))] == 1}


def _slots_in(reader: Reader, parts: Mapping[str, Part], path: Path) -> Iterator[tuple[str, Path]]:
    for name, part in parts.items():
        yield from _slots_of(reader, part, (*path, name))


def _slots_of(reader: Reader, part: Part, path: Path) -> Iterator[tuple[str, Path]]:
    if isinstance(part, LayerPart):
        name = part.prefix.rstrip(".")
        if name and _comparable(reader, name) and layer_of(reader.live(name)) is not None:
            yield name, path
    elif isinstance(part, ModulePart):
        body = part.body
        if _comparable(reader, body.path):
            yield body.path, path
        if body.sequence is not None:
            yield from _slots_of(reader, body.sequence, path)
        else:
            yield from _slots_in(reader, body.parts, path)
    elif isinstance(part, ContainerPart):
        for place, (key, item) in enumerate(part.items.items()):
            yield from _slots_of(reader, item, (*path, *STEPS[part.kind](place, key)))


def _comparable(reader: Reader, name: str) -> bool:
    if name in reader.traced.folded.between:
        return False
    orders = reader.orders.get(name, [])
    return len(orders) == 1 and orders[0] in (axes.torch_order(2), axes.channels_last(4))
