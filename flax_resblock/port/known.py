"""Networks that this library has already: their source is a line that creates them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from flax_resblock.config import ARCHITECTURES, Path, ResNetConfig, SlotKind, name_of, walk
from flax_resblock.convert.metadata import EPS, MOMENTUM
from flax_resblock.convert.opening import OpenedCheckpoint, ReadOptions
from flax_resblock.errors import InputError
from flax_resblock.parity.live_module import open_module
from flax_resblock.port.layers import layer_of
from flax_resblock.port.source import formatted, in_docstring
from flax_resblock.port.table import PlacedTensor


@dataclass(frozen=True)
class KnownNetwork:
    """A network as this library has it.

    Attributes:
      source: Of the Python file.
      name: Of the function in it that creates the network.
      tensors: Where those of the state dict are.
      slots: Paths of the layers in the Flax model, by their names in PyTorch.
    """

    source: str
    name: str
    tensors: tuple[PlacedTensor, ...]
    slots: Mapping[str, Path]


def known_network(module: torch.nn.Module, origin: str) -> KnownNetwork | None:
    """The network of this library that a module is, found and compared as
    :func:`flax_resblock.from_torch` does; None if it is none, or only a part of the module.
    """
    try:
        opened, _ = open_module(module, ReadOptions())
    except InputError:
        return None
    entries = opened.state_map.entries
    by_key = {entry.torch_key: entry for entry in entries}
    keys = list(module.state_dict())
    if not isinstance(opened.config, ResNetConfig) or by_key.keys() != set(keys):
        return None
    tensors = tuple(PlacedTensor(key, by_key[key].flax_path, by_key[key].codec) for key in keys)
    modules = opened.state_map.modules
    slots = {
        modules[slot.name]: slot.path for slot in walk(opened.config) if modules.get(slot.name)
    }
    for slot in walk(opened.config):
        name = modules.get(slot.name)
        if name in slots and ("norm" in slot.kind.value or slot.kind is SlotKind.LINEAR):
            layer = layer_of(module.get_submodule(name))
            # a norm of timm's own class applies the activation too; BiT's head is a convolution
            if layer is None or (slot.kind is SlotKind.LINEAR and layer.call != "nn.Linear"):
                del slots[name]
    name = type(module).__name__
    return KnownNetwork(_source(opened, opened.config, name, origin), name, tensors, slots)


def _source(opened: OpenedCheckpoint, config: ResNetConfig, name: str, origin: str) -> str:
    title = name_of(config)
    usual = {EPS: 1e-5, MOMENTUM: 0.1}
    options = {
        option: value for option, value in opened.norm_options.items() if value != usual.get(option)
    }
    if title in ARCHITECTURES:
        known = ARCHITECTURES[title]
        changed = {
            field: getattr(config, field)
            for field in ("num_classes", "in_channels")
            if getattr(config, field) != getattr(known, field)
        }
        made = f"flax_resblock.create({title!r}"
        options = {**changed, **options}
    else:
        told = ", ".join(
            f"{field.name}={getattr(config, field.name)!r}"
            for field in fields(config)
            if getattr(config, field.name) != field.default
        )
        made = f"flax_resblock.ResNet(flax_resblock.ResNetConfig({told})"
    shown = "".join(f", {option}={value!r}" for option, value in options.items())
    logits = config.num_classes if config.num_classes is not None else "..., C"
    return formatted(
        f'''"""{in_docstring(origin)} is {title} of flax_resblock. Written by flax-resblock port."""

from __future__ import annotations

from flax import nnx

import flax_resblock


def {name}(*, rngs: nnx.Rngs) -> flax_resblock.ResNet:
    """A network from ``(N, H, W, {config.in_channels})`` to ``(N, {logits})``."""
    return {made}{shown}, rngs=rngs)
'''
    )
