"""The block as the question had it, and what each repair leaves broken. Kept to be told apart from
the specification, never to be used.

Three faults: the result of the main path is overwritten (``out = skip(x); out += x``), the first
convolution ignores ``stride``, and the second convolution is declared with ``in_channels`` inputs
although it receives ``out_channels``. The accepted answer repairs the first one only."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Faulty(nn.Module):
    """Builds the question's layers with the faults that a subclass keeps."""

    overwrites_branch = True
    ignores_stride = True
    second_takes_in_channels = True

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        first = 1 if self.ignores_stride else stride
        inner = in_channels if self.second_takes_in_channels else out_channels
        self.block = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride=first, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(inner, out_channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.skip = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.skip = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.overwrites_branch:
            out = self.skip(x)
            out = out + x
        else:
            out = out + self.skip(x)
        return torch.relu(out)


class Block(_Faulty):
    """As asked: all three faults."""


class AcceptedAnswer(_Faulty):
    """The accepted answer: the branch is added; stride and channels are still wrong."""

    overwrites_branch = False


class StrideIgnored(_Faulty):
    """Only the second fault left: the first convolution ignores ``stride``."""

    overwrites_branch = False
    second_takes_in_channels = False


class WrongChannels(_Faulty):
    """Only the third fault left: the second convolution expects ``in_channels``."""

    overwrites_branch = False
    ignores_stride = False


class BranchOverwritten(_Faulty):
    """Only the first fault left: the main path is computed and thrown away."""

    ignores_stride = False
    second_takes_in_channels = False
