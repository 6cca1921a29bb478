"""Numbers that follow from the size of the images, and parts without gradients, as people write
them."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flax_resblock
from flax_resblock import InputError
from flax_resblock.port import tracing


class SimAM(nn.Module):
    def forward(self, x):
        _, _, h, w = x.size()
        n = w * h - 1
        squares = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        spread = squares.sum(dim=[2, 3], keepdim=True) / n
        return x * torch.sigmoid(squares / (4 * (spread + 1e-4)) + 0.5)


class Channels(nn.Module):
    """The channel attention of CBAM."""

    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(width, width))

    def forward(self, x):
        window = (x.size(2), x.size(3))
        pooled = self.mlp(F.avg_pool2d(x, window, stride=window)) + self.mlp(
            F.max_pool2d(x, window, stride=window)
        )
        flat = x.view(x.size(0), x.size(1), -1)
        most, _ = torch.max(flat, dim=2, keepdim=True)
        lse = most + (flat - most).exp().sum(dim=2, keepdim=True).log()
        scale = torch.sigmoid(pooled + self.mlp(lse)).unsqueeze(2).unsqueeze(3).expand_as(x)
        return x * scale


class Positions(nn.Module):
    """The position attention of DANet."""

    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))

    def forward(self, x):
        n, c, height, width = x.size()
        q = self.q(x).view(n, -1, width * height).permute(0, 2, 1)
        attention = torch.softmax(torch.bmm(q, self.k(x).view(n, -1, width * height)), dim=-1)
        v = self.v(x).view(n, -1, width * height)
        return x + torch.bmm(v, attention.permute(0, 2, 1)).view(n, c, height, width)


class Coordinates(nn.Module):
    """Rows as in CoordConv, columns by linspace."""

    def forward(self, x):
        n, _, h, w = x.shape
        rows = torch.arange(h, dtype=x.dtype).view(1, 1, h, 1).repeat(n, 1, 1, w) / (h - 1)
        columns = torch.linspace(-1, 1, w, dtype=x.dtype).expand(n, 1, h, w)
        return torch.cat([x, rows, columns], 1)


class Everything(nn.Module):
    """The blocks that ask for sizes in a row, joined as Milesial's U-Net does."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 2, 1)
        self.blocks = nn.Sequential(SimAM(), Channels(4), Positions(4), Coordinates())
        self.head = nn.Conv2d(10, 3, 3)

    def forward(self, x):
        x2 = self.stem(x)
        x1 = F.interpolate(self.blocks(self.down(F.max_pool2d(x2, 2))), scale_factor=4)
        rows, columns = x2.size(2) - x1.size(2), x2.size(3) - x1.size(3)
        widths = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        return self.head(torch.cat([x2, F.pad(x1, widths)], 1))


def test_sizes_are_written_as_expressions_that_hold_at_any_size():
    torch.manual_seed(0)
    module = Everything().eval()
    ported = flax_resblock.port(module, image_size=(16, 24))
    assert ported.notes == ()
    for text in ("(x.shape[1] * x.shape[2] - 1)", "nn.max_pool(x, x.shape[1:3])"):
        assert text in ported.source
    fixed = ported.source.replace("x.shape[1] * x.shape[2] - 1", "4 * 6 - 1")
    fixed = replace(ported, source=fixed).create()
    model = ported.create()
    for size in ((27, 42), (50, 23)):
        images = torch.randn(2, 3, *size)
        with torch.no_grad():
            true = module(images).permute(0, 2, 3, 1).numpy()
        ours = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
        np.testing.assert_allclose(model(ours), true, rtol=1e-4, atol=1e-5)
        assert np.abs(fixed(ours) - true).max() > 1e-3  # the control


class Gate(nn.Module):
    """The channel gate of BAM: its window is a square."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.conv(x)
        pooled = F.avg_pool2d(x, x.size(2), stride=x.size(2))
        return x * self.fc(pooled.view(pooled.size(0), -1))[:, :, None, None].expand_as(x)


@pytest.mark.slow
def test_a_window_that_is_a_size_stays_one():
    ported = flax_resblock.port(Gate(), image_size=(64, 64))
    assert "nn.avg_pool(conv, x.shape[1])" in ported.source
    assert "only" not in str(ported.notes)


class Frozen(nn.Module):
    """A backbone under no_grad, and divisions that round."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Conv2d(4, 4, 3)

    @torch.no_grad()
    def features(self, x):
        return self.backbone(x)

    def forward(self, x):
        x = self.head(self.features(x))
        halves = torch.div(torch.arange(4, dtype=x.dtype), 2, rounding_mode="floor")
        x = x * halves.view(1, -1, 1, 1) + torch.div(x, 0.3, rounding_mode="trunc")
        return (x + x % 0.7 + torch.fmod(x, 0.45)).mean((2, 3))


def test_a_part_without_gradients_is_one_in_the_port_too(monkeypatch):
    ported = flax_resblock.port(Frozen(), image_size=(9, 8))
    assert "self.head(jax.lax.stop_gradient(self.backbone(x)))" in ported.source
    assert ported.figures["float64 training gradients"]["error"] < 1e-12
    monkeypatch.setattr(tracing, "detach", lambda graph: None)
    with pytest.raises(InputError, match="in training mode gradients of backbone"):
        flax_resblock.port(Frozen(), image_size=(9, 8))
