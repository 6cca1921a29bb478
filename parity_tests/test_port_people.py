"""What people write in the forward pass of their networks, ported."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

import flax_resblock
from flax_resblock import InputError
from flax_resblock import nn as nn_of_flax
from flax_resblock.port import porting
from flax_resblock.port.layer import Rate
from flax_resblock.port.operator_results import Rounded
from flax_resblock.port.program import Program
from flax_resblock.port.proof import Proof
from parity_tests.support import spoil


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
    spoil(monkeypatch, ".set(", ".mul(")
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


class WeightNormed(nn.Module):
    """Both spellings of weight norm, with a norm for each output, for each input and for all."""

    def __init__(self):
        super().__init__()
        new = nn.utils.parametrizations.weight_norm
        self.stem = nn.utils.weight_norm(nn.Conv2d(3, 4, 3, stride=2))
        self.body = nn.utils.weight_norm(nn.Conv2d(4, 4, 3, padding=1, bias=False), dim=None)
        self.up = new(nn.ConvTranspose2d(4, 5, 2, stride=2))
        self.fc = new(nn.Linear(5, 3))

    def forward(self, x):
        return self.fc(F.relu(self.up(F.relu(self.body(self.stem(x))))).mean((2, 3)))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_weight_norm_is_ported_in_both_spellings_and_back(monkeypatch):
    module = WeightNormed()
    before = module(torch.randn(2, 3, 9, 8))  # leaves the graph of its weights in the module
    ported = flax_resblock.port(module, image_size=(9, 8))
    assert ported.source.count("nn.weight_norm(") == 4
    state, back = module.state_dict(), ported.to_torch(ported.create())
    assert back.keys() == state.keys()
    assert "fc.parametrizations.weight.original0" in back
    assert all(torch.equal(torch.as_tensor(back[key]), state[key]) for key in state)
    before.sum().backward()  # the module is as it was
    assert module.stem.weight_g.grad is not None
    monkeypatch.setattr(nn_of_flax, "weight_norm", lambda v, g: v * g)
    with pytest.raises(InputError, match="in evaluation mode the output differs by"):
        flax_resblock.port(module, image_size=(9, 8))


class Modulated(nn.Module):
    """An instance norm of what a linear layer scales and shifts far from zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8, affine=True)
        self.film = nn.Linear(7, 16)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x, facts):
        scale, shift = self.film(facts)[..., None, None].chunk(2, 1)
        x = 0.1 * scale * self.conv(x) + shift + 5
        return self.last(F.relu(self.norm(x))).mean((2, 3))


def test_rounding_between_layers_counts_as_rounding(monkeypatch):
    """The sum in front of the norm rounds by far more than the layers around it."""
    torch.manual_seed(1)
    inputs = torch.randn(2, 3, 16, 16), torch.randn(2, 7)
    ported = flax_resblock.port(Modulated(), example_inputs=inputs)
    assert ported.figures["float64 training gradients"]["error"] > 1e-12
    assert "4 times what PyTorch's own move by" in " ".join(ported.notes)
    spoil(monkeypatch, "affine=True", "affine=True, eps=1.00001e-5")
    with pytest.raises(InputError, match=r"differs? by"):
        flax_resblock.port(Modulated(), example_inputs=inputs)


class Customs(nn.Module):
    """A module called like an attribute of a graph, CELU in place, a mask as truth values, and a
    map that stays in the module."""

    def __init__(self):
        super().__init__()
        self.meta = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.CELU(0.3, inplace=True))

    def forward(self, x):
        self.kept = x = self.meta(x)
        mask = (x.detach() > 0.1).to(x.dtype)
        return sum([x.masked_fill(mask.bool(), 0.5), x]).mean((2, 3))


def test_celu_in_place_has_a_derivative_of_its_own(monkeypatch):
    ported = flax_resblock.port(Customs(), image_size=(8, 9))
    assert "partial(nn.celu, alpha=0.3, inplace=True)" in ported.source
    assert "meta.0.weight" in ported.to_torch(ported.create())
    assert "float64 training gradients" in ported.figures
    spoil(monkeypatch, ", inplace=True", "")
    with pytest.raises(InputError, match=r"gradients of meta\.0\.weight differ by"):
        flax_resblock.port(Customs(), image_size=(8, 9))


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


