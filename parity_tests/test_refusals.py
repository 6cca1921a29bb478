"""A refusal names what is seen, and the advice that it prints leads to the network it says."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from torch import nn

from flax_resblock import CheckpointError, checkpoint, from_torch
from flax_resblock.cli import run
from flax_resblock.parity.oracle import relative_l2
from parity_tests.support import output, torch_output
from torch_ref import ResNet

F = nn.functional


class Block(nn.Module):
    """A basic block; what varies is given by name."""

    def __init__(self, inside, out, stride=1, *, projection=1, extra=None, act=None, reverse=False):
        super().__init__()
        path = [nn.Conv2d(inside, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)]
        path += [nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)]
        named = list(zip(("one", "one_norm", "two", "two_norm"), path, strict=True))
        for name, layer in (named[1], named[3], named[2], named[0]) if reverse else named:
            self.add_module(name, layer)
        if extra is not None:
            self.squeeze = extra(out)
        if act is not None:
            self.act = act
        self.skip = nn.Sequential()
        if stride > 1 or inside != out:
            conv = nn.Conv2d(inside, out, projection, stride, projection // 2, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x):
        y = self.two_norm(self.two(F.relu(self.one_norm(self.one(x)))))
        if hasattr(self, "squeeze"):
            y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        return F.relu(y + self.skip(x))


class Net(nn.Module):
    """A stem, three blocks and a head, under names of their author's own."""

    def __init__(self, head=None, block=Block, stages=(8, 16), **options):
        super().__init__()
        narrow, wide = stages
        self.first = nn.Conv2d(3, narrow, 3, 1, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(narrow)
        self.units = nn.ModuleList(
            block(*numbers, **options)
            for numbers in ((narrow, narrow), (narrow, wide, 1 + (wide > narrow)), (wide, wide))
        )
        self.answer = nn.Linear(wide, 5) if head is None else head

    def forward(self, x):
        x = F.relu(self.first_norm(self.first(x)))
        for unit in self.units:
            x = unit(x)
        return self.answer(x.mean((2, 3)))


class Bare(Block):
    """A projection without a norm."""

    def __init__(self, *numbers):
        super().__init__(*numbers)
        if len(self.skip):
            self.skip = self.skip[0]


def squeeze_of_products(channels):
    return nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels))


def squeeze_of_convolutions(channels):
    return nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1))


def with_vectors_alone(net):
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight = layer.bias = None
    return net


def with_kernels(net, size):
    for unit in net.units:
        unit.one = nn.Conv2d(unit.one.in_channels, unit.one.out_channels, size, bias=False)
    return net


def with_bias(net):
    one = net.units[0].one
    net.units[0].one = nn.Conv2d(one.in_channels, one.out_channels, 3, 1, 1)
    return net


SEEN = {
    "squeeze of products": (
        lambda: Net(extra=squeeze_of_products),
        r"squeeze-and-excitation under other names .*: units\.0\.squeeze\.0, units\.0\.squeeze\.2",
    ),
    "squeeze of convolutions": (
        lambda: Net(extra=squeeze_of_convolutions),
        r"squeeze-and-excitation under other names .*: units\.0\.squeeze\.0, units\.0\.squeeze\.2",
    ),
    "a 5x5 shortcut": (
        lambda: Net(projection=5),
        r"shortcuts with a kernel larger than 3x3.*: units\.1\.skip\.0\.",
    ),
    "a shortcut without norm": (
        lambda: Net(block=Bare),
        r"shortcuts whose convolution has no norm after it.*: units\.1\.skip\.",
    ),
    "a head without bias": (
        lambda: Net(head=nn.Linear(16, 5, bias=False)),
        r"a fully connected layer without bias.*: answer\.",
    ),
    "a bias in some convolutions": (
        lambda: with_bias(Net()),
        r"convolutions with a bias beside others without.*: units\.0\.one\.",
    ),
    "learned slopes": (
        lambda: Net(act=nn.PReLU()),
        r"a single vector, such as PReLU.*: units\.0\.act",
    ),
    "norms without affine": (lambda: with_vectors_alone(Net()), r"without scale and bias"),
    "kernels of 3x1": (lambda: with_kernels(Net(), (3, 1)), r"kernels that are not square"),
    "layers defined in another order": (
        lambda: Net(reverse=True),
        r"units\.1 would be residual blocks if .* in which they are defined",
    ),
}
EVERY_SIGN = (
    "squeeze-and|larger than 3x3|no norm after it|PReLU|without scale|not square|"
    "connected layer without bias|beside others without"
)


