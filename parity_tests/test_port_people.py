"""What people write in the forward pass of their networks, ported."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import flax_resblock
from flax_resblock import InputError
from flax_resblock.port import porting


class Habits(nn.Module):
    """Writes into slices of a new tensor, adds coordinates, and measures a distance."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(5, 8, 3, padding=1)
        self.slope = nn.RReLU()
        self.drop = nn.AlphaDropout(0.2)
        self.fc = nn.Linear(8, 6)

    def shifted(self, x):
        made = torch.zeros_like(x)
        made[:, :2, :, :-1] = x[:, :2, :, 1:]
        made[:, 2:-1, 1:] = torch.narrow(x, 1, 2, 5)[:, :, :-1]
        made[:, -1] = 0.5
        return made

    def forward(self, x):
        n, _, h, w = x.shape
        sides = [torch.linspace(-1, 1, size, dtype=x.dtype) for size in (h, w)]
        rows, columns = torch.meshgrid(*sides, indexing="ij")
        places = [one.expand(n, 1, -1, -1) for one in (columns, rows)]
        x = self.stem(torch.cat([x, *places], 1))
        x = torch.clip(self.shifted(self.slope(x)) * x, -2, 2).mean((2, 3))
        x = self.fc(self.drop(x))
        return x, F.pairwise_distance(x[:, :3], torch.subtract(x[:, 3:], 1), keepdim=True)


def test_writes_into_slices_and_coordinates_are_ported(monkeypatch):
    ported = flax_resblock.port(Habits(), image_size=(9, 10))
    assert "[..., :2].set(" in ported.source
    genuine = porting.source_of
    monkeypatch.setattr(
        porting, "source_of", lambda *a, **k: genuine(*a, **k).replace(".set(", ".mul(")
    )
    with pytest.raises(InputError, match="differs by"):
        flax_resblock.port(Habits(), image_size=(9, 10))


class Coordinates(nn.Module):
    """Casts coordinates to float32, whatever the images are; drops in training mode alone."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 3, 3)

    def forward(self, x):
        rows = torch.arange(x.shape[2]).float() / (x.shape[2] - 1)
        rows = rows.view(1, 1, -1, 1).repeat(x.shape[0], 1, 1, x.shape[3])
        x = self.conv(torch.cat([x, rows.type_as(x)], 1)).mean((2, 3))
        if self.training:
            x = F.dropout(x, 0.4)
        return x


def test_a_cast_to_float32_inside_and_dropout_in_training_mode_alone():
    ported = flax_resblock.port(Coordinates(), image_size=(8, 9))
    assert ported.create().dropout.rate == 0.4
    assert not [name for name in ported.figures if name.startswith("float64")]
    assert "it was compared in float32" in " ".join(ported.notes)


class BackwardRaises(nn.Module):
    """Runs in both modes, and has no gradient."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x):
        x = torch.exp(self.conv(x))
        x += 1
        return x.mean((2, 3))


def test_a_module_without_a_gradient_is_compared_in_evaluation_mode_alone():
    ported = flax_resblock.port(BackwardRaises(), image_size=(8, 9))
    assert "training mode was not compared: your module raises there" in " ".join(ported.notes)
    assert not [name for name in ported.figures if "training" in name]


class Written(nn.Module):
    """Writes into a slice, and drops with a function."""

    def forward(self, x):
        made = torch.zeros_like(x)
        made[:, 1:] = F.dropout(x, 0.5, self.training)[:, :-1]
        return made


class Recomputed(nn.Module):
    """Computes a norm again in the backward pass."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False).square()


class Random(nn.Module):
    """Weighs two branches at random."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 2, 3)

    def forward(self, x):
        share = torch.empty(x.size(0), 1, 1, 1).uniform_() if self.training else 0.5
        return (share * self.left(x) + (1 - share) * self.right(x)).mean((2, 3))


REFUSALS = {
    "in module 1, LazyLinear is lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)),
    r"calls dropout as a function at .*test_port_people.py:\d+": Written,
    "its backward pass changes norm.running_mean": Recomputed,
    "is TorchScript": lambda: torch.jit.script(nn.Conv2d(3, 2, 1)),
    r"in module 0, Conv2d has weight_norm, .*remove_weight_norm\(": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Conv2d(3, 2, 1))
    ),
    "ParametrizedConv2d has a parametrization": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 2, 1))
    ),
    r"random numbers of its own at .*uniform_\(\)": Random,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_traced_is_refused_by_name(message):
    with pytest.raises(InputError, match=message):
        flax_resblock.port(REFUSALS[message](), image_size=(8, 8))
