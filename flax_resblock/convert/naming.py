"""Naming schemes of residual networks, as data: a new scheme is a new row of :data:`NAMINGS`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flax_resblock.config import Activation, Slot, SlotKind
from flax_resblock.convert.codecs import AS_IS, OIHW_HWIO, OIW_WIO, TRANSPOSED, Codec
from flax_resblock.errors import InputError


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer: its names in both frameworks, and how its memory layout changes.

    Attributes:
      flax_name: Attribute of the Flax layer.
      name: Name in the naming scheme at hand.
      codec: Between the two.
      role: ``"weight"`` (floating), ``"variance"`` (floating, not negative) or ``"counter"``
        (integer; may be missing, PyTorch starts it at 0).
    """

    flax_name: str
    name: str
    codec: Codec = AS_IS
    role: str = "weight"


TORCH_TENSORS: Mapping[SlotKind, tuple[Tensor, ...]] = MappingProxyType(
    {
        SlotKind.CONV: (Tensor("kernel", "weight", OIHW_HWIO),),
        SlotKind.BIASED_CONV: (Tensor("kernel", "weight", OIHW_HWIO), Tensor("bias", "bias")),
        SlotKind.CHANNEL_CONV: (Tensor("kernel", "weight", OIW_WIO),),
        SlotKind.NORM: (
            Tensor("scale", "weight"),
            Tensor("bias", "bias"),
            Tensor("mean", "running_mean"),
            Tensor("var", "running_var", role="variance"),
            Tensor("num_batches_tracked", "num_batches_tracked", role="counter"),
        ),
        SlotKind.LINEAR: (Tensor("kernel", "weight", TRANSPOSED), Tensor("bias", "bias")),
    }
    | dict.fromkeys((SlotKind.MAX_POOL, SlotKind.AVERAGE_POOL, SlotKind.BLUR, SlotKind.OUTPUT), ())
)
TORCH_ACTIVATIONS: Mapping[Activation, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "relu": ("ReLU", {}),
        "leaky_relu": ("LeakyReLU", {"negative_slope": 0.01}),
        "gelu": ("GELU", {"approximate": "none"}),
        "silu": ("SiLU", {}),
    }
)
"""Class of the PyTorch layer that is an activation, and its attributes."""
FLAX_TENSORS: Mapping[SlotKind, tuple[Tensor, ...]] = MappingProxyType(
    {
        kind: tuple(Tensor(t.flax_name, t.flax_name, AS_IS, t.role) for t in tensors)
        for kind, tensors in TORCH_TENSORS.items()
    }
)


