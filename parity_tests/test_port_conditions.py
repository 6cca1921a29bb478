"""Port: code whose path depends on the batch, the size of the images, or earlier calls."""

from __future__ import annotations

import random

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

import flax_resblock
from flax_resblock.errors import InputError
from flax_resblock.port.conditions import Conditions
from flax_resblock.port.examples import accepted
from flax_resblock.port.unsteady import refuse_unsteady

SHAPES = ((3, 40, 40),)
COMPARED = [((3, 77, 75),)]


class Small(nn.Module):
    """A convolution; subclasses say what follows it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 2)
        self.calls, self.rng, self.begun = 0, np.random.default_rng(0), False
        self.same, self.other = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.offset = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        return self.fc(self.then(self.conv(x)).mean((2, 3)))

    def then(self, x):
        return x


class ByLargeBatch(Small):
    def then(self, x):
        return x * 2 if x.shape[0] > 8 else x


class ByOneImage(Small):
    def then(self, x):
        return torch.tanh(x) if len(x) == 1 else x


class ByMultiples(Small):
    def then(self, x):
        return torch.cat([part.relu() for part in x.chunk(2)]) if len(x) % 4 == 0 else x


class ByClampedBatch(Small):
    def then(self, x):
        return x / min(len(x), 20)


class ByBranch(Small):
    def then(self, x):
        part = self.other if len(x) > 8 else self.same
        return part(x)


class ByBatchInTraining(Small):
    def then(self, x):
        return x * 2 if self.training and x.shape[0] > 100 else x


@pytest.mark.parametrize(
    ("kind", "batch", "call"),
    [
        (ByLargeBatch, "9 images", "mul"),
        (ByOneImage, "1 image", "tanh"),
        (ByMultiples, "4 images", "chunk"),
        (ByClampedBatch, "32 images", "div"),
        (ByBranch, "9 images", "conv2d"),
        (ByBatchInTraining, "128 images", "mul"),
    ],
)
def test_code_that_depends_on_the_batch_is_refused_with_its_line(kind, batch, call):
    found = Conditions(kind().train(), SHAPES)
    with pytest.raises(
        InputError, match=rf"batch of {batch} than with 2, at .*\.py:\d+ \(.*{call}"
    ):
        found.refuse_by_batch()
    assert Conditions(Small(), SHAPES).refuse_by_batch() == ""


class AboveSize(Small):
    def then(self, x):
        return x * 2 if x.shape[2] > 200 else x


class BelowSize(Small):
    def then(self, x):
        return x * (3.0 if x.shape[3] < 30 else 1.0)


class ClampedSize(Small):
    def then(self, x):
        return x[:, :, : min(x.shape[2], 150)]


class UpTo(Small):
    def then(self, x):
        while x.shape[-1] > 80:
            x = nn.functional.max_pool2d(x, 2)
        return x


class OtherMode(Small):
    def then(self, x):
        return nn.functional.interpolate(x, None, 2, "nearest" if len(x[0, 0]) > 99 else "bicubic")


class OtherOrder(Small):
    def then(self, x):
        first, second = (x, self.same(x))[:: 1 if x.shape[3] > 30 else -1]
        return first - second.relu()


class OtherResult(Small):
    def forward(self, x):
        x = self.conv(x)
        kept = self.fc(x.mean((2, 3))), self.fc(self.same(x).mean((2, 3)))
        return kept[x.shape[2] < 10]


class Sizes(Small):
    """Numbers that follow from the size in ways that a port knows."""

    def then(self, x):
        n, c, height, width = x.shape
        x = torch.softmax(x.view(n, c, height * width), -1).view(n, c, height, width)
        y = nn.functional.avg_pool2d(x, 2)
        y = nn.functional.interpolate(y, size=x.shape[2:])
        return x[:, :, : y.shape[2], : y.shape[3]] + y


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((AboveSize, "224x224"), (BelowSize, "16x20"), (ClampedSize, "224x224")),
        *((UpTo, "96x128"), (OtherMode, "127x66"), (OtherOrder, "16x20"), (OtherResult, "8x11")),
    ],
)
def test_code_that_depends_on_the_size_binds_the_port_to_it(kind, size):
    why = Conditions(kind().eval(), SHAPES).bound_to_size(COMPARED)
    at = "in what it returns" if kind is OtherResult else f"at {__file__}"
    assert why.startswith(f"at {size} its code does something else {at}"), why
    assert Conditions(Sizes().eval(), SHAPES).bound_to_size(COMPARED) == ""


class Counting(Small):
    def then(self, x):
        self.calls += 1
        return x if self.calls < 100 else x * 2


class CountingInTraining(Small):
    def then(self, x):
        self.calls += self.training
        return x


class DrawingInPython(Small):
    def then(self, x):
        return x if self.training and random.random() < 0.01 else x.relu()


class DrawingInNumpy(Small):
    def then(self, x):
        return x if self.rng.random() < 0.01 else x.relu()


class InitialisedByData(Small):
    def then(self, x):
        if not self.begun:
            self.offset.data.copy_(-x.mean((0, 2, 3))[:, None, None])
            self.begun = True
        return x + self.offset


class Endless(Small):
    def then(self, x):
        while x.shape[-1] > 8:
            x = x.relu()
        return x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Counting, "every call in evaluation mode changes calls .from 1 to 2."),
        (CountingInTraining, "every call in training mode changes calls .from 1 to 2."),
        (DrawingInPython, r"in training mode it draws .* in front of .*conditions.py:\d+"),
        (DrawingInNumpy, "every call in evaluation mode changes rng"),
        (InitialisedByData, "a call in evaluation mode changes offset.* initialises it"),
        (Endless, r"does not end, or takes more than .* it was at .*conditions.py:\d+"),
    ],
)
def test_code_that_remembers_or_never_ends_is_refused(kind, words):
    module, images = kind().eval(), [torch.randn(2, 3, 16, 16)]
    with pytest.raises(InputError, match=words):
        refuse_unsteady(module, images)
    assert module.calls == 0
    refuse_unsteady(Small().eval(), images)
    if kind is Endless:
        with pytest.raises(InputError, match="does not end"):
            accepted(module, [(16, 16)])


class Skip(Small):
    """A skip connection that is resized where the image has an odd size."""

    most = 10**6

    def then(self, x):
        y = nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2.0)
        if y.shape[2:] != x.shape[2:]:
            y = nn.functional.interpolate(y, x.shape[2:])
        return x * y * (2 if x.shape[2] > self.most else 1)


class SkipAboveSize(Skip):
    most = 200


class Squeezing(AboveSize):
    def forward(self, x):
        x = self.then(self.conv(x))
        return self.fc(nn.functional.adaptive_avg_pool2d(x, 1).squeeze())


class FrozenNorm(Small):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def train(self, mode=True):
        super().train(mode)
        self.bn.eval()
        return self

    def then(self, x):
        return self.bn(x)


def test_a_port_says_what_it_is_bound_to_and_refuses_what_it_cannot_do():
    found = flax_resblock.port(Squeezing())
    _, first, second = found.notes  # the first names the offset, which is not used
    assert "with one image your module drops an axis more (squeeze at" in first
    assert "images of 64x64 only: at 224x224 its code does something else at" in second
    with pytest.raises(ValueError, match="ported for images of 64x64"):
        found.create()(jnp.ones((1, 80, 80, 3)))
    with pytest.raises(InputError, match=r"its train\(\) leaves bn in evaluation mode"):
        flax_resblock.port(FrozenNorm())


def test_another_path_at_sizes_at_which_the_port_raises_hides_no_third_one():
    found = flax_resblock.port(Skip(), image_size=(16, 16))
    assert "the written code raises TypeError at" in found.notes[-1], found.notes
    model = found.create()
    model(jnp.ones((1, 20, 24, 3)))
    with pytest.raises(TypeError):
        model(jnp.ones((1, 20, 25, 3)))
    bound = flax_resblock.port(SkipAboveSize(), image_size=(16, 16))
    assert "images of 16x16 only: at 224x224 its code does" in bound.notes[-1], bound.notes
