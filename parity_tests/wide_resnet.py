"""A wide residual network as people write it in PyTorch, to be ported.

Source: Zagoruyko & Komodakis 2016, arXiv:1605.07146; pre-activation blocks of He et al. 2016b.
"""

import torch
import torch.nn.functional as F
from torch import nn


class WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice, with dropout between; a projection sees the first ReLU."""

    def __init__(self, in_planes, planes, stride=1, dropout=0.3):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_planes)
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.dropout = dropout
        self.shortcut = None
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(out)
        out = F.relu(self.bn2(self.conv1(out)))
        out = F.dropout(out, self.dropout, self.training)
        return self.conv2(out) + shortcut


class WideResNet(nn.Module):
    """WRN-depth-width for images of 32x32."""

    def __init__(self, depth=28, width=10, num_classes=10, dropout=0.3):
        super().__init__()
        planes = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList()
        for stage in range(3):
            blocks = []
            for place in range((depth - 4) // 6):
                stride = 2 if stage and not place else 1
                before = planes[stage] if not place else planes[stage + 1]
                blocks.append(WideBlock(before, planes[stage + 1], stride, dropout))
            self.stages.append(nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(planes[-1])
        self.fc = nn.Linear(planes[-1], num_classes)

    def forward(self, x):
        x = self.conv1(x)
        for stage in self.stages:
            x = stage(x)
        x = F.relu(self.bn(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.fc(torch.flatten(x, 1))