@pytest.mark.parametrize("case", SEEN)
def test_what_is_seen_is_named_and_nothing_else(case):
    make, words = SEEN[case]
    with pytest.raises(CheckpointError, match=words) as caught:
        from_torch(make().state_dict())
    others = set(re.findall(EVERY_SIGN, str(caught.value)))
    assert len(others) <= 1, others
    assert "Check that it is the right file" not in str(caught.value)
    assert ("flax-resblock port net.py:Net weights.pth out" in str(caught.value)) == bool(others)
    assert from_torch(Net().state_dict(), assume="known").config.depths == (1, 2)  # the control


@pytest.mark.slow
def test_the_command_that_a_refusal_advises_converts_the_network(tmp_path, monkeypatch):
    case = "squeeze of convolutions"
    monkeypatch.chdir(tmp_path)
    code = f"""
from parity_tests.test_refusals import SEEN

def Net():
    return SEEN[{case!r}][0]()
"""
    (tmp_path / "net.py").write_text(code)
    net = SEEN[case][0]().eval()
    torch.save(net.state_dict(), "weights.pth")
    with pytest.raises(CheckpointError) as caught:
        from_torch(net.state_dict())
    (advice,) = re.findall(r"`flax-resblock (port .*?)`", str(caught.value))
    assert run(advice.split()) == 0
    assert (tmp_path / "out" / "parity.json").exists()


class Half(nn.Module):
    """A network in one part of a module; ``more`` are the other parts, by name."""

    def __init__(self, place, network, **more):
        super().__init__()
        home = self
        for name in place.split(".")[:-1]:
            home.add_module(name, nn.Module())
            home = home.get_submodule(name)
        home.add_module(place.rpartition(".")[2], network)
        for name, layer in more.items():
            self.add_module(name, layer)


def headless():
    return Net(head=nn.Identity())


def mlp():
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))


PARTS = {
    "an MLP beside it": (lambda: Half("body", headless(), top=mlp()), ["body"]),
    "two heads": (
        lambda: Half("body", headless(), age=nn.Linear(16, 2), size=nn.Linear(16, 2)),
        ["body"],
    ),
    "a convolution after it": (
        lambda: Half("enc.0", headless(), out=nn.Conv2d(16, 1, 1)),
        ["enc.0"],
    ),
    "two networks": (lambda: Half("rgb", Net(), depth=Net()), ["rgb", "depth"]),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_network_among_other_tensors_is_found_and_the_advice_reads_it(case):
    make, places = PARTS[case]
    torch.manual_seed(0)
    model = make()
    with pytest.raises(CheckpointError, match="is no residual network as a whole") as caught:
        from_torch(model.state_dict())
    message = str(caught.value)
    assert re.findall(r"It holds .* under '(.*?)\.'", message) == places
    advised = re.findall(r"or save (model\..*)\.state_dict\(\) in PyTorch", message)
    assert len(advised) == len(places)
    for place, code in zip(places, advised, strict=True):
        part = eval(code, {"model": model})
        assert part is model.get_submodule(place)
        assert from_torch(part.state_dict(), assume="known").config.depths == (1, 2)
        has_head = isinstance(part.answer, nn.Linear)
        assert (
            f"under '{place}.', which {'has a head' if has_head else 'returns pooled'}" in message
        )


def test_an_mlp_in_the_place_of_the_head_is_named_and_the_advice_reads_the_rest():
    network = ResNet(depths=(1, 1), widths=(6, 10), stem_width=4, num_classes=3)
    network.fc = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(
        CheckpointError, match=r"2 fully connected layers: fc\.0, fc\.2\..*torch\.nn\.Identity"
    ):
        from_torch(network.state_dict())
    network.fc = nn.Identity()
    assert from_torch(network.state_dict(), assume="known").head is None


class Letters(nn.Module):
    """A bottleneck whose projection and norms are defined between the others."""

    def __init__(self, inside, out, stride=1):
        super().__init__()
        width = out // 4
        self.a = nn.Conv2d(inside, width, 1, bias=False)
        self.b = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.d = nn.Conv2d(inside, out, 1, stride, bias=False)
        self.c = nn.Conv2d(width, out, 1, bias=False)
        for name, channels in (("a", width), ("b", width), ("d", out), ("c", out)):
            norm = nn.BatchNorm2d(channels)
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            self.add_module(f"n{name}", norm)

    def forward(self, x):
        y = F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))))
        return F.relu(self.nc(self.c(y)) + self.nd(self.d(x)))