class CoordinateAttention(nn.Module):
    """Pools rows and columns, and splits what it made of both at the height of the map."""

    def __init__(self):
        super().__init__()
        self.stem, self.both = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.scale = nn.Parameter(torch.ones(4))
        self.rows, self.columns = nn.AdaptiveAvgPool2d((None, 1)), nn.AdaptiveAvgPool2d((1, None))

    def forward(self, x):
        x = self.stem(x) * self.scale[:, None, None]
        columns = self.columns(x).permute(0, 1, 3, 2)
        both = self.both(torch.cat([self.rows(x), columns], 2)).sigmoid()
        rows, columns = both.split([x.size(2), x.size(3)], 2)
        return (x * rows * columns.permute(0, 1, 3, 2)).mean((2, 3))


def test_a_split_at_the_height_of_a_map_is_right_for_any_size():
    ported = flax_resblock.port(CoordinateAttention(), image_size=(9, 12))
    assert not ported.notes
    assert "[x.shape[1]], axis=1)" in ported.source
    assert "self.stem(x) * self.scale[...]\n" in ported.source


def test_rates_of_stochastic_depth_are_written_as_fractions():
    rates = [0.1 * place / 17.0 for place in range(18)]
    written = [repr(Rate(one)) for one in rates]
    assert written[:4] == ["0.0", "1 / 170", "1 / 85", "3 / 170"]
    assert max(map(len, written)) <= 8
    np.testing.assert_allclose([eval(one) for one in written], rates, rtol=2.3e-16)
    assert repr(Rate(0.12345678901234)) == "0.12345678901234"


class Binomial(nn.Module):
    """Makes a kernel in its forward pass."""

    def forward(self, x):
        kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype) / 4
        return F.conv2d(x, kernel.repeat(4, 1).view(4, 1, 1, 3), groups=4)


class Merging(nn.Module):
    """Has two branches in training mode, and their sum as one kernel in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(4, 5, 3, padding=1), nn.Conv2d(4, 5, 1)

    def forward(self, x):
        if self.training:
            return self.wide(x) + self.narrow(x)
        kernel = self.wide.weight + F.pad(self.narrow.weight, [1, 1, 1, 1])
        return F.conv2d(x, kernel, self.wide.bias + self.narrow.bias, padding=1)


class Embeds(nn.Module):
    """Returns features in evaluation mode, normed by a layer of that mode alone, and logits with
    an expectation over 70 bins in training mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.blur = nn.Conv2d(3, 4, 3), Binomial()
        self.merging = Merging()
        self.neck, self.classifier = nn.BatchNorm1d(5), nn.Linear(5, 70)
        self.bins = torch.arange(70.0)

    def forward(self, x):
        x = self.merging(self.blur(self.blur(self.conv(x)))).mean((2, 3))
        if not self.training:
            return {"features": F.normalize(self.neck(x)), "bins": None}
        logits = self.classifier(x * 2)
        return {"features": logits, "bins": (logits.softmax(1) * self.bins).sum(1)}


def test_code_may_do_something_else_in_training_mode(monkeypatch):
    ported = flax_resblock.port(Embeds(), image_size=(9, 10))
    assert '"bins": None}' in ported.source
    assert "jnp.arange(70, dtype=x.dtype)" in ported.source
    model = ported.create()
    images = jnp.ones((2, 9, 10, 3))
    assert (model(images)["features"].shape, model(images)["bins"]) == ((2, 5), None)
    model.train()
    assert [one.shape for one in model(images).values()] == [(2, 70), (2,)]
    assert not model.neck.mean[...].any()  # PyTorch does not call it in training mode

    spoil(monkeypatch, "x * 2", "x * 2.001")
    with pytest.raises(InputError, match="in training mode the output differs"):
        flax_resblock.port(Embeds(), image_size=(9, 10))


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x):
        return F.relu(x) + self.slope * x


class Activated(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3), act

    def forward(self, x):
        return self.act(self.conv(x))


class OneActivation(nn.Module):
    """All its parts hold one activation with a parameter."""

    def __init__(self):
        super().__init__()
        self.act = Slope()
        self.parts = nn.Sequential(Activated(self.act), Activated(self.act))

    def forward(self, x):
        return self.act(self.parts(x).mean((2, 3)))