@dataclass(frozen=True)
class Naming:
    """A naming scheme: what the tensors of a residual network are called.

    Every function that takes the name of a known scheme (a key of :data:`NAMINGS`) also takes an
    object of this class, for checkpoints whose names are your own.

    Attributes:
      name: Of the scheme; ``--naming`` takes it where the scheme is in :data:`NAMINGS`.
      stage: Template of a block's prefix, over ``{stage}`` (from ``first_stage``) and ``{block}``
        (from 0).
      modules: Module name of every place of the network. Places outside the stages are
        ``"stem.conv"``, ``"stem.norm"`` (``"stem.conv1"`` to ``"stem.norm3"`` of a deep stem) and
        ``"head"``; those of a block are ``"conv1"``, ``"norm1"``, ``"conv2"`` and so on,
        ``"shortcut.conv"``, ``"shortcut.norm"``. You can leave out those that you do not have.
      origin: Who writes such checkpoints.
      first_stage: Number of the first stage in the template.
      hub: The package that loads folders of weights and ``config.json`` with these names: a key of
        :data:`flax_resblock.convert.hubs.HUBS`; empty if there is none.
      tensors: Names and codecs of a layer's tensors; PyTorch's by default.
      blocks: Prefixes of the blocks of every stage, instead of ``stage`` and ``first_stage``.
      joint: What stands between the prefix of a block and the names in it.
    Example:
      >>> mine = Naming(
      ...     name="mine",
      ...     stage="group{stage}.unit{block}",
      ...     modules={
      ...         "stem.conv": "first.conv", "stem.norm": "first.bn",
      ...         "conv1": "a.conv", "norm1": "a.bn", "conv2": "b.conv", "norm2": "b.bn",
      ...         "shortcut.conv": "skip.conv", "shortcut.norm": "skip.bn",
      ...         "head": "classifier",
      ...     },
      ... )
      >>> config = ResNetConfig(depths=(1, 1), widths=(4, 8), stem_width=4, num_classes=2)
      >>> model = ResNet(config, rngs=nnx.Rngs(0))
      >>> state = to_torch(model, naming=mine)
      >>> sorted(state)[:2], len(state)
      (['classifier.bias', 'classifier.weight'], 38)
      >>> restored = from_torch(state, naming=mine)
    """

    name: str
    stage: str
    modules: Mapping[str, str]
    origin: str = "your own"
    first_stage: int = 1
    hub: str = ""
    tensors: Mapping[SlotKind, tuple[Tensor, ...]] = field(default_factory=lambda: TORCH_TENSORS)
    blocks: tuple[tuple[str, ...], ...] = ()
    joint: str = "."

    def block_prefix(self, stage: str, block: int | None) -> str | None:
        """``"layer2.0"``; empty for a bare block; None where there is no such block."""
        if block is None:
            return ""
        if self.blocks:
            place = int(stage.removeprefix("stage")) - 1
            known = place < len(self.blocks) and block < len(self.blocks[place])
            return self.blocks[place][block] if known else None
        number = int(stage.removeprefix("stage")) - 1 + self.first_stage
        return self.stage.format(stage=number, block=block)

    def is_inside_block(self, key: str) -> bool:
        """Whether a tensor has the name of one in a block of a network."""
        if self.blocks:
            prefixes = (prefix + self.joint for stage in self.blocks for prefix in stage)
            return any(map(key.startswith, prefixes))
        pattern = re.sub(r"\\{(stage|block)\\}", r"\\d+", re.escape(self.stage))
        return re.match(pattern + re.escape(self.joint), key) is not None

    def is_in_bare_block(self, key: str) -> bool:
        """Whether a tensor has the name of one in a bare block."""
        inside = (name for at, name in self.modules.items() if not at.startswith(("stem", "head")))
        return any(key.startswith(f"{name}.") for name in inside)

    def module_name(self, slot: Slot) -> str | None:
        """Name of the module that holds ``slot``; None: no such place; ``""``: a bare block."""
        inside_stages = slot.block is not None or slot.stage == ""
        prefix = self.block_prefix(slot.stage, slot.block)
        if prefix is None:
            return None
        if inside_stages and not slot.role:
            return prefix
        place = slot.role if inside_stages else ".".join(filter(None, (slot.stage, slot.role)))
        module = self.modules.get(place)
        return None if module is None else self.joint.join(filter(None, (prefix, module)))


_RESIDUAL = {f"conv{i}": f"conv{i}" for i in (1, 2, 3)} | {f"norm{i}": f"bn{i}" for i in (1, 2, 3)}
_STEM = {
    "stem.conv": "conv1",
    "stem.norm": "bn1",
    "stem.pool": "maxpool",
    "stem.pool.pool": "maxpool.0",
    "stem.pool.blur": "maxpool.1",
}
_DOWNSAMPLE = {"shortcut.conv": "downsample.0", "shortcut.norm": "downsample.1"}
_SHORTCUT = {"shortcut.conv": "shortcut.0", "shortcut.norm": "shortcut.1"}
_POOLED = {
    "shortcut.pool": "downsample.0",
    "shortcut.projection.conv": "downsample.1",
    "shortcut.projection.norm": "downsample.2",
}
_ATTENTION = {
    "attention": "se",
    "attention.reduce": "se.fc1",
    "attention.expand": "se.fc2",
    "attention.conv": "se.conv",
    "blur": "aa",
}


def _stem_sequence(name: str, last_norm: str) -> dict[str, str]:
    """A deep stem as one ``nn.Sequential``; the last norm may stand outside."""
    convs = {f"stem.conv{i + 1}": f"{name}.{3 * i}" for i in range(3)}
    norms = {f"stem.norm{i + 1}": f"{name}.{3 * i + 1}" for i in range(3)}
    return convs | norms | {"stem.norm3": last_norm}


_TORCHVISION = (
    _STEM | _stem_sequence("conv1", "bn1") | _RESIDUAL | _DOWNSAMPLE | _POOLED | _ATTENTION
)
_SEQUENTIAL = {
    **{f"conv{i + 1}": f"block.{3 * i}" for i in range(3)},
    **{f"norm{i + 1}": f"block.{3 * i + 1}" for i in range(3)},
    "shortcut.conv": "skip.0",
    "shortcut.norm": "skip.1",
}
_CHILDREN = {"stem.conv": "0", "stem.norm": "1", "stem.pool": "3"}
_DETECTRON2 = {
    "stem.conv": "stem.conv1",
    "stem.norm": "stem.conv1.norm",
    "head": "linear",
    **{f"conv{i}": f"conv{i}" for i in (1, 2, 3)},
    **{f"norm{i}": f"conv{i}.norm" for i in (1, 2, 3)},
    "shortcut.conv": "shortcut",
    "shortcut.norm": "shortcut.norm",
}


