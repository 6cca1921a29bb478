"""Residual networks in plain PyTorch, with torchvision's attribute names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from torch_ref.blocks import BasicBlock, Bottleneck
from torch_ref.layers import Blur, Kind, SameMaxPool2d, activation_layer


def _stem_convolutions(
    stem: str,
    in_channels: int,
    hidden: Sequence[int],
    width: int,
    activation: str,
    stride: int,
    bias: bool,
    kind: Kind,
) -> nn.Module:
    conv = kind.make_conv
    if stem != "deep":
        return conv(in_channels, width, 7 if stem == "imagenet" else 3, stride, bias=bias)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip((in_channels, *hidden), hidden, strict=False)):
        layers.append(conv(inputs, outputs, 3, 1 if index else stride, bias=bias))
        layers += [kind.make_norm(outputs), activation_layer(activation)]
    return nn.Sequential(*layers, conv(hidden[-1], width, 3, bias=bias))


def _stem_pooling(pool: str, blurs: bool, channels: int, padding: str) -> nn.Module:
    if pool == "none":
        return nn.Identity()
    if padding == "same":
        return SameMaxPool2d(2 if pool == "2x2" else 3, 2)
    if pool == "2x2":
        return nn.MaxPool2d(2)
    if pool == "3x3_zeros":
        return nn.MaxPool2d(3, stride=2)
    if blurs:
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), Blur(channels, 2))
    return nn.MaxPool2d(3, stride=2, padding=1)


_USUAL = "post_activation"


class ResNet(nn.Module):
    """Stem, ``layer1`` to ``layerN``, global average pooling, ``fc``.

    Args:
      block: ``"basic"`` or ``"bottleneck"``.
      depths, widths: Blocks and planes per stage.
      stem: ``"imagenet"`` (7x7 stride 2, max pooling), ``"deep"`` (three 3x3, max pooling) or
        ``"cifar"`` (3x3).
      stem_width: Channels of the stem.
      stem_hidden: Channels of a deep stem's first two convolutions.
      stem_stride: Of the stem's first convolution; None: 1 of ``"cifar"``, else 2.
      stem_pool: ``"3x3"``, ``"3x3_zeros"`` (behind a border of zeros), ``"2x2"`` or ``"none"``;
        None: none of ``"cifar"``, else 3x3.
      padding: ``"symmetric"``, or ``"same"``: strided convolutions and pooling pad as TensorFlow
        and Flax do with ``'SAME'``.
      stem_padding: The same of the stem's convolutions; None: as ``padding``.
      stem_bias: Whether the stem's convolutions have a bias.
      stem_norm: Whether the stem ends with a norm and an activation in pre-activation order too.
      first_stride: Stride of the first stage.
      shortcut, stride_on, groups, base_width, attention, attention_place, attention_ratio,
        attention_multiple, attention_bias, antialias, conv_bias, shortcut_bias, shortcut_from,
        shortcut_size, last_activation, branch_activation, dropout: Of every block.
      order: ``"post_activation"`` or ``"pre_activation"`` (He et al. 2016b).
      final_norm: Whether a norm and an activation follow the last stage in pre-activation order.
      norm, norm_groups, standardized, standardized_eps: See :class:`Kind`.
      head_pool: ``"mean"`` or ``"max"``.
      transition: ``"strided"``, or ``"pooled"``: a stage begins with a convolution, norm,
        activation and max pooling instead of a block with a stride.
      activation: Of the stem and of every block.
      dilated_stages: Stages (from 1) whose stride is replaced by dilation.
      in_channels, num_classes: Channels of the images, size of the logits (None: no head).
      zero_init_residual: Start the last norm of every block at zero.
    """

    def __init__(
        self,
        *,
        block: str = "basic",
        depths: Sequence[int] = (2, 2, 2, 2),
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: str = "imagenet",
        stem_width: int = 64,
        stem_hidden: Sequence[int] = (),
        stem_stride: int | None = None,
        stem_pool: str | None = None,
        stem_padding: str | None = None,
        stem_bias: bool = False,
        stem_norm: bool = False,
        first_stride: int = 1,
        shortcut: str = "projection",
        stride_on: str = "3x3",
        attention: str = "none",
        attention_place: str = "branch",
        attention_ratio: float = 1 / 16,
        attention_multiple: int = 8,
        attention_bias: bool = True,
        antialias: str = "none",
        activation: str = "relu",
        conv_bias: bool = False,
        shortcut_bias: bool = False,
        padding: str = "symmetric",
        groups: int = 1,
        base_width: int = 64,
        order: str = "post_activation",
        shortcut_from: str = "activated",
        shortcut_size: int = 1,
        norm: str = "batch",
        norm_groups: int = 32,
        standardized: bool = False,
        standardized_eps: float = 1e-8,
        last_activation: bool = True,
        branch_activation: bool = False,
        dropout: float = 0.0,
        final_norm: bool = True,
        head_pool: str = "mean",
        transition: str = "strided",
        dilated_stages: Sequence[int] = (),
        in_channels: int = 3,
        num_classes: int | None = 1000,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        stem_stride = stem_stride or (1 if stem == "cifar" else 2)
        stem_pool = stem_pool or ("none" if stem == "cifar" else "3x3")
        kind = Kind(norm, norm_groups, standardized, standardized_eps, padding)
        of_stem, preact = kind._replace(padding=stem_padding or padding), order != _USUAL
        sizes = in_channels, stem_hidden, stem_width
        self.conv1 = _stem_convolutions(stem, *sizes, activation, stem_stride, stem_bias, of_stem)
        self.bn1 = None if preact and not stem_norm else kind.make_norm(stem_width)
        self.act = activation_layer(activation)
        bordered = stem_pool == "3x3_zeros"
        self.border = nn.ConstantPad2d(1, 0.0) if bordered else nn.Identity()
        self.maxpool = _stem_pooling(stem_pool, antialias == "blur", stem_width, padding)

        options: dict[str, Any] = {"stride_on": stride_on} if block == "bottleneck" else {}
        make_block = BasicBlock if block == "basic" else Bottleneck
        channels, dilation = stem_width, 1
        self.stages: list[nn.Module] = []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stride, previous_dilation = (first_stride if number == 1 else 2), dilation
            if number in dilated_stages:
                dilation, stride = dilation * stride, 1
            if transition == "pooled":
                outputs = width * make_block.expansion
                conv = kind.make_conv(channels, outputs, 3, bias=conv_bias)
                pool = _stem_pooling("2x2" if stride > 1 else "none", False, outputs, padding)
                layers = conv, kind.make_norm(outputs), activation_layer(activation), pool
                before = nn.Sequential(*layers)
                self.add_module(f"transition{number}", before)
                self.stages.append(before)
                channels, stride = outputs, 1
            blocks = []
            for index in range(depth):
                blocks.append(
                    make_block(
                        channels,
                        width,
                        stride if index == 0 else 1,
                        dilation=previous_dilation if index == 0 else dilation,
                        groups=groups,
                        base_width=base_width,
                        shortcut=shortcut,
                        attention=attention,
                        attention_place=attention_place,
                        attention_ratio=attention_ratio,
                        attention_multiple=attention_multiple,
                        attention_bias=attention_bias,
                        antialias=antialias,
                        activation=activation,
                        conv_bias=conv_bias,
                        shortcut_bias=shortcut_bias,
                        padding=padding,
                        order=order,
                        shortcut_from=shortcut_from,
                        shortcut_size=shortcut_size,
                        norm=norm,
                        norm_groups=norm_groups,
                        standardized=standardized,
                        standardized_eps=standardized_eps,
                        last_activation=last_activation,
                        branch_activation=branch_activation,
                        dropout=dropout,
                        **options,
                    )
                )
                channels = width * make_block.expansion
            stage = nn.Sequential(*blocks)
            self.add_module(f"layer{number}", stage)
            self.stages.append(stage)
        self.bn = kind.make_norm(channels) if preact and final_norm else None
        self.fc = nn.Linear(channels, num_classes) if num_classes is not None else nn.Identity()
        self.head_pool = head_pool

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        made = [one for one in self.modules() if isinstance(one, BasicBlock | Bottleneck)]
        for one in made if zero_init_residual else ():
            number = 2 if isinstance(one, BasicBlock) else 3
            last = one.get_submodule(f"conv{number}" if preact else f"bn{number}")
            nn.init.zeros_(last.get_parameter("weight"))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.conv1(images)
        x = self.maxpool(self.border(x if self.bn1 is None else self.act(self.bn1(x))))
        for stage in self.stages:
            x = stage(x)
        x = x if self.bn is None else self.act(self.bn(x))
        return self.fc(x.amax(dim=(2, 3)) if self.head_pool == "max" else x.mean(dim=(2, 3)))
