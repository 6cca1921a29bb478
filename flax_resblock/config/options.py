"""The options that blocks and networks of blocks are told alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from flax_resblock.config.slots import Activation, Norm

BlockKind = Literal["basic", "bottleneck"]
Shortcut = Literal["projection", "pooled", "zero_pad", "zero_pad_behind", "none"]
ShortcutSource = Literal["activated", "input"]
ShortcutSize = Literal[1, 3]
Order = Literal["post_activation", "pre_activation"]
StridePlacement = Literal["3x3", "1x1"]
Attention = Literal["none", "se", "eca"]
AttentionPlace = Literal["branch", "sum", "output"]
Antialias = Literal["none", "blur"]
PaddingRule = Literal["symmetric", "same"]
Stem = Literal["imagenet", "deep", "cifar"]
StemStride = Literal[None, 1, 2]
StemPool = Literal[None, "3x3", "3x3_zeros", "2x2", "none"]
StemPadding = Literal[None, "symmetric", "same"]
HeadPool = Literal["mean", "max"]
Transition = Literal["strided", "pooled"]
Lowering = Literal["auto", "xla"]  # of convolutions on a CPU; see flax_resblock.conv_lowering

USUAL_STEMS: Mapping[Stem, tuple[int, str]] = MappingProxyType(
    {"imagenet": (2, "3x3"), "deep": (2, "3x3"), "cifar": (1, "none")}
)
"""Stride of the first convolution, and the pooling after the last."""
STEM_WINDOWS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"3x3": (3, 1), "3x3_zeros": (3, 0), "2x2": (2, 0)}
)
"""Size and padding of each pooling; zeros stand around the image in the second."""
EXPANSION: Mapping[str, int] = MappingProxyType({"basic": 1, "bottleneck": 4})


@cache
def choices_of(config: type) -> Mapping[str, tuple[Any, ...]]:
    """The options of a configuration class: its fields that are literals or booleans."""
    hints = get_type_hints(config).items()
    literals = {name: get_args(hint) for name, hint in hints if get_origin(hint) is Literal}
    return literals | {name: (False, True) for name, hint in hints if hint is bool}


def check_choices(config: Any) -> None:
    """Raises ValueError for an option whose value is none of its literal's."""
    for name, known in choices_of(type(config)).items():
        if (value := getattr(config, name)) not in known:
            *others, last = map(repr, known)
            what = "block kind" if name == "kind" else name
            raise ValueError(f"{what} {value!r} is unknown; choose {', '.join(others)} or {last}.")


