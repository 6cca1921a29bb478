"""WRN-28-10 in Flax, with channels last. Written by flax-resblock port."""

from __future__ import annotations

import jax
from flax import nnx

from flax_resblock import nn


class WideBlock(nnx.Module):
    """``WideBlock`` of ``parity_tests.wide_resnet``."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.bn1 = nn.BatchNorm(channels, rngs=rngs)
        self.conv1 = nn.Conv(channels, channels, 3, padding=1, rngs=rngs)
        self.bn2 = nn.BatchNorm(channels, rngs=rngs)
        self.conv2 = nn.Conv(channels, channels, 3, padding=1, rngs=rngs)
        self.dropout = nn.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, channels)`` to ``(N, H, W, channels)``."""
        relu = nn.relu(self.bn2(self.conv1(nn.relu(self.bn1(x)))))
        return self.conv2(self.dropout(relu)) + x


class WideBlock2(nnx.Module):
    """``WideBlock`` of ``parity_tests.wide_resnet``."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 2, *, rngs: nnx.Rngs
    ) -> None:
        self.bn1 = nn.BatchNorm(in_channels, rngs=rngs)
        self.conv1 = nn.Conv(in_channels, out_channels, 3, padding=1, stride=stride, rngs=rngs)
        self.bn2 = nn.BatchNorm(out_channels, rngs=rngs)
        self.conv2 = nn.Conv(out_channels, out_channels, 3, padding=1, rngs=rngs)
        self.shortcut = nn.Conv(in_channels, out_channels, 1, stride=stride, rngs=rngs)
        self.dropout = nn.Dropout(0.3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        x = nn.relu(self.bn1(x))
        conv2 = self.conv2(self.dropout(nn.relu(self.bn2(self.conv1(x)))))
        return conv2 + self.shortcut(x)


class WideResNet(nnx.Module):
    """``WideResNet`` of ``parity_tests.wide_resnet``, with channels last."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nn.Conv(3, 16, 3, padding=1, rngs=rngs)
        self.stages = nnx.List(
            [
                nn.Sequential(
                    WideBlock2(16, 160, stride=1, rngs=rngs),
                    *[WideBlock(160, rngs=rngs) for _ in range(3)],
                ),
                nn.Sequential(
                    WideBlock2(160, 320, rngs=rngs), *[WideBlock(320, rngs=rngs) for _ in range(3)]
                ),
                nn.Sequential(
                    WideBlock2(320, 640, rngs=rngs), *[WideBlock(640, rngs=rngs) for _ in range(3)]
                ),
            ]
        )
        self.bn = nn.BatchNorm(640, rngs=rngs)
        self.fc = nn.Linear(640, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, 3)`` to ``(N, 10)``."""
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        x = nn.adaptive_avg_pool(nn.relu(self.bn(x)), 1)
        return self.fc(x.reshape(x.shape[0], -1))
