"""resnet18 in Flax, with channels last. Written by flax-resblock port."""

from __future__ import annotations

import jax
from flax import nnx

from flax_resblock import nn


class BasicBlock(nnx.Module):
    """``BasicBlock`` of ``torchvision.models.resnet``."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, *, rngs: nnx.Rngs
    ) -> None:
        self.conv1 = nn.Conv(in_channels, out_channels, 3, stride=stride, padding=1, rngs=rngs)
        self.bn1 = nn.BatchNorm(out_channels, rngs=rngs)
        self.conv2 = nn.Conv(out_channels, out_channels, 3, padding=1, rngs=rngs)
        self.bn2 = nn.BatchNorm(out_channels, rngs=rngs)
        self.downsample = (
            nn.Sequential(
                nn.Conv(in_channels, out_channels, 1, stride=stride, rngs=rngs),
                nn.BatchNorm(out_channels, rngs=rngs),
            )
            if stride != 1
            else nn.identity
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', out_channels)``."""
        bn2 = self.bn2(self.conv2(nn.relu(self.bn1(self.conv1(x)))))
        return nn.relu(bn2 + self.downsample(x))


class ResNet(nnx.Module):
    """``ResNet`` of ``torchvision.models.resnet``, with channels last."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nn.Conv(3, 64, 7, stride=2, padding=3, rngs=rngs)
        self.bn1 = nn.BatchNorm(64, rngs=rngs)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, rngs=rngs), BasicBlock(64, 64, rngs=rngs))
        self.layer2 = nn.Sequential(
            BasicBlock(64, 128, stride=2, rngs=rngs), BasicBlock(128, 128, rngs=rngs)
        )
        self.layer3 = nn.Sequential(
            BasicBlock(128, 256, stride=2, rngs=rngs), BasicBlock(256, 256, rngs=rngs)
        )
        self.layer4 = nn.Sequential(
            BasicBlock(256, 512, stride=2, rngs=rngs), BasicBlock(512, 512, rngs=rngs)
        )
        self.fc = nn.Linear(512, 1000, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, 3)`` to ``(N, 1000)``."""
        x = nn.max_pool(nn.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        x = nn.adaptive_avg_pool(self.layer4(self.layer3(self.layer2(self.layer1(x)))), 1)
        return self.fc(x.reshape(x.shape[0], -1))
