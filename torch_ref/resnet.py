"""Residual networks in plain PyTorch, with torchvision's attribute names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from torch_ref.layers import (
    Blur,
    SameMaxPool2d,
    activation_layer,
    channel_attention,
    conv,
    downsample,
)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the first carries the stride."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        base_width: int = 64,
        shortcut: str = "projection",
        attention: str = "none",
        attention_ratio: float = 1 / 16,
        antialias: str = "none",
        activation: str = "relu",
        conv_bias: bool = False,
        shortcut_bias: bool = False,
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        blurs = antialias == "blur" and stride == 2
        strided = 1 if blurs else stride
        self.conv1 = conv(in_channels, planes, 3, strided, dilation, groups, conv_bias, padding)
        self.bn1 = nn.BatchNorm2d(planes)
        self.aa = Blur(planes, stride) if blurs else None
        self.conv2 = conv(planes, planes, 3, 1, dilation, groups, conv_bias)
        self.bn2 = nn.BatchNorm2d(planes)
        self.se = channel_attention(attention, planes, attention_ratio)
        self.act = activation_layer(activation)
        self.downsample = downsample(in_channels, planes, stride, shortcut, shortcut_bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = out if self.aa is None else self.aa(out)
        out = self.bn2(self.conv2(out))
        out = out if self.se is None else self.se(out)
        return self.act(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; the stride sits on the 3x3 (torchvision) or on the first 1x1 (Caffe)."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        base_width: int = 64,
        shortcut: str = "projection",
        stride_on: str = "3x3",
        attention: str = "none",
        attention_ratio: float = 1 / 16,
        antialias: str = "none",
        activation: str = "relu",
        conv_bias: bool = False,
        shortcut_bias: bool = False,
        padding: str = "symmetric",
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        blurs = antialias == "blur" and stride == 2
        first, second = (stride, 1) if stride_on == "1x1" else (1, 1 if blurs else stride)
        self.conv1 = conv(in_channels, width, 1, first, bias=conv_bias)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, second, dilation, groups, conv_bias, padding)
        self.bn2 = nn.BatchNorm2d(width)
        self.aa = Blur(width, stride) if blurs else None
        self.conv3 = conv(width, planes * self.expansion, 1, bias=conv_bias)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.se = channel_attention(attention, planes * self.expansion, attention_ratio)
        self.act = activation_layer(activation)
        outputs = planes * self.expansion
        self.downsample = downsample(in_channels, outputs, stride, shortcut, shortcut_bias)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = out if self.aa is None else self.aa(out)
        out = self.bn3(self.conv3(out))
        out = out if self.se is None else self.se(out)
        return self.act(out + (x if self.downsample is None else self.downsample(x)))


def _stem_convolutions(
    stem: str,
    in_channels: int,
    hidden: Sequence[int],
    width: int,
    activation: str,
    stride: int,
    bias: bool,
    padding: str,
) -> nn.Module:
    options = {"bias": bias, "padding_rule": padding}
    if stem != "deep":
        return conv(in_channels, width, 7 if stem == "imagenet" else 3, stride, **options)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(zip((in_channels, *hidden), hidden, strict=False)):
        layers.append(conv(inputs, outputs, 3, 1 if index else stride, **options))
        layers += [nn.BatchNorm2d(outputs), activation_layer(activation)]
    return nn.Sequential(*layers, conv(hidden[-1], width, 3, bias=bias))


def _stem_pooling(pool: str, blurs: bool, channels: int, padding: str) -> nn.Module:
    if pool == "none":
        return nn.Identity()
    if padding == "same":
        return SameMaxPool2d(2 if pool == "2x2" else 3, 2)
    if pool == "2x2":
        return nn.MaxPool2d(2)
    if blurs:
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), Blur(channels, 2))
    return nn.MaxPool2d(3, stride=2, padding=1)


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
      stem_pool: ``"3x3"``, ``"2x2"`` or ``"none"``; None: none of ``"cifar"``, else 3x3.
      padding: ``"symmetric"``, or ``"same"``: strided convolutions and pooling pad as TensorFlow
        and Flax do with ``'SAME'``.
      stem_padding: The same of the stem's convolutions; None: as ``padding``.
      stem_bias: Whether the stem's convolutions have a bias.
      first_stride: Stride of the first stage.
      shortcut, stride_on, groups, base_width, attention, attention_ratio, antialias, conv_bias,
        shortcut_bias: Of every block.
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
        first_stride: int = 1,
        shortcut: str = "projection",
        stride_on: str = "3x3",
        attention: str = "none",
        attention_ratio: float = 1 / 16,
        antialias: str = "none",
        activation: str = "relu",
        conv_bias: bool = False,
        shortcut_bias: bool = False,
        padding: str = "symmetric",
        groups: int = 1,
        base_width: int = 64,
        dilated_stages: Sequence[int] = (),
        in_channels: int = 3,
        num_classes: int | None = 1000,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        stem_stride = stem_stride or (1 if stem == "cifar" else 2)
        stem_pool = stem_pool or ("none" if stem == "cifar" else "3x3")
        sizes = in_channels, stem_hidden, stem_width
        stem_padding = stem_padding or padding
        options = activation, stem_stride, stem_bias, stem_padding
        self.conv1 = _stem_convolutions(stem, *sizes, *options)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.act = activation_layer(activation)
        self.maxpool = _stem_pooling(stem_pool, antialias == "blur", stem_width, padding)

        make_block = BasicBlock if block == "basic" else partial(Bottleneck, stride_on=stride_on)
        expansion = BasicBlock.expansion if block == "basic" else Bottleneck.expansion
        channels, dilation = stem_width, 1
        self.stages: list[nn.Sequential] = []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stride, previous_dilation = (first_stride if number == 1 else 2), dilation
            if number in dilated_stages:
                dilation, stride = dilation * stride, 1
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
                        attention_ratio=attention_ratio,
                        antialias=antialias,
                        activation=activation,
                        conv_bias=conv_bias,
                        shortcut_bias=shortcut_bias,
                        padding=padding,
                    )
                )
                channels = width * expansion
            stage = nn.Sequential(*blocks)
            self.add_module(f"layer{number}", stage)
            self.stages.append(stage)
        self.fc = nn.Linear(channels, num_classes) if num_classes is not None else nn.Identity()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif zero_init_residual and isinstance(module, BasicBlock):
                nn.init.zeros_(module.bn2.weight)
            elif zero_init_residual and isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(N, in_channels, H, W)`` to logits ``(N, num_classes)``."""
        x = self.maxpool(self.act(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))
