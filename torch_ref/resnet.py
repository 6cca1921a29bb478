"""Residual networks in plain PyTorch, with torchvision's attribute names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(in_channels: int, out_channels: int, size: int, stride: int = 1, dilation: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = dilation * (size // 2)
    return nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=padding, dilation=dilation, groups=groups, bias=False)


class ZeroPad(nn.Module):
    """Option-A shortcut of He et al. 2016: a strided slice, new channels zero, half of them in front."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        front = self.extra_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, front, self.extra_channels - front))


def _downsample(in_channels: int, out_channels: int, stride: int, shortcut: str) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    if shortcut == "zero_pad":
        return ZeroPad(out_channels - in_channels, stride)
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


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
    ) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, planes, 3, stride, dilation, groups)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = _conv(planes, planes, 3, 1, dilation, groups)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _downsample(in_channels, planes, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


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
    ) -> None:
        super().__init__()
        width = int(planes * (base_width / 64.0)) * groups
        first, second = (stride, 1) if stride_on == "1x1" else (1, stride)
        self.conv1 = _conv(in_channels, width, 1, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, second, dilation, groups)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, planes * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = _downsample(in_channels, planes * self.expansion, stride, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        out = torch.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """Stem, ``layer1`` to ``layerN``, global average pooling, ``fc``.

    Args:
      block: ``"basic"`` or ``"bottleneck"``.
      depths, widths: Blocks and planes per stage.
      stem: ``"imagenet"`` (7x7 stride 2, max pooling) or ``"cifar"`` (3x3).
      stem_width: Channels of the stem.
      shortcut, stride_on, groups, base_width: Of every block.
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
        shortcut: str = "projection",
        stride_on: str = "3x3",
        groups: int = 1,
        base_width: int = 64,
        dilated_stages: Sequence[int] = (),
        in_channels: int = 3,
        num_classes: int | None = 1000,
        zero_init_residual: bool = False,
    ) -> None:
        super().__init__()
        imagenet = stem == "imagenet"
        self.conv1 = _conv(in_channels, stem_width, 7, 2) if imagenet else _conv(in_channels, stem_width, 3)
        self.bn1 = nn.BatchNorm2d(stem_width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if imagenet else nn.Identity()

        make_block = BasicBlock if block == "basic" else partial(Bottleneck, stride_on=stride_on)
        expansion = BasicBlock.expansion if block == "basic" else Bottleneck.expansion
        channels, dilation = stem_width, 1
        self.stages: list[nn.Sequential] = []
        for number, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stride, previous_dilation = (1 if number == 1 else 2), dilation
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
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))
