"""What a naming scheme of residual networks consists of."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from flax_resblock.config import Activation, Branch, Config, Slot, SlotKind, walk
from flax_resblock.convert.codecs import AS_IS, MATRIX, OIHW_HWIO, OIW_WIO, TRANSPOSED, Codec


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

    def key(self, module: str) -> str:
        """Its name in the scheme's state dict; a tensor without a name has its module's."""
        return f"{module}.{self.name}" if self.name else module


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
        SlotKind.FROZEN_NORM: (
            Tensor("scale", "weight"),
            Tensor("bias", "bias"),
            Tensor("mean", "running_mean"),
            Tensor("var", "running_var", role="variance"),
        ),
        SlotKind.GROUP_NORM: (Tensor("scale", "weight"), Tensor("bias", "bias")),
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


def numbered(conv: str, norm: str, convolutions: int = 3, first: int = 0) -> dict[str, str]:
    """The main path of a block, from templates over the number of each convolution."""
    templates = {"conv": conv, "norm": norm}
    return {
        f"{kind}{i + 1}": template.format(i + first)
        for kind, template in templates.items()
        for i in range(convolutions)
    }


def is_outside(place: str) -> bool:
    """Whether a place of a network is outside its blocks."""
    return place in ("norm", "head") or place.startswith(("stem", "transition"))


@dataclass(frozen=True)
class Naming:
    """A naming scheme: what the tensors of a residual network are called.

    Every function that takes the name of a known scheme (a key of ``flax_resblock.NAMINGS``) also
    takes an object of this class, for checkpoints whose names are your own.

    Attributes:
      name: Of the scheme; ``--naming`` takes it where the scheme is known.
      stage: Template of a block's prefix, over ``{stage}`` (from ``first_stage``) and ``{block}``
        (from ``first_block``); or over ``{index}``, where all blocks of a network are numbered
        through (from ``first_stage``).
      modules: Module name of every place of the network. Places outside the stages are
        ``"stem.conv"``, ``"stem.norm"`` (``"stem.conv1"`` to ``"stem.norm3"`` of a deep stem) and
        ``"norm"`` behind the last stage and ``"head"``; ``"transition1.conv"`` and
        ``"transition1.norm"`` are in front of the first stage where that begins with pooling; those
        of a block are ``"conv1"``, ``"norm1"``, ``"conv2"`` and so on, ``"shortcut.conv"``,
        ``"shortcut.norm"``. You can leave out those that you do not have.
      origin: Who writes such checkpoints.
      first_stage, first_block: Numbers of the first stage, and of the first block of each, in the
        template.
      hub: The package that loads folders of weights and ``config.json`` with these names: a key of
        :data:`flax_resblock.convert.hubs.HUBS`; empty if there is none.
      tensors: Names and codecs of a layer's tensors; PyTorch's by default.
      blocks: Prefixes of the blocks of every stage, instead of ``stage`` and ``first_stage``.
      joint: What stands between the prefix of a block and the names in it.
      assumes: Options that cannot be inferred from the weights and that networks in pre-activation
        order have in this scheme, where they are not the usual ones.
      told: Fields of the configuration, and ``eps`` and ``momentum``, of the program that such
        checkpoints come from.
      note: What else a reader should know of that program; a sentence without its end.
      matrices: Places of convolutions of one pixel that are linear layers in this scheme.
      counts: Whether norms have the counter ``num_batches_tracked``.
      root: Of a JAX program: the module around all others in its files.
      parts: The parts of a block in the order of their tensors.
      branches: Whether the prefix of a block is that of its main path alone, so that no module
        gives what the block does.
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
    first_block: int = 0
    hub: str = ""
    tensors: Mapping[SlotKind, tuple[Tensor, ...]] = field(default_factory=lambda: TORCH_TENSORS)
    blocks: tuple[tuple[str, ...], ...] = ()
    joint: str = "."
    assumes: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[Branch, ...] = (Branch.MAIN, Branch.ATTENTION, Branch.SHORTCUT)
    told: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    counts: bool = True
    root: str = ""
    matrices: tuple[str, ...] = ()
    branches: bool = False

    def tensors_of(self, kind: SlotKind, role: str) -> tuple[Tensor, ...]:
        """The tensors of a layer at a place of a block."""
        if role not in self.matrices:
            return self.tensors[kind]
        kernel, *others = self.tensors[kind]
        return replace(kernel, codec=MATRIX), *others

    @property
    def as_in_flax(self) -> bool:
        """Whether kernels lie as in Flax (HWIO), so that PyTorch loads no such state dict."""
        return self.tensors[SlotKind.CONV][0].codec == AS_IS

    @property
    def origin_tells(self) -> bool:
        """Whether the names are those of one program alone, whose networks are known."""
        return bool(self.told)

    @property
    def numbers_through(self) -> bool:
        """Whether names of blocks depend on how many are in the stages before."""
        return "{index}" in self.stage

    def laid_out(self, depths: Sequence[int]) -> Naming:
        """The scheme of a network of so many blocks per stage, where that decides about names."""
        if not self.numbers_through:
            return self
        numbers = iter(range(self.first_stage, self.first_stage + sum(depths)))
        blocks = tuple(
            tuple(self.stage.format(index=next(numbers)) for _ in range(depth)) for depth in depths
        )
        head = {"head": self.modules["head"].format(behind=self.first_stage + sum(depths) + 1)}
        return replace(self, blocks=blocks, modules={**self.modules, **head})

    def block_prefix(self, stage: str, block: int | None) -> str | None:
        """``"layer2.0"``; empty for a bare block; None where there is no such block."""
        if block is None:
            return ""
        if self.blocks or self.numbers_through:
            place = int(stage.removeprefix("stage")) - 1
            known = place < len(self.blocks) and block < len(self.blocks[place])
            return self.blocks[place][block] if known else None
        number = int(stage.removeprefix("stage")) - 1 + self.first_stage
        return self.stage.format(stage=number, block=block + self.first_block)

    def inside_blocks(self, config: Config) -> tuple[str, ...]:
        """With what the names of modules inside the blocks of a network begin."""
        places = [(slot.stage, slot.block) for slot in walk(config) if slot.is_block]
        return tuple(f"{name}." if (name := self.block_prefix(*at)) else "" for at in places)

    def is_inside_block(self, key: str) -> bool:
        """Whether a tensor has the name of one in a block of a network."""
        if self.blocks:
            prefixes = (prefix + self.joint for stage in self.blocks for prefix in stage)
            return any(map(key.startswith, prefixes))
        pattern = re.sub(r"\\{(stage|block|index)[^}]*\\}", r"\\d+", re.escape(self.stage))
        return re.match(pattern + re.escape(self.joint), key) is not None

    def is_in_bare_block(self, key: str) -> bool:
        """Whether a tensor has the name of one in a bare block."""
        inside = (name for at, name in self.modules.items() if not is_outside(at))
        return any(key.startswith(f"{name}.") for name in inside)

    def module_name(self, slot: Slot) -> str | None:
        """Name of the module that holds ``slot``; None: no such place; ``""``: a bare block."""
        inside_stages = slot.block is not None or slot.stage == ""
        prefix = self.block_prefix(slot.stage, slot.block)
        if prefix is None:
            return None
        if inside_stages and not slot.role:
            return None if self.branches else prefix
        place = slot.role if inside_stages else ".".join(filter(None, (slot.stage, slot.role)))
        module = self.modules.get(place)
        return None if module is None else self.joint.join(filter(None, (prefix, module)))
