"""Ports a live PyTorch module: traces it, writes its source, and proves the result."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import Path
from flax_resblock.convert.codecs import AS_IS
from flax_resblock.errors import InputError, some
from flax_resblock.parity.module_run import global_state_kept, inner, runnable
from flax_resblock.port import axes
from flax_resblock.port.body import Reader
from flax_resblock.port.classes import classes_of
from flax_resblock.port.graphs import leaves
from flax_resblock.port.known import known_network
from flax_resblock.port.layers import layer_of
from flax_resblock.port.modes import trace_training
from flax_resblock.port.modules import tensors_held
from flax_resblock.port.network import PortedNetwork
from flax_resblock.port.parts import (
    STEPS,
    Body,
    ContainerPart,
    LayerPart,
    ModulePart,
    Part,
    tensors_of,
)  # fmt: skip
from flax_resblock.port.proof import prove
from flax_resblock.port.source import in_docstring, source_of
from flax_resblock.port.table import Parameter, Table, Tensor
from flax_resblock.port.tracing import trace
from flax_resblock.port.values import BATCH

Size = tuple[int, int]
"""Height and width of images."""

SIZES: tuple[Size, ...] = ((64, 64), (32, 32), (224, 224), (299, 299))
"""Sizes of the images, in the order in which they are tried. At 32 pixels many networks end with
maps of one pixel, whose axes cannot be told from those that a reshape adds."""


def port(
    module: Any,
    *,
    image_size: Size | None = None,
    exact: bool = False,
    expand: bool = False,
    origin: str | None = None,
) -> PortedNetwork:
    """A PyTorch module as Flax source, with its weights and the proof that it computes the same.

    The module is traced in evaluation mode, written as Flax NNX classes, and run beside them on
    random images: the output, every layer's activation, in training mode also the running
    statistics and every gradient. It is left as it was.

    Args:
      module: An ``nn.Module`` that maps one batch of images ``(N, C, H, W)`` to tensors.
      image_size: Height and width to trace it with; None tries 64, 32, 224 and 299.
      exact: Train both for five steps as well, and compare weights and statistics to 1e-10.
      expand: Write out a network that this library has already, which is otherwise one line.
      origin: How the result names the module; None: its class.
    Returns:
      The ported network: ``source``, ``create()`` for the model, ``to_torch(model)`` for the way
      back.
    Raises:
      InputError: The module cannot be traced, has an operator that is not supported, or does not
        compute what was written. The message names the line of your code.
    Example:
      >>> ported = port(torchvision.models.mobilenet_v3_small())
      >>> print(ported.source)
      >>> model = ported.create()
    """
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"port takes an nn.Module, not a {type(module).__name__}.")
    with global_state_kept(), runnable(inner(module)) as copied:
        state = state_to_numpy(inner(module).state_dict())
        channels, size, random = _accepted(copied, [image_size] if image_size else SIZES)
        parameters = _parameters(copied, torch.randn(2, channels, *size))
        name = origin or type(inner(module)).__name__
        # the library's own networks have neither dropout nor stochastic depth
        known = None if expand or random else known_network(copied, name)
        if known is None:
            trains = random is not None
            return _ported(copied, state, parameters, channels, size, exact, name, trains=trains)
        table = Table.of(known.tensors, state, parameters)
        made = PortedNetwork(
            known.source, known.name, table, table.to_flax(state), {}, name, size, channels
        )
        proof = prove(copied, made, known.slots, exact=exact)
        return replace(made, figures=proof.figures, notes=tuple(proof.notes))


def _ported(
    module: torch.nn.Module,
    state: Mapping[str, np.ndarray],
    parameters: Mapping[str, Parameter],
    channels: int,
    size: Size,
    exact: bool,
    origin: str,
    *,
    trains: bool,
) -> PortedNetwork:
    """Writes the module with the sizes of its trace; if that is right for one size of images only,
    again with guesses at where they come from, which are kept if they are right for another size.
    """
    images = [torch.randn(2, channels, *size)]
    traced = trace(module, images)
    training = trace_training(traced, images) if trains else None
    names = Counter(id(one) for _, one in module.named_modules(remove_duplicate=False))
    title = f"{in_docstring(origin)} in Flax, with channels last. Written by flax-resblock port."
    frozen = [name for name, one in parameters.items() if not one.requires_grad]
    fixed: PortedNetwork | None = None
    tried = ""
    for any_size in (False, True):
        reader = Reader(traced, training, any_size)
        body = reader.body("", [((BATCH, channels, *size), axes.channels_last(4))])
        table = Table.of(_tensors(module, body), state, parameters)
        slots = {
            name: path
            for name, path in _slots(reader, body.parts, ())
            if names[id(module.get_submodule(name))] == 1
        }
        classes = classes_of(reader, body)
        unused = table.unused_of(state)
        why = "never used in evaluation mode; kept for the way back to PyTorch"
        notes = [f"{some(list(unused))}: {why}"] if unused else []
        if frozen:
            why = (
                "frozen in PyTorch (requires_grad=False); fit and `train` keep them, and keep them "
                "from an optimizer of your own in JAX too"
            )
            notes.append(f"{some(frozen)}: {why}")
        made = PortedNetwork(
            source_of(classes, title), classes[-1].name, table, table.to_flax(state), unused,
            origin, size, channels,
        )  # fmt: skip
        if made.source == tried:
            break  # there was nothing to guess
        tried = made.source
        proof = prove(module, made, slots, exact=exact)
        made = replace(made, figures=proof.figures, notes=(*notes, *proof.notes))
        if not proof.fixed_size:
            return made
        if fixed is None:
            source = source_of(classes, title, fixed_size=size)
            why = f"images of {size[0]}x{size[1]} only: {proof.fixed_size}"
            fixed = replace(made, source=source, notes=(*notes, why, *proof.notes))
    assert fixed is not None
    return fixed


def _accepted(module: torch.nn.Module, sizes: Sequence[Size]) -> tuple[int, Size, bool | None]:
    """The channels and the first size of images that the module runs on, in training mode too if
    there is one; and whether it draws random numbers there, None if it does not run."""
    kinds = torch.nn.Conv2d | torch.nn.ConvTranspose2d
    convolutions: list[Any] = [one for one in module.modules() if isinstance(one, kinds)]
    found = [one.in_channels for one in convolutions]
    first: Exception | None = None
    for channels in dict.fromkeys([*found[:1], 3, 1, *found]):
        runs: list[Size] = []
        for size in sizes:
            images = torch.randn(2, channels, *size)
            try:
                module(images)
            except Exception as error:  # whatever the user's code raises
                first = first or error
                continue
            runs.append(size)
            random = _draws(module, images)
            if random is not None:
                return channels, size, random
        if runs:
            return channels, runs[0], None
    shown = ", ".join(f"{height}x{width}" for height, width in sizes)
    said = f"{type(first).__name__}: {str(first).strip().partition(chr(10))[0][:200]}"
    raise InputError(
        f"{type(module).__name__} raises on images of {shown} pixels, with {(found or [3])[0]} and "
        f"other numbers of channels ({said}). Give a size that it takes with --image-size HEIGHT "
        f"WIDTH, or image_size=(height, width)."
    ) from first


def _draws(module: torch.nn.Module, images: torch.Tensor) -> bool | None:
    """Whether the module draws random numbers in training mode; None if it does not run in it."""
    before = torch.get_rng_state()
    try:
        copy.deepcopy(module).train()(images)
    except Exception:  # whatever the user's code raises
        return None
    return not torch.equal(before, torch.get_rng_state())


def _parameters(module: torch.nn.Module, images: torch.Tensor) -> dict[str, Parameter]:
    """The parameters in the order in which an optimizer has them. Training changes those that ask
    for a gradient and on which the output depends; PyTorch has none for others, and leaves them
    alone. Outputs that there are in training mode alone, as of auxiliary heads, do not count.
    """
    with torch.enable_grad():
        outputs = _outputs(module, images)
        with suppress(Exception):  # whatever the user's code raises: it does not run in training
            training = copy.deepcopy(module).train()
            outputs, module = _outputs(training, images)[: len(outputs)], training
        asking = {name: one for name, one in module.named_parameters() if one.requires_grad}
        found: Sequence[Any] = [None] * len(asking)
        sums = [one.float().sum() for one in outputs if one.requires_grad]
        if sums and asking:
            found = torch.autograd.grad(sums, list(asking.values()), allow_unused=True)
    reached = {name for name, one in zip(asking, found, strict=True) if one is not None}
    return {
        name: Parameter(one.requires_grad, name in reached)
        for name, one in module.named_parameters()
    }


def _outputs(module: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that the module returns."""
    return [one for one in leaves(module(images)) if isinstance(one, torch.Tensor)]