def check_positive(config: Any, *names: str) -> None:
    """Raises ValueError for a field that is no positive integer."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer.")


class SharedOptions(TypedDict, total=False):
    """Fields of :class:`BlockOptions` that basic blocks have too, as keyword arguments."""

    groups: int
    shortcut: Shortcut
    attention: Attention
    attention_place: AttentionPlace
    attention_ratio: float
    attention_multiple: int
    attention_bias: bool
    antialias: Antialias
    activation: Activation
    conv_bias: bool
    shortcut_bias: bool
    padding: PaddingRule
    order: Order
    shortcut_from: ShortcutSource
    shortcut_size: ShortcutSize
    norm: Norm
    norm_groups: int
    standardized: bool
    standardized_eps: float
    last_activation: bool
    branch_activation: bool
    dropout: float


class NetworkOptions(SharedOptions, total=False):
    """Fields of :class:`ResNetConfig` but ``in_channels`` and ``num_classes``, as keyword
    arguments."""

    block: BlockKind
    depths: tuple[int, ...]
    widths: tuple[int, ...]
    stem: Stem
    stem_width: int
    stem_hidden: tuple[int, ...]
    stem_stride: StemStride
    stem_pool: StemPool
    stem_padding: StemPadding
    stem_bias: bool
    stem_norm: bool
    first_stride: int
    stride_on: StridePlacement
    base_width: int
    dilated_stages: tuple[int, ...]
    final_norm: bool
    head_pool: HeadPool
    transition: Transition


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What a block and a network of such blocks are told alike.

    Attributes:
      groups, base_width: As in torchvision: the inner width is ``int(planes * base_width / 64) *
        groups``; a basic block takes groups only.
      order: ``"post_activation"`` is convolution, norm, activation, and the activation after the
        addition (He et al. 2015, arXiv:1512.03385); ``"pre_activation"`` is norm, activation,
        convolution, and nothing after the addition (He et al. 2016b, arXiv:1603.05027). A
        projection then has no norm.
      shortcut: Where stride or channels change: ``"projection"`` is a convolution and a norm;
        ``"pooled"`` averages 2x2 pixels first, where the stride is 2 (ResNet-D, He et al. 2019,
        arXiv:1812.01187); ``"zero_pad"`` is option A of He et al. 2016, a strided slice with zero
        channels added on both sides, or with ``"zero_pad_behind"`` behind the old ones alone.
        ``"none"``: no block adds anything.
      shortcut_from: What a shortcut that changes the shape is given in pre-activation order: what
        the first norm and activation of its block give, or the block's input. A shortcut that
        copies always copies the input.
      shortcut_size: Of the kernel of a projection, in pixels.
      stride_on: Which convolution of a bottleneck carries the stride: ``"3x3"`` as torchvision,
        ``"1x1"`` as Caffe and He et al.
      attention: Weighs channels: ``"se"`` squeeze-and-excitation (arXiv:1709.01507), ``"eca"``
        efficient channel attention (arXiv:1910.03151).
      attention_place: Which channels: those of the main path before the addition (``"branch"``),
        those of the sum before its activation (``"sum"``), or those of the block's output, behind
        that activation (``"output"``, the SE-POST block of arXiv:1709.01507). Where no activation
        follows the addition, the last two are one network, called ``"sum"``.
      attention_ratio: Inner channels of ``"se"`` per channel.
      attention_multiple: What they are a multiple of: rounded to the nearest multiple of 8, as timm
        does, or with 1 rounded down, as ``channels // 16`` does.
      attention_bias: Whether both layers of ``"se"`` have a bias.
      antialias: ``"blur"``: a 3x3 binomial filter carries a stride of 2 (Zhang 2019,
        arXiv:1904.11486), also that of a stem's pooling; it has no weights.
      activation: Of the stem, within a block and at its end, as PyTorch defines it:
        ``"leaky_relu"`` has a slope of 0.01 and ``"gelu"`` is exact. Squeeze-and-excitation keeps
        its ReLU.
      conv_bias, shortcut_bias: Whether the convolutions of the main path, and that of the shortcut,
        have a bias, as ``nn.Conv2d`` has by default. In training a bias in front of a batch norm
        changes the running mean alone.
      padding: Of convolutions and max pooling that have a stride: ``"symmetric"`` pads as many
        pixels on each side, as PyTorch does; ``"same"`` as TensorFlow, Flax and Haiku do with
        ``'SAME'``: just enough for ``ceil(size / stride)`` outputs, the larger half at the end. At
        stride 1 the two are equal.
      norm: Every norm of the network: ``"batch"``; ``"group"`` (Wu & He 2018, arXiv:1803.08494);
        or ``"frozen"``, a batch norm whose parameters and statistics are never trained, as
        torchvision's FrozenBatchNorm2d.
      norm_groups: Channel groups of each group norm.
      standardized: Whether each kernel is standardised before it is used, to mean 0 and variance 1
        for each output channel (Qiao et al. 2019, arXiv:1903.10520); not those of attention.
      standardized_eps: Added to that variance.
      last_activation: Whether a block of ``"post_activation"`` ends with its activation.
      branch_activation: Whether the main path of ``"post_activation"`` ends with an activation of
        its own, before the addition.
      dropout: Probability of dropping a value in front of the second convolution of a block, in
        training (wide ResNets, Zagoruyko & Komodakis 2016, arXiv:1605.07146).
    """

    groups: int = 1
    base_width: int = 64
    shortcut: Shortcut = "projection"
    stride_on: StridePlacement = "3x3"
    attention: Attention = "none"
    attention_place: AttentionPlace = "branch"
    attention_ratio: float = 1 / 16
    attention_multiple: int = 8
    attention_bias: bool = True
    antialias: Antialias = "none"
    activation: Activation = "relu"
    conv_bias: bool = False
    shortcut_bias: bool = False
    padding: PaddingRule = "symmetric"
    order: Order = "post_activation"
    shortcut_from: ShortcutSource = "activated"
    shortcut_size: ShortcutSize = 1
    norm: Norm = "batch"
    norm_groups: int = 32
    standardized: bool = False
    standardized_eps: float = 1e-8
    last_activation: bool = True
    branch_activation: bool = False
    dropout: float = 0.0

    @property
    def norm_first(self) -> bool:
        """Whether norm and activation come before each convolution."""
        return self.order == "pre_activation"

    @property
    def layer_numbers(self) -> dict[str, Any]:
        """What :func:`flax_resblock.config.slots.normalised_conv` takes for every layer."""
        eps = self.standardized_eps if self.standardized else None
        numbers = {"norm": self.norm, "norm_groups": self.norm_groups, "standardized": eps}
        return numbers | {"padding_rule": self.padding}

    def check(self) -> None:
        """Sets options without effect to their defaults, so that equal networks are equal; raises
        ValueError for values that an option does not have."""
        check_choices(self)
        unused = {
            "shortcut_from": not self.norm_first or self.shortcut == "none",
            "last_activation": self.norm_first,
            "branch_activation": self.norm_first,
            "norm_groups": self.norm != "group",
            "standardized_eps": not self.standardized,
            "attention_place": self.attention == "none" or self.shortcut == "none",
            "attention_ratio": self.attention != "se",
            "attention_multiple": self.attention != "se",
            "attention_bias": self.attention != "se",
        }
        for name, is_unused in unused.items():
            if is_unused:
                object.__setattr__(self, name, BlockOptions.__dataclass_fields__[name].default)
        if self.attention_place == "output" and (self.norm_first or not self.last_activation):
            object.__setattr__(self, "attention_place", "sum")
        check_positive(self, "groups", "base_width", "norm_groups", "attention_multiple")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be at least 0 and below 1.")
        if not self.standardized_eps >= 0:
            raise ValueError(f"standardized_eps={self.standardized_eps!r} must not be negative.")
        if self.shortcut_size > 1 and self.shortcut != "projection":
            raise ValueError(f"shortcut={self.shortcut!r} has no kernel of 3x3 pixels.")

    @property
    def shared_options(self) -> dict[str, Any]:
        """The fields of :class:`BlockOptions` alone."""
        return {name: getattr(self, name) for name in BlockOptions.__dataclass_fields__}
