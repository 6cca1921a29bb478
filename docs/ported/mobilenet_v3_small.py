"""mobilenet_v3_small in Flax, with channels last. Written by flax-resblock port."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

from flax_resblock import nn


class Conv2dNormActivation(nn.Sequential):
    """``Conv2dNormActivation`` of ``torchvision.ops.misc``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        padding: int,
        stride: int = 1,
        activation: Callable[[jax.Array], jax.Array] = nn.hardswish,
        groups: int = 1,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        super().__init__(
            nn.Conv(
                in_channels,
                out_channels,
                kernel_size,
                stride=stride,
                padding=padding,
                groups=groups,
                rngs=rngs,
            ),
            nn.BatchNorm(out_channels, eps=0.001, momentum=0.01, rngs=rngs),
            activation,
        )


class Conv2dNormActivation2(nn.Sequential):
    """``Conv2dNormActivation`` of ``torchvision.ops.misc``."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            nn.Conv(in_channels, out_channels, 1, rngs=rngs),
            nn.BatchNorm(out_channels, eps=0.001, momentum=0.01, rngs=rngs),
        )


class SqueezeExcitation(nnx.Module):
    """``SqueezeExcitation`` of ``torchvision.ops.misc``."""

    def __init__(self, channels: int, fc1_channels: int, *, rngs: nnx.Rngs) -> None:
        self.fc1 = nn.Conv(channels, fc1_channels, 1, use_bias=True, rngs=rngs)
        self.fc2 = nn.Conv(fc1_channels, channels, 1, use_bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H, W, channels)``."""
        hardsigmoid = nn.hardsigmoid(self.fc2(nn.relu(self.fc1(nn.adaptive_avg_pool(x, 1)))))
        return hardsigmoid * x


class InvertedResidual(nnx.Module):
    """``InvertedResidual`` of ``torchvision.models.mobilenetv3``."""

    def __init__(
        self, channels: int, block_1_channels: int, fc1_channels: int, *, rngs: nnx.Rngs
    ) -> None:
        self.block = nn.Sequential(
            Conv2dNormActivation(channels, block_1_channels, 1, 0, rngs=rngs),
            Conv2dNormActivation(
                block_1_channels, block_1_channels, 5, 2, groups=block_1_channels, rngs=rngs
            ),
            SqueezeExcitation(block_1_channels, fc1_channels, rngs=rngs),
            Conv2dNormActivation2(block_1_channels, channels, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H, W, channels)``."""
        return self.block(x) + x


class InvertedResidual2(nnx.Module):
    """``InvertedResidual`` of ``torchvision.models.mobilenetv3``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        block_1_channels: int,
        fc1_channels: int,
        stride: int = 2,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.block = nn.Sequential(
            Conv2dNormActivation(in_channels, block_1_channels, 1, 0, rngs=rngs),
            Conv2dNormActivation(
                block_1_channels,
                block_1_channels,
                5,
                2,
                stride=stride,
                groups=block_1_channels,
                rngs=rngs,
            ),
            SqueezeExcitation(block_1_channels, fc1_channels, rngs=rngs),
            Conv2dNormActivation2(block_1_channels, out_channels, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        return self.block(x)


class InvertedResidual3(nnx.Module):
    """``InvertedResidual`` of ``torchvision.models.mobilenetv3``."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.block = nn.Sequential(
            Conv2dNormActivation(16, 16, 3, 1, stride=2, activation=nn.relu, groups=16, rngs=rngs),
            SqueezeExcitation(16, 8, rngs=rngs),
            Conv2dNormActivation2(16, 16, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, 16)`` to ``(N, H', W', 16)``."""
        return self.block(x)


class InvertedResidual4(nnx.Module):
    """``InvertedResidual`` of ``torchvision.models.mobilenetv3``."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.block = nn.Sequential(
            Conv2dNormActivation(16, 72, 1, 0, activation=nn.relu, rngs=rngs),
            Conv2dNormActivation(72, 72, 3, 1, stride=2, activation=nn.relu, groups=72, rngs=rngs),
            Conv2dNormActivation2(72, 24, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, 16)`` to ``(N, H', W', 24)``."""
        return self.block(x)


class InvertedResidual5(nnx.Module):
    """``InvertedResidual`` of ``torchvision.models.mobilenetv3``."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.block = nn.Sequential(
            Conv2dNormActivation(24, 88, 1, 0, activation=nn.relu, rngs=rngs),
            Conv2dNormActivation(88, 88, 3, 1, activation=nn.relu, groups=88, rngs=rngs),
            Conv2dNormActivation2(88, 24, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, 24)`` to ``(N, H, W, 24)``."""
        return self.block(x) + x


class MobileNetV3(nnx.Module):
    """``MobileNetV3`` of ``torchvision.models.mobilenetv3``, with channels last."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.features = nn.Sequential(
            Conv2dNormActivation(3, 16, 3, 1, stride=2, rngs=rngs),
            InvertedResidual3(rngs=rngs),
            InvertedResidual4(rngs=rngs),
            InvertedResidual5(rngs=rngs),
            InvertedResidual2(24, 40, 96, 24, rngs=rngs),
            InvertedResidual(40, 240, 64, rngs=rngs),
            InvertedResidual(40, 240, 64, rngs=rngs),
            InvertedResidual2(40, 48, 120, 32, stride=1, rngs=rngs),
            InvertedResidual(48, 144, 40, rngs=rngs),
            InvertedResidual2(48, 96, 288, 72, rngs=rngs),
            InvertedResidual(96, 576, 144, rngs=rngs),
            InvertedResidual(96, 576, 144, rngs=rngs),
            Conv2dNormActivation(96, 576, 1, 0, rngs=rngs),
        )
        self.classifier = nn.Sequential(
            nn.Linear(576, 1024, rngs=rngs),
            nn.hardswish,
            nn.Dropout(0.2, rngs=rngs),
            nn.Linear(1024, 1000, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, 3)`` to ``(N, 1000)``."""
        x = nn.adaptive_avg_pool(self.features(x), 1)
        return self.classifier(x.reshape(x.shape[0], -1))