def test_an_activation_of_yours_that_parts_share_has_one_parameter(monkeypatch):
    module = OneActivation()
    ported = flax_resblock.port(module, image_size=(9, 10))
    assert len(set(ported.to_torch(ported.create()))) == len(module.state_dict()) == 7
    genuine = porting.source_of

    def apart(*arguments, **named):
        source = genuine(*arguments, **named)
        return source.replace("        self.parts.layers[1].act.slope = self.act.slope\n", "")

    assert "self.parts.layers[1].act.slope" in ported.source
    monkeypatch.setattr(porting, "source_of", apart)
    with pytest.raises(InputError):
        flax_resblock.port(module, image_size=(9, 10))


class Hooked(nn.Module):
    """Has a layer with a hook."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.conv.register_forward_hook(lambda _, __, made: made + 1)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class KeepsActivations(nn.Module):
    """Reads what a hook keeps, which the hook of a copy does not give to the copy."""

    def __init__(self):
        super().__init__()
        self.conv, self.kept = nn.Conv2d(3, 2, 3), {}
        self.conv.register_forward_hook(lambda _, __, made: self.kept.update(conv=made))

    def forward(self, x):
        return self.conv(x) + self.kept["conv"].mean((2, 3), keepdim=True)


class MoreInTraining(nn.Module):
    def forward(self, x):
        return (x + 1, x * 2) if self.training else x + 1


class AllOfIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = MoreInTraining()

    def forward(self, x):
        found = self.part(x)
        return torch.cat(found, 1) if isinstance(found, tuple) else found


class OnGpu(nn.Module):
    def forward(self, x):
        return x + torch.zeros(1).cuda()


REFUSALS = {
    "in module conv, Conv2d has a forward hook that holds a module": KeepsActivations,
    "in module part .MoreInTraining.*something else in training mode": AllOfIt,
    "Your code asks for a GPU, and is run without one": OnGpu,
    r"in module conv, called at .*test_port_people.py:\d+ .*has forward hooks": Hooked,
    "in module 1, LazyLinear is lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(2)),
    r"calls dropout as a function at .*test_port_people.py:\d+": Written,
    "its backward pass changes norm.running_mean": Recomputed,
    "is TorchScript": lambda: torch.jit.script(nn.Conv2d(3, 2, 1)),
    r"in module 0, Conv2d has spectral_norm, .*remove_spectral_norm\(": lambda: nn.Sequential(
        nn.utils.spectral_norm(nn.Conv2d(3, 2, 1))
    ),
    "ParametrizedConv2d has spectral_norm, which changes a buffer": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 2, 1))
    ),
    "ParametrizedConv2d has a parametrization other than weight_norm": lambda: nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Conv2d(3, 2, 1))
    ),
    r"random numbers of its own at .*uniform_\(\)": Random,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("message", REFUSALS)
def test_what_cannot_be_traced_is_refused_by_name(message):
    with pytest.raises(InputError, match=message):
        flax_resblock.port(REFUSALS[message](), image_size=(8, 8))


class Directly(nn.Module):
    """Calls ``forward`` of its parts, as a well-known ResNeXt does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.then = nn.Sequential(nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6))

    def forward(self, x):
        x = F.relu(self.bn.forward(self.conv.forward(x)), inplace=True)
        return self.then.forward(x).mean((2, 3))


def test_a_direct_call_of_forward_is_a_call():
    ported = flax_resblock.port(Directly(), image_size=(8, 8))
    assert "nn.relu(self.bn(self.conv(x)))" in ported.source
    assert ported.figures["float64 training running statistics"]["tensors"] == 4


class Cut(nn.Module):
    """Has a number, and no part."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def forward(self, x):
        return x[:, :, : -self.end].contiguous()


class WithoutParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.cuts = nn.Sequential(Cut(2), Cut(2), Cut(3), Cut(2))

    def forward(self, x):
        return self.cuts(self.conv(x))


def test_a_module_without_parts_is_made_with_what_its_constructor_asks_for():
    ported = flax_resblock.port(WithoutParts(), image_size=(16, 15))
    assert "class Cut(nnx.Module)" in ported.source
    assert ported.create().cuts[2].end == -3


class Halved(nn.Module):
    """Joins its input with what it makes of half of it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        half = self.conv(x / 2)
        both = torch.cat([half, half * x], 1)
        return both[:, :3] + x * both[:, 3:]