def _huggingface(prefix: str) -> dict[str, str]:
    """``ResNetModel`` in transformers: every convolution and its norm in a module of their own."""
    stem = {
        "stem.conv": "embedder.embedder.convolution",
        "stem.norm": "embedder.embedder.normalization",
        "stem.pool": "embedder.pooler",
    }
    main = {
        f"{kind}{i + 1}": f"layer.{i}.{name}"
        for i in range(3)
        for kind, name in (("conv", "convolution"), ("norm", "normalization"))
    }
    skip = {"shortcut.conv": "shortcut.convolution", "shortcut.norm": "shortcut.normalization"}
    return {place: prefix + name for place, name in stem.items()} | main | skip


_FLAX_PLACES = (*_TORCHVISION, "head")
_DEEP_STEM = _stem_sequence("stem", "stem.7")
_OPENMMLAB = {place: f"backbone.{name}" for place, name in (_STEM | _DEEP_STEM).items()}

_ROWS = (
    Naming(
        "torchvision", "layer{stage}.{block}", _TORCHVISION | {"head": "fc"},
        "torchvision.models, timm, most papers",
    ),
    Naming(
        "sequential", "layer{stage}.{block}", _STEM | _SEQUENTIAL | {"head": "fc"},
        "blocks written as nn.Sequential: block.0/1/3/4, skip.0/1",
    ),
    Naming(
        "akamaster", "layer{stage}.{block}", _STEM | _RESIDUAL | {"head": "linear"},
        "github.com/akamaster/pytorch_resnet_cifar10 (option A)",
    ),
    Naming(
        "kuangliu", "layer{stage}.{block}", _STEM | _RESIDUAL | _SHORTCUT | {"head": "linear"},
        "github.com/kuangliu/pytorch-cifar",
    ),
    Naming(
        "timm", "layer{stage}.{block}", _TORCHVISION | {"head": "fc"},
        "timm's folders (torchvision's names)", hub="timm",
    ),
    Naming(
        "huggingface", "resnet.encoder.stages.{stage}.layers.{block}",
        _huggingface("resnet.") | {"head": "classifier.1"},
        "transformers.ResNetForImageClassification", first_stage=0, hub="transformers",
    ),
    Naming(
        "huggingface_backbone", "encoder.stages.{stage}.layers.{block}", _huggingface(""),
        "transformers.ResNetModel, ResNetBackbone", first_stage=0, hub="transformers",
    ),
    Naming(
        "openmmlab", "backbone.layer{stage}.{block}",
        _OPENMMLAB | _RESIDUAL | _DOWNSAMPLE | _POOLED | {"head": "head.fc"},
        "mmpretrain classifiers",
    ),
    Naming(
        "openmmlab_backbone", "layer{stage}.{block}",
        _DEEP_STEM | _RESIDUAL | _DOWNSAMPLE | _POOLED,
        "mmdet and mmseg, deep stem (ResNetV1d)",
    ),
    Naming("detectron2", "res{stage}.{block}", _DETECTRON2, "detectron2", first_stage=2),
    Naming(
        "children", "{stage}.{block}", _CHILDREN | _RESIDUAL | _DOWNSAMPLE,
        "nn.Sequential(*resnet.children()) without fc: lightly, BYOL", first_stage=4,
    ),
    Naming(
        "flax", "stage{stage}.{block}", {place: place for place in _FLAX_PLACES},
        "this library's own names and layouts (NHWC, HWIO)", tensors=FLAX_TENSORS,
    ),
)  # fmt: skip
NAMINGS: Mapping[str, Naming] = MappingProxyType({naming.name: naming for naming in _ROWS})
"""Known naming schemes by name; of two that fit alike, the first is reported."""


def naming_of(naming: str | Naming) -> Naming:
    """The naming scheme that a name stands for; an object is returned as it is.

    Raises:
      InputError: A name that :data:`NAMINGS` does not have, or an object of your own that has the
        name of one of them: files say by name how they are written.
    """
    if isinstance(naming, Naming):
        if naming != NAMINGS.get(naming.name, naming):
            raise InputError(
                f"{naming.name!r} is the name of one of this library's naming schemes, and yours "
                f"is another one. Give it a name of its own."
            )
        return naming
    if naming not in NAMINGS:
        raise InputError(
            f"naming scheme {naming!r} is unknown; known: {', '.join(NAMINGS)}. Describe a scheme "
            f"of your own with flax_resblock.Naming and pass the object as naming=... in Python."
        )
    return NAMINGS[naming]
