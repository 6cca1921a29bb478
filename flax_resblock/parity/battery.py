"""Networks and blocks that together use everything this library has: what a new device, or a new
version of a framework, is tried on.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from flax_resblock.config import BlockConfig, Config, ResNetConfig

BATTERY: Mapping[str, Config] = MappingProxyType(
    {
        "basic block": BlockConfig(in_channels=16, out_channels=16),
        "basic block, stride 2": BlockConfig(in_channels=8, out_channels=16, stride=2),
        "basic block, dilated and grouped": BlockConfig(
            in_channels=8, out_channels=16, stride=2, dilation=2, groups=2
        ),
        "option A block": BlockConfig(
            in_channels=5, out_channels=10, stride=2, shortcut="zero_pad"
        ),
        "bottleneck": BlockConfig(in_channels=32, out_channels=32, kind="bottleneck"),
        "bottleneck, stride on 3x3": BlockConfig(
            in_channels=16, out_channels=32, kind="bottleneck", stride=2
        ),
        "bottleneck, stride on 1x1": BlockConfig(
            in_channels=16, out_channels=32, kind="bottleneck", stride=2, stride_on="1x1"
        ),
        "CIFAR network": ResNetConfig(
            depths=(1, 1, 1),
            widths=(16, 32, 64),
            stem="cifar",
            stem_width=16,
            shortcut="zero_pad",
            num_classes=10,
        ),
        "ImageNet network": ResNetConfig(
            depths=(1, 1, 1, 1), widths=(16, 32, 64, 128), stem_width=16, num_classes=10
        ),
        "ResNeXt": ResNetConfig(
            block="bottleneck",
            depths=(1, 1),
            widths=(16, 32),
            stem_width=16,
            groups=8,
            base_width=16,
            num_classes=10,
        ),
        "dilated network": ResNetConfig(
            block="bottleneck",
            depths=(1, 2, 2),
            widths=(8, 16, 16),
            stem_width=16,
            dilated_stages=(2, 3),
            num_classes=None,
        ),
    }
)
