"""Residual blocks in plain PyTorch, with torchvision's attribute names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torch_ref.layers import Blur, Kind, activation_layer, channel_attention, downsample


class _Residual(nn.Module):
    """What both kinds of block have around their convolutions."""

    expansion = 1
    bn1: nn.Module

    def _surround(
        self,
        in_channels: int,
        planes: int,
        stride: int,
        kind: Kind,
        *,
        shortcut: str = "projection",
        attention: str = "none",
        attention_place: str = "branch",
        attention_ratio: float = 1 / 16,
        attention_multiple: int = 8,
        attention_bias: bool = True,
        activation: str = "relu",
        shortcut_bias: bool = False,
        shortcut_from: str = "activated",
        shortcut_size: int = 1,
        order: str = "post_activation",
        last_activation: bool = True,
        branch_activation: bool = False,
        dropout: float = 0.0,
    ) -> None:
        outputs, preact = planes * self.expansion, order == "pre_activation"
        self.preact, self.adds = preact, shortcut != "none"
        self.shortcut_from, self.place = shortcut_from, attention_place
        squeeze = attention_ratio, attention_multiple, attention_bias
        self.se = channel_attention(attention, outputs, *squeeze)
        self.act = activation_layer(activation)
        self.is_last = last_activation and not preact
        self.ends_branch = branch_activation and not preact
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = {"size": shortcut_size, "normalised": not preact, "kind": kind}
        sizes = in_channels, outputs, stride
        self.downsample = downsample(*sizes, shortcut, shortcut_bias, **options)

    def _main(self, x: Tensor) -> Tensor:
        """The main path up to attention; in pre-activation order without its first norm."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        skipped = x
        if self.preact:
            activated = self.act(self.bn1(x))
            if self.downsample is not None and self.shortcut_from == "activated":
                skipped = activated
            out = self._main(activated)
        else:
            out = self._main(x)
        out = self.act(out) if self.ends_branch else out
        out = self._weighed(out, "branch")
        if self.adds:
            out = out + (skipped if self.downsample is None else self.downsample(skipped))
        out = self._weighed(out, "sum")
        return self._weighed(self.act(out) if self.is_last else out, "output")

    def _weighed(self, x: Tensor, place: str) -> Tensor:
        """What attention makes of the values at a place; the values where it has another place."""
        return x if self.se is None or self.place != place else self.se(x)


class BasicBlock(_Residual):
    """Two 3x3 convolutions; the first carries the stride."""

    def __init__(
        self,
        in_channels: int,
        planes: int,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        base_width: int = 64,
        antialias: str = "none",
        conv_bias: bool = False,
        norm: str = "batch",
        norm_groups: int = 32,
        standardized: bool = False,
        standardized_eps: float = 1e-8,
        padding: str = "symmetric",
        **options: Any,
    ) -> None:
        super().__init__()
        kind = Kind(norm, norm_groups, standardized, standardized_eps, padding)
        blurs = antialias == "blur" and stride == 2
        strided = 1 if blurs else stride
        conv = kind.make_conv(in_channels, planes, 3, strided, dilation, groups, conv_bias)
        if options.get("order") == "pre_activation":
            self.bn1 = kind.make_norm(in_channels)
            self.conv1 = conv
            self.bn2 = kind.make_norm(planes)
            self.aa = None
            self.conv2 = kind.make_conv(planes, planes, 3, 1, dilation, groups, conv_bias)
        else:
            self.conv1 = conv
            self.bn1 = kind.make_norm(planes)
            self.aa = Blur(planes, stride) if blurs else None
            self.conv2 = kind.make_conv(planes, planes, 3, 1, dilation, groups, conv_bias)
            self.bn2 = kind.make_norm(planes)
        self._surround(in_channels, planes, stride, kind, **options)

    def _main(self, x: Tensor) -> Tensor:
        if self.preact:
            return self.conv2(self.dropout(self.act(self.bn2(self.conv1(x)))))
        out = self.act(self.bn1(self.conv1(x)))
        out = self.dropout(out if self.aa is None else self.aa(out))
        return self.bn2(self.conv2(out))


class Bottleneck(_Residual):
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
        stride_on: str = "3x3",
        antialias: str = "none",
        conv_bias: bool = False,
        norm: str = "batch",
        norm_groups: int = 32,
        standardized: bool = False,
        standardized_eps: float = 1e-8,
        padding: str = "symmetric",
        **options: Any,
    ) -> None:
        super().__init__()
        kind = Kind(norm, norm_groups, standardized, standardized_eps, padding)
        width, outputs = int(planes * (base_width / 64.0)) * groups, planes * self.expansion
        blurs = antialias == "blur" and stride == 2
        first, second = (stride, 1) if stride_on == "1x1" else (1, 1 if blurs else stride)
        numbers = second, dilation, groups, conv_bias
        if options.get("order") == "pre_activation":
            self.bn1 = kind.make_norm(in_channels)
            self.conv1 = kind.make_conv(in_channels, width, 1, first, bias=conv_bias)
            self.bn2 = kind.make_norm(width)
            self.conv2 = kind.make_conv(width, width, 3, *numbers)
            self.bn3 = kind.make_norm(width)
            self.aa = None
            self.conv3 = kind.make_conv(width, outputs, 1, bias=conv_bias)
        else:
            self.conv1 = kind.make_conv(in_channels, width, 1, first, bias=conv_bias)
            self.bn1 = kind.make_norm(width)
            self.conv2 = kind.make_conv(width, width, 3, *numbers)
            self.bn2 = kind.make_norm(width)
            self.aa = Blur(width, stride) if blurs else None
            self.conv3 = kind.make_conv(width, outputs, 1, bias=conv_bias)
            self.bn3 = kind.make_norm(outputs)
        self._surround(in_channels, planes, stride, kind, **options)

    def _main(self, x: Tensor) -> Tensor:
        if self.preact:
            out = self.dropout(self.act(self.bn2(self.conv1(x))))
            return self.conv3(self.act(self.bn3(self.conv2(out))))
        out = self.dropout(self.act(self.bn1(self.conv1(x))))
        out = self.act(self.bn2(self.conv2(out)))
        out = out if self.aa is None else self.aa(out)
        return self.bn3(self.conv3(out))
