"""Shortcuts, channel attention and blurred pooling of residual blocks and stems."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def same_padding(x: Tensor, reach: int, stride: int) -> list[int]:
    """TensorFlow's and Flax's ``'SAME'`` as ``F.pad`` takes it: left, right, top, bottom.

    As many pixels as ``ceil(size / stride)`` windows that reach over ``reach`` pixels need; where
    their number is odd, the right and the bottom have one more."""
    sides: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((math.ceil(size / stride) - 1) * stride + reach - size, 0)
        sides += [total // 2, total - total // 2]
    return sides


class SameConv2d(nn.Conv2d):
    """A strided convolution that pads its input with ``'SAME'``."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.padding = "SAME"

    def kernel(self) -> Tensor:
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        reach = self.dilation[0] * (self.kernel_size[0] - 1) + 1
        x = F.pad(input, same_padding(input, reach, self.stride[0]))
        return F.conv2d(x, self.kernel(), self.bias, self.stride, 0, self.dilation, self.groups)


class SameMaxPool2d(nn.Module):
    """Max pooling that pads its input with ``'SAME'``, by minus infinity."""

    padding, dilation, ceil_mode = "SAME", 1, False

    def __init__(self, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: Tensor) -> Tensor:
        sides = same_padding(x, self.kernel_size, self.stride)
        x = F.pad(x, sides, value=-math.inf)
        return F.max_pool2d(x, self.kernel_size, self.stride)


class StdConv2d(nn.Conv2d):
    """A convolution whose kernel is standardised, Qiao et al. 2019."""

    eps = 1e-8

    def kernel(self) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), unbiased=False, keepdim=True)
        return (self.weight - mean) / torch.sqrt(var + self.eps)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.kernel(), self.bias)


class SameStdConv2d(SameConv2d):
    """Both of them."""

    eps = 1e-8
    kernel = StdConv2d.kernel  # pyright: ignore[reportAssignmentType]


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


class Kind(NamedTuple):
    """What every norm and every convolution of a network is.

    Attributes:
      norm: ``"batch"``, ``"group"`` or ``"frozen"``.
      norm_groups: Of group norms.
      standardized: Whether kernels are standardised.
      standardized_eps: Added to their variance.
      padding: Of strided convolutions: ``"symmetric"``, or ``"same"`` as TensorFlow and Flax pad
        with ``'SAME'``.
    """

    norm: str = "batch"
    norm_groups: int = 32
    standardized: bool = False
    standardized_eps: float = 1e-8
    padding: str = "symmetric"

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
        same = self.padding == "same" and size > 1 and stride > 1
        sides = 0 if same else dilation * (size // 2)
        sizes = in_channels, out_channels, size, stride, sides, dilation, groups, bias
        if not self.standardized:
            return SameConv2d(*sizes) if same else nn.Conv2d(*sizes)
        made = SameStdConv2d(*sizes) if same else StdConv2d(*sizes)
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

    def __init__(self, channels: int, ratio: float, multiple: int, bias: bool) -> None:
        super().__init__()
        squeezed = math.floor(channels * ratio / multiple + (0.5 if multiple > 1 else 0))
        squeezed = max(squeezed, 1) * multiple
        self.fc1 = nn.Conv2d(channels, squeezed, 1, bias=bias)
        self.fc2 = nn.Conv2d(squeezed, channels, 1, bias=bias)

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


def channel_attention(
    kind: str, channels: int, ratio: float, multiple: int, bias: bool
) -> nn.Module | None:
    """The attention of a block; None where it has none."""
    if kind == "se":
        return SqueezeExcitation(channels, ratio, multiple, bias)
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