def lettered(inside):
    torch.manual_seed(1)
    stem = [nn.Conv2d(3, inside, 3, 1, 1, bias=False), nn.BatchNorm2d(inside), nn.ReLU()]
    blocks = [Letters(inside, 16), Letters(16, 32, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


def outputs(module, model, size=(12, 14)):
    images = np.random.default_rng(0).normal(0.3, 1, (2, *size, 3)).astype(np.float32)
    truth = torch_output(module, images)
    return output(model, images), truth


def test_norms_belong_to_convolutions_in_the_order_of_their_definition():
    module = lettered(8)
    assert relative_l2(*outputs(module, from_torch(module.state_dict(), assume="known"))) < 1e-5


def test_rival_readings_are_shown():
    """With as many channels in front as inside, the projection may be the last convolution."""
    with pytest.raises(CheckpointError) as caught:
        from_torch(lettered(4).state_dict())
    (line,) = (line for line in str(caught.value).splitlines() if "can be read as" in line)
    assert line.startswith("3 can be read as conv1 = 3.a, conv2 = 3.b, conv3 = 3.")
    assert {"conv3 = 3.c, shortcut.conv = 3.d", "conv3 = 3.d, shortcut.conv = 3.c"} <= set(
        re.findall(r"conv3 = 3\.\w, shortcut\.conv = 3\.\w", line)
    )
    assert "`naming=flax_resblock.Naming(...)`" in line


def test_order_that_names_do_not_tell_is_said():
    state = Net().state_dict()
    stem = {key: state.pop(key) for key in list(state) if key.startswith("first")}
    with pytest.raises(CheckpointError, match="the stem first is defined after them"):
        from_torch({**state, **stem})


@pytest.mark.parametrize("widths", [(8, 16), (8, 8)], ids=["shown", "not shown"])
def test_norms_defined_before_their_convolutions_are_read_where_channels_show_the_order(widths):
    """Where no block changes the channels, it could be pre-activation order."""
    state = Net(stages=widths).state_dict()
    keys = sorted(state, key=lambda key: (key.split(".")[:2], "norm" not in key))
    units = [key for key in keys if key.startswith("units")]
    order = [key for key in state if key.startswith("first")] + units
    moved = {key: state[key] for key in [*order, "answer.weight", "answer.bias"]}
    assert "norm" in units[0]
    if widths[0] == widths[1]:
        with pytest.raises(CheckpointError, match="defined before the convolutions, as in pre-act"):
            from_torch(moved)
        from_torch(state, assume="known")  # the control
        return
    one, other = (from_torch(each, assume="known") for each in (moved, state))
    images = np.random.default_rng(0).normal(0, 1, (2, 9, 9, 3)).astype(np.float32)
    assert np.array_equal(output(one, images), output(other, images))


class Averaged(nn.Module):
    """A projection behind an average pool, as ResNet-D has it; made for images of even size."""

    def __init__(self, inside, out, stride=1):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.match = nn.Sequential()
        if stride > 1:
            pool, conv = nn.AvgPool2d(2), nn.Conv2d(inside, out, 1, bias=False)
            self.match = nn.Sequential(pool, conv, nn.BatchNorm2d(out))

    def forward(self, x):
        return F.relu(self.body(x) + self.match(x))


def averaged():
    torch.manual_seed(2)
    stem = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    blocks = [Averaged(4, 4), Averaged(4, 8, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def test_a_projection_behind_a_layer_without_tensors_is_pooled():
    module = averaged()
    for source in (module.state_dict(), module):
        model = from_torch(source, assume="known")
        assert model.config.shortcut == "pooled"
        assert relative_l2(*outputs(module, model, (8, 12))) < 1e-5


FILES = {
    "scripted.pt": lambda path: torch.jit.script(nn.Conv2d(3, 4, 1)).save(path),
    "exported.pt2": lambda path: torch.export.save(
        torch.export.export(nn.Conv2d(3, 4, 1), (torch.zeros(1, 3, 4, 4),)), path
    ),
}
WEIGHTS = {
    "scripted.pt": ("TorchScript", "torch.jit.load('scripted.pt').state_dict()"),
    "exported.pt2": ("torch.export", "torch.export.load('exported.pt2').state_dict"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_a_program_is_named_and_the_advice_gives_its_weights(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    FILES[name](name)
    writer, weights = WEIGHTS[name]
    with pytest.raises(
        CheckpointError, match=f"is a {re.escape(writer)} archive, a program"
    ) as caught:
        checkpoint.read(name)
    assert f"torch.save({weights}, 'weights.pth')" in str(caught.value)
    torch.save(eval(weights, {"torch": torch}), "weights.pth")
    assert set(checkpoint.read("weights.pth").tensors) == {"weight", "bias"}


@pytest.mark.parametrize("entry", ["", "optimizer"])
def test_an_optimizer_alone_is_named(entry, tmp_path, capsys):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net.first.weight.grad = torch.ones_like(net.first.weight)
    optimizer.step()
    state = optimizer.state_dict()
    torch.save({entry: state, "epoch": 3} if entry else state, tmp_path / "run.pth")
    assert run(["inspect", str(tmp_path / "run.pth")]) == 2
    text = " ".join(capsys.readouterr().err.split())
    where = " in its entry optimizer" if entry else ""
    assert f"holds the state of an optimizer{where}, and no weights" in text


def test_a_whole_model_is_named_and_the_advice_gives_its_weights(tmp_path):
    model = nn.Sequential(nn.Linear(2, 3))
    for name, content in (("a.pth", model), ("b.pth", {"model": model, "epoch": 3})):
        torch.save(content, tmp_path / name)
        with pytest.raises(CheckpointError, match=r"a whole model.*save model\.state_dict\(\)"):
            checkpoint.read(tmp_path / name)
    torch.save(model.state_dict(), tmp_path / "c.pth")
    assert set(checkpoint.read(tmp_path / "c.pth").tensors) == {"0.weight", "0.bias"}


def test_many_tensors_are_refused_in_little_time():
    """What is looked for in a file of many layers takes time in proportion."""

    def seconds(number):
        state = {}
        for i in range(number):
            state[f"a.{i}.c.weight"] = np.zeros((4, 4, 3, 3), np.float32)
            state[f"a.{i}.d.weight"] = np.zeros((4, 4, 3, 3), np.float32)
            for name in ("weight", "bias", "running_mean", "running_var"):
                state[f"a.{i}.n.{name}"] = np.ones(4, np.float32)
        start = time.process_time()
        with pytest.raises(CheckpointError):
            from_torch(state)
        return time.process_time() - start

    seconds(10)
    assert seconds(1000) < 40 * max(seconds(100), 0.05)
