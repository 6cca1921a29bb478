"""Pre-activation and wide residual networks of CIFAR, in the names and conventions of well-known
repositories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class PreActivationBlock(nn.Module):
    """Norm, ReLU and convolution, twice, or three times in a bottleneck.

    Args:
      inside, out, stride: Channels of input and output, and the stride.
      from_input: Whether the shortcut's convolution sees the block's input as it is.
      bottleneck: Whether there are three convolutions.
      bias: Whether every convolution has one.
      shortcut: Name of the shortcut's convolution.
      dropout: Behind the first convolution; 0: there is no such layer.
    """

    def __init__(
        self,
        inside: int,
        out: int,
        stride: int,
        *,
        from_input: bool = False,
        bottleneck: bool = False,
        bias: bool = False,
        shortcut: str = "shortcut.0",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.from_input = from_input
        inner = out // 4 if bottleneck else out
        size, first = (1, 1) if bottleneck else (3, stride)
        self.bn1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, inner, size, first, size // 2, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout else None
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride if bottleneck else 1, 1, bias=bias)
        if bottleneck:
            self.bn3 = nn.BatchNorm2d(inner)
            self.conv3 = nn.Conv2d(inner, out, 1, bias=bias)
        self.name, _, place = shortcut.partition(".")
        if stride != 1 or inside != out:
            conv = nn.Conv2d(inside, out, 1, stride, bias=bias)
            self.add_module(self.name, nn.Sequential(conv) if place else conv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, inside, H, W)`` to ``(N, out, H', W')``."""
        activated, skip = F.relu(self.bn1(x)), x
        if self.name in self._modules:
            skip = self._modules[self.name](x if self.from_input else activated)
        y = self.conv1(activated)
        y = y if self.dropout is None else self.dropout(y)
        y = self.conv2(F.relu(self.bn2(y)))
        if hasattr(self, "conv3"):
            y = self.conv3(F.relu(self.bn3(y)))
        return y + skip


class PreActivationNetwork(nn.Module):
    """Stem, stages, a norm and a ReLU, and the head.

    Args:
      last, head: Names of the last norm (empty: there is none) and of the head.
      stage: Template of the name of a stage's blocks, ``"layer{}"``.
      widths, depth: Channels of the stages, blocks of each.
      stem_bias: Whether the first convolution has a bias.
      classes: Of the head.
      **block: Of every block.
    """

    def __init__(
        self,
        *,
        last: str = "bn1",
        head: str = "linear",
        stage: str = "layer{}",
        widths: tuple[int, ...] = (8, 16),
        depth: int = 1,
        stem_bias: bool = False,
        channels: int = 3,
        classes: int = 5,
        **block: object,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 8, 3, 1, 1, bias=stem_bias)
        before, self.names = 8, [stage.format(i) for i in range(1, len(widths) + 1)]
        for i, (name, width) in enumerate(zip(self.names, widths, strict=True)):
            blocks = nn.Sequential()
            for j in range(depth):
                stride = 2 if i and not j else 1
                blocks.append(PreActivationBlock(before, width, stride, **block))
                before = width
            home, _, inner = name.partition(".")
            self.add_module(home, nn.ModuleDict({inner: blocks}) if inner else blocks)
        self.last, self.head = last, head
        if last:
            self.add_module(last, nn.BatchNorm2d(before))
        self.add_module(head, nn.Linear(before, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of images ``(N, channels, H, W)``."""
        x = self.conv1(x)
        for name in self.names:
            x = self.get_submodule(name)(x)
        x = F.relu(self.get_submodule(self.last)(x)) if self.last else x
        return self.get_submodule(self.head)(F.adaptive_avg_pool2d(x, 1).flatten(1))


NETWORKS = {
    "kuangliu": {"last": ""},
    "with a last norm": {"last": "bn"},
    "kuangliu bottleneck": {"last": "", "bottleneck": True},
    "meliketoy": {"from_input": True, "bias": True, "stem_bias": True, "dropout": 0.3},
    "xternalz": {"head": "fc", "stage": "block{}.layer", "shortcut": "convShortcut"},
    "bearpaw": {"last": "bn", "head": "fc", "from_input": True, "shortcut": "downsample.0"},
    "names of its own": {"last": "end", "stage": "part{}"},
}
"""Options of :class:`PreActivationNetwork` by the repository that has them."""


def zagoruyko(module: PreActivationNetwork) -> dict[str, torch.Tensor]:
    """The tensors of a network as code without modules keeps them."""
    renamed = {}
    for key, value in module.state_dict().items():
        name = key.replace("bn1.", "bn.", 1) if key.startswith("bn1.") else key
        for i in (1, 2, 3):
            name = name.replace(f"layer{i}.", f"group{i - 1}.block")
        name = name.replace("bn1", "bn0").replace("bn2", "bn1").replace("shortcut.0", "convdim")
        name = name.replace("conv1", "conv0").replace("conv2", "conv1").replace("linear", "fc")
        renamed[name.removesuffix(".weight") if "conv" in name else name] = value
    return {key: value for key, value in renamed.items() if "num_batches" not in key}
