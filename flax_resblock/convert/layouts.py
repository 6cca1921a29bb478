"""Naming schemes of residual networks, as data. A new spelling is a new row of :data:`LAYOUTS`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from flax_resblock.architecture import Kind, Slot
from flax_resblock.convert.codecs import AS_IS, OIHW_HWIO, TRANSPOSED, Codec


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer: its name on both sides, and how its layout changes.

    Attributes:
      flax_name: Attribute of the Flax layer.
      name: Name in the layout at hand.
      codec: Between the two.
      role: ``"weight"`` (floating), ``"variance"`` (floating, not negative) or ``"counter"`` (integer; may be missing, PyTorch starts it at 0).
    """

    flax_name: str
    name: str
    codec: Codec = AS_IS
    role: str = "weight"


TORCH_TENSORS: Mapping[Kind, tuple[Tensor, ...]] = MappingProxyType(
    {
        Kind.CONV: (Tensor("kernel", "weight", OIHW_HWIO),),
        Kind.NORM: (
            Tensor("scale", "weight"),
            Tensor("bias", "bias"),
            Tensor("mean", "running_mean"),
            Tensor("var", "running_var", role="variance"),
            Tensor("num_batches_tracked", "num_batches_tracked", role="counter"),
        ),
        Kind.LINEAR: (Tensor("kernel", "weight", TRANSPOSED), Tensor("bias", "bias")),
        Kind.ACTIVATION: (),
    }
)
FLAX_TENSORS: Mapping[Kind, tuple[Tensor, ...]] = MappingProxyType(
    {kind: tuple(Tensor(t.flax_name, t.flax_name, AS_IS, t.role) for t in tensors) for kind, tensors in TORCH_TENSORS.items()}
)


@dataclass(frozen=True)
class Layout:
    """A naming scheme.

    Attributes:
      name: What ``--layout`` takes.
      stage: Template of a block's prefix, over ``{stage}`` (from 1) and ``{block}`` (from 0).
      modules: Module name of every place: ``"stem.conv"``, ``"head"``, and within a block ``"conv1"``, ``"shortcut.norm"``.
      origin: Who writes such checkpoints.
      tensors: Names and codecs of a layer's tensors.
    """

    name: str
    stage: str
    modules: Mapping[str, str]
    origin: str
    tensors: Mapping[Kind, tuple[Tensor, ...]] = field(default_factory=lambda: TORCH_TENSORS)

    def block_prefix(self, stage: str, block: int | None) -> str:
        """``"layer2.0"``; empty for a bare block."""
        return "" if block is None else self.stage.format(stage=stage.removeprefix("stage"), block=block)

    def module_name(self, slot: Slot) -> str | None:
        """Name of the module that holds ``slot``; None where this scheme has no such place; ``""`` for a bare block as a whole."""
        inside_stages = slot.block is not None or slot.stage == ""
        prefix = self.block_prefix(slot.stage, slot.block)
        if inside_stages and not slot.role:
            return prefix
        place = slot.role if inside_stages else ".".join(filter(None, (slot.stage, slot.role)))
        module = self.modules.get(place)
        return None if module is None else ".".join(filter(None, (prefix, module)))


_RESIDUAL = {"conv1": "conv1", "norm1": "bn1", "conv2": "conv2", "norm2": "bn2", "conv3": "conv3", "norm3": "bn3"}
_STEM = {"stem.conv": "conv1", "stem.norm": "bn1", "stem.pool": "maxpool"}
_DOWNSAMPLE = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_SHORTCUT = {"shortcut.conv": "shortcut.0", "shortcut.norm": "shortcut.1"}
_SEQUENTIAL = {
    "conv1": "block.0",
    "norm1": "block.1",
    "conv2": "block.3",
    "norm2": "block.4",
    "conv3": "block.6",
    "norm3": "block.7",
    "shortcut.conv": "skip.0",
    "shortcut.norm": "skip.1",
}
_FLAX_PLACES = (*_STEM, *_RESIDUAL, *_DOWNSAMPLE, "head")

_ROWS = (
    Layout("torchvision", "layer{stage}.{block}", _STEM | _RESIDUAL | _DOWNSAMPLE | {"head": "fc"}, "torchvision.models, timm, most papers"),
    Layout("sequential", "layer{stage}.{block}", _STEM | _SEQUENTIAL | {"head": "fc"}, "blocks written as nn.Sequential: block.0/1/3/4, skip.0/1"),
    Layout("akamaster", "layer{stage}.{block}", _STEM | _RESIDUAL | {"head": "linear"}, "github.com/akamaster/pytorch_resnet_cifar10 (option A)"),
    Layout("kuangliu", "layer{stage}.{block}", _STEM | _RESIDUAL | _SHORTCUT | {"head": "linear"}, "github.com/kuangliu/pytorch-cifar"),
    Layout("flax", "stage{stage}.{block}", {place: place for place in _FLAX_PLACES}, "this library's own names and layouts (NHWC, HWIO)", FLAX_TENSORS),
)
LAYOUTS: Mapping[str, Layout] = MappingProxyType({layout.name: layout for layout in _ROWS})
"""Every known naming scheme. The order settles ties between schemes that name the same tensors alike: the narrower scheme comes first."""