def _tensors(module: torch.nn.Module, body: Body) -> list[Tensor]:
    """Where every tensor of the state dict is; one that is there twice has one place."""
    placed = {one.key: one for one in tensors_of(body.parts)}
    held = tensors_held(module)
    by_identity = {id(held[key]): one for key, one in placed.items() if key in held}
    tensors = []
    for key in module.state_dict():
        one = placed.get(key) or by_identity.get(id(held.get(key)))
        path, codec = (None, AS_IS) if one is None else (one.path, one.codec)
        tensors.append(Tensor(key, path, codec))
    return tensors


def _slots(reader: Reader, parts: Mapping[str, Part], path: Path) -> Iterator[tuple[str, Path]]:
    """The modules whose outputs can be compared, by their names in PyTorch.

    Left out are those that are called more than once, and those whose axes are in another order.
    """
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
            yield from _slots(reader, body.parts, path)
    elif isinstance(part, ContainerPart):
        for place, (key, item) in enumerate(part.items.items()):
            yield from _slots_of(reader, item, (*path, *STEPS[part.kind](place, key)))


def _comparable(reader: Reader, name: str) -> bool:
    orders = reader.orders.get(name, [])
    return len(orders) == 1 and orders[0] in (axes.torch_order(2), axes.channels_last(4))
