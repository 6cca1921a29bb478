"""Shortcuts, channel attention and blurred pooling of residual blocks and stems."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StdConv2d(nn.Conv2d):
    """A convolution whose kernel is standardised, Qiao et al. 2019."""

    eps = 1e-8

    def forward(self, input: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), unbiased=False, keepdim=True)
        kernel = (self.weight - mean) / torch.sqrt(var + self.eps)
        return self._conv_forward(input, kernel, self.bias)


class FrozenBatchNorm2d(nn.Module):
    """A batch norm that is never trained; nothing in it is a parameter."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, start in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        mean, var, scale, bias = (
            one[:, None, None]
            for one in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) / torch.sqrt(var + self.eps) * scale + bias


@dataclass(frozen=True)
class Kind:
    """What every norm and every convolution of a network is.

    Attributes:
      norm: ``"batch"``, ``"group"`` or ``"frozen"``.
      norm_groups: Of group norms.
      standardized: Whether kernels are standardised.
      standardized_eps: Added to their variance.
    """

    norm: str = "batch"
    norm_groups: int = 32
    standardized: bool = False
    standardized_eps: float = 1e-8

    def make_norm(self, channels: int) -> nn.Module:
        """A norm."""
        if self.norm == "group":
            return nn.GroupNorm(self.norm_groups, channels)
        return FrozenBatchNorm2d(channels) if self.norm == "frozen" else nn.BatchNorm2d(channels)

    def make_conv(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> nn.Conv2d:
        """A convolution padded so that stride 1 keeps the resolution, without bias by default."""
        sizes = in_channels, out_channels, size, stride, dilation * (size // 2), dilation
        if not self.standardized:
            return nn.Conv2d(*sizes, groups, bias)
        made = StdConv2d(*sizes, groups, bias)
        made.eps = self.standardized_eps
        return made


def activation_layer(name: str) -> nn.Module:
    """PyTorch's own layer, with its defaults."""
    layers = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "gelu": nn.GELU, "silu": nn.SiLU}
    return layers[name]()


class ZeroPad(nn.Module):
    """Option-A shortcut of He et al. 2016: a strided slice, new channels zero, half in front or all
    behind."""

    def __init__(self, extra_channels: int, stride: int, behind: bool = False) -> None:
        super().__init__()
        self.extra_channels = extra_channels
        self.stride = stride
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        front = 0 if self.behind else self.extra_channels // 2
        sides = (0, 0, 0, 0, front, self.extra_channels - front)
        return F.pad(x[:, :, :: self.stride, :: self.stride], sides)


def downsample(
    in_channels: int,
    out_channels: int,
    stride: int,
    shortcut: str,
    bias: bool = False,
    *,
    size: int = 1,
    normalised: bool = True,
    kind: Kind,
) -> nn.Module | None:
    """The shortcut of a block; None where it copies its input or adds nothing."""
    if shortcut == "none" or (stride == 1 and in_channels == out_channels):
        return None
    if shortcut.startswith("zero_pad"):
        return ZeroPad(out_channels - in_channels, stride, shortcut == "zero_pad_behind")
    norms = [kind.make_norm(out_channels)] if normalised else []
    if shortcut == "pooled":
        pool = nn.Identity()
        if stride > 1:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        conv = kind.make_conv(in_channels, out_channels, 1, bias=bias)
        return nn.Sequential(pool, conv, *norms)
    conv = kind.make_conv(in_channels, out_channels, size, stride, bias=bias)
    return nn.Sequential(conv, *norms)


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018: two 1x1 convolutions of the channels' means weigh each channel."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        squeezed = max(8, int(channels * ratio + 4) // 8 * 8)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(means))))


class EfficientChannelAttention(nn.Module):
    """Wang et al. 2020: a convolution along the channels' means weighs each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        size = int(abs(math.log2(channels) + 1) / 2)
        window = max(size if size % 2 else size + 1, 3)
        self.conv = nn.Conv1d(1, 1, window, padding=window // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.sigmoid(self.conv(x.mean(dim=(2, 3))[:, None]))
        return x * weights[:, 0, :, None, None]


def channel_attention(kind: str, channels: int, ratio: float) -> nn.Module | None:
    """The attention of a block; None where it has none."""
    if kind == "se":
        return SqueezeExcitation(channels, ratio)
    return EfficientChannelAttention(channels) if kind == "eca" else None


class Blur(nn.Module):
    """Zhang 2019: the filter [1, 2, 1] / 4 in both directions, reflecting one pixel."""

    kernel: Tensor

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        row = torch.tensor([0.25, 0.5, 0.25])
        kernel = (row[:, None] * row).expand(channels, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
        return F.conv2d(padded, self.kernel, stride=self.stride, groups=x.shape[1])