def test_code_is_the_same_every_time_and_names_what_a_variable_holds(monkeypatch):
    monkeypatch.setattr(porting, "_proved", lambda *_: Proof())
    names = [f"Half{letter}" for letter in "CAFEBDHG"]
    module = nn.Sequential(*(type(name, (Halved,), {})() for name in names))
    source = flax_resblock.port(module, image_size=(8, 8)).source
    assert re.findall(r"class (Half\w)\(", source) == names  # not in the order of a set
    assert source.count("joined = jnp.concatenate([") == len(names)


class NamedLikeOperators(nn.Module):
    """Has layers and a parameter with the names of what a trace in training mode looks for."""

    def __init__(self):
        super().__init__()
        self.batch_norm = nn.Conv2d(3, 4, 3, bias=False)
        self.add_num_batches_tracked = nn.BatchNorm2d(4)
        self.dropout = nn.Conv2d(4, 4, 1)
        self.channel_add_ = nn.Parameter(torch.full((4,), 0.3))

    def forward(self, x):
        x = self.dropout(self.add_num_batches_tracked(self.batch_norm(x)).relu())
        x = F.dropout(x.mean((2, 3)), 0.4, self.training)
        return x + self.channel_add_


def test_names_of_operators_are_names_as_good_as_others():
    ported = flax_resblock.port(NamedLikeOperators(), image_size=(8, 8))
    assert ported.figures["float64 training gradients"]["tensors"] == 6
    assert "nn.Dropout(0.4" in ported.source
    assert "self.channel_add_" in ported.source


def test_sums_in_another_order_are_the_same_sums():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, 2, 1),
        nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(),
        nn.Linear(144, 5), nn.BatchNorm1d(5), nn.Sigmoid(),
    ).double()  # fmt: skip
    images = torch.randn(4, 3, 10, 10, dtype=torch.float64, requires_grad=True)

    def found():
        values = (images, *net.parameters())
        output = net(images)
        return [output.detach(), *torch.autograd.grad((output**2).sum(), values)]

    true = found()
    with Rounded(1):
        moved = found()
    for ours, theirs in zip(moved, true, strict=True):  # biases before a norm have no gradient
        assert 0 < (ours - theirs).norm() < 1e-12 * max(theirs.norm(), 0.1)


def test_the_rounding_of_a_long_sum_shows_where_it_is_taken_in_another_order():
    """Where the terms move by a unit in the last place, most of it stays as it is."""
    torch.manual_seed(0)
    images = torch.randn(3, 1, 149, 150, dtype=torch.float64) + 0.3
    norm = nn.BatchNorm2d(1).double()

    def largest(compute):
        return max((compute(seed) - true).norm() for seed in range(4))

    def nudged(seed):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(-1, 2, images.shape, generator=generator)
        return norm(images * (1 + 2.3e-16 * signs.double()))

    def reordered(seed):
        with Rounded(seed):
            return norm(images)

    with torch.no_grad():
        true = norm(images)
        assert largest(reordered) > 3 * largest(nudged) > 0


class Amplifies(nn.Module):
    """At the usual rate, training moves its last bits to the front."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.sin(6000 * self.conv(x)).mean((2, 3)))


def test_training_that_amplifies_rounding_is_compared_at_a_lower_rate(monkeypatch):
    torch.manual_seed(0)
    net, rates = Amplifies(), []
    genuine = Program.descend

    def descend(self, images, targets, rate):
        rates.append(rate)
        return genuine(self, images, targets, rate)

    monkeypatch.setattr(Program, "descend", descend)
    figures = flax_resblock.port(net, image_size=(8, 8), exact=True).figures
    assert figures["float64 weights after 5 steps of SGD"]["error"] < 1e-11
    assert rates[-1] == pytest.approx(rates[0] / 10)

    def wrong(self, images, targets, rate):
        return genuine(self, images, targets, 1.00001 * rate)

    monkeypatch.setattr(Program, "descend", wrong)
    with pytest.raises(InputError, match=r"after 5 steps of .* differ by"):
        flax_resblock.port(net, image_size=(8, 8), exact=True)
