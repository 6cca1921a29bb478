"""A module that computes something else than the Flax network is refused as that network;
test_ported_models.py tests what from_torch makes of it then."""

import random
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torch_ref
from flax_resblock import InputError, from_torch
from flax_resblock.cli import run
from flax_resblock.convert.opening import ReadOptions
from flax_resblock.parity.live_module import open_module
from parity_tests.support import fast_only

# No model here may be a port.
pytestmark = pytest.mark.filterwarnings("error::flax_resblock.PortedWarning")

WIDTHS = (8, 12)


class Unit(nn.Module):
    """A basic block with torchvision's names; what leaves no tensor is an argument."""

    def __init__(self, cin, cout, stride=1, *, act=F.relu, skip=True, option_a="", preact=False):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.act, self.skip, self.preact = act, skip, preact
        self.stride, self.extra, self.option_a = stride, cout - cin, option_a
        changes = stride != 1 or cin != cout
        self.downsample = None
        if changes and not option_a:
            projection = nn.Conv2d(cin, cout, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(cout))

    def shortcut(self, x):
        if self.option_a:
            front = {"behind": 0, "both": self.extra // 2}[self.option_a]
            x = x[:, :, :: self.stride, :: self.stride]
            return F.pad(x, (0, 0, 0, 0, front, self.extra - front))
        return x if self.downsample is None else self.downsample(x)

    def forward(self, x):
        if self.preact:
            return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + x
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        return self.act(y + self.shortcut(x) if self.skip else y)


class Net(nn.Module):
    """Two stages under torchvision's names, with a 3x3 stem."""

    def __init__(
        self,
        *,
        widths=WIDTHS,
        second_stride=2,
        pool_stem=False,
        head=None,
        zero_init=False,
        **choices,
    ):
        super().__init__()
        first, second = widths
        self.act = choices.get("act", F.relu)
        self.pool_stem = pool_stem
        self.pool_all = head or (lambda x: x.mean((2, 3)))
        self.conv1 = nn.Conv2d(3, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = nn.Sequential(Unit(first, first, **choices), Unit(first, first, **choices))
        self.layer2 = nn.Sequential(Unit(first, second, second_stride, **choices))
        self.fc = nn.Linear(second, 5)
        if zero_init:
            for module in self.modules():
                if isinstance(module, Unit):
                    nn.init.zeros_(module.bn2.weight)

    def body(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return self.layer2(self.layer1(F.max_pool2d(x, 3, 2, 1) if self.pool_stem else x))

    def forward(self, x):
        return self.fc(self.pool_all(self.body(x)))


def made(factory=Net, seed=0, **choices):
    """A network whose norms look trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = factory(**choices)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.3, generator=generator)
            layer.running_var.uniform_(0.5, 2, generator=generator)
    return module


def global_max(x):
    return F.adaptive_max_pool2d(x, 1).flatten(1)


class InnerLeaky(Unit):
    """Another activation inside the branch only."""

    def forward(self, x):
        y = F.leaky_relu(self.bn1(self.conv1(x)), 0.1)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def zero_branches_and_inner_leaky():
    net = made(zero_init=True)
    for block in (*net.layer1, *net.layer2):
        block.__class__ = InnerLeaky
    return net


class Mirrored(Net):
    """Reflecting padding, done by hand."""

    def forward(self, x):
        self.conv1.padding = (0, 0)
        try:
            return super().forward(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        finally:
            self.conv1.padding = (1, 1)


class Softmaxed(Net):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class ImageNetMax(torch_ref.ResNet):
    """A global max pool behind a stride of 32, where small images leave a single pixel."""

    def forward(self, images):
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.amax((2, 3)))


class PaddedBefore(Net):
    """A layer pads in front of a convolution that does not."""

    def __init__(self, **choices):
        super().__init__(**choices)
        self.pad, self.conv1.padding = nn.ConstantPad2d(1, 0.0), (0, 0)

    def body(self, x):
        return super().body(self.pad(x))


def pooled_with_ceil():
    """At 32x32 pixels a max pool that rounds up gives what one that rounds down does."""
    net = made(torch_ref.ResNet, **IMAGENET)
    net.maxpool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
    return net


class Frozen(nn.Module):
    """A norm whose statistics and affine map are constants, as detectors have; without momentum."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.1), ("bias", 0.1), ("running_mean", 0.2)):
            self.register_buffer(name, torch.full((channels,), value))
        self.register_buffer("running_var", torch.full((channels,), 0.7))
        self.eps = 1e-5

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class Checkpointed(nn.Module):
    """Around single blocks, as PyTorch's activation checkpointing and FSDP put it."""

    def __init__(self, inner):
        super().__init__()
        self._checkpoint_wrapped_module = inner

    def forward(self, x):
        return self._checkpoint_wrapped_module(x)


def with_wrapped_blocks():
    net = made()
    net.layer1[1], net.layer2[0] = Checkpointed(net.layer1[1]), Checkpointed(net.layer2[0])
    return net


def frozen():
    net = made()
    for parent in [*net.modules()]:
        for name, child in [*parent.named_children()]:
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, Frozen(child.num_features))
    return net


def as_network(module):
    """Reads the module as a network of this library, as from_torch does first."""
    return open_module(module, ReadOptions())


IMAGENET = {"depths": (1, 1, 1, 1), "widths": (4, 4, 4, 4), "stem_width": 4, "num_classes": 3}

WRONG = {
    "leaky relu": lambda: made(act=lambda x: F.leaky_relu(x, 0.1)),
    "gelu": lambda: made(act=F.gelu),
    "pre-activation of constant width": lambda: made(widths=(8, 8), second_stride=1, preact=True),
    "reflecting padding": lambda: made(Mirrored),
    "a softmax": lambda: made(Softmaxed),
    "another activation hidden by branches of zero": zero_branches_and_inner_leaky,
    "another activation hidden by a head of zero": lambda: zero_head(made(act=F.gelu)),
}
RIGHT = {
    "a max head": lambda: made(head=global_max),
    "a max head after a stride of 32": lambda: made(ImageNetMax, **IMAGENET),
    "zeros of option A behind": lambda: made(option_a="behind"),
    "no shortcuts": lambda: made(widths=(8, 8), second_stride=1, skip=False),
    "projections": made,
    "max pooling after a 3x3 stem": lambda: made(pool_stem=True),
    "option A": lambda: made(option_a="both"),
    "constant width": lambda: made(widths=(8, 8), second_stride=1),
    "branches of zero": lambda: made(zero_init=True),
    "a head of zero": lambda: zero_head(made()),
    "an ImageNet stem": lambda: made(torch_ref.ResNet, **IMAGENET),
    "bottlenecks": lambda: made(torch_ref.ResNet, block="bottleneck", **IMAGENET),
    "float64": lambda: made().double(),
    "bfloat16": lambda: made().bfloat16(),
    "DataParallel": lambda: nn.DataParallel(made()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(made()),
    "padding in a layer of its own": lambda: made(PaddedBefore),
    "frozen norms without momentum": frozen,
    "wrappers around single blocks": with_wrapped_blocks,
}
QUICK = {
    *("leaky relu", "another activation hidden by branches of zero", "no shortcuts"),
    *("branches of zero", "an ImageNet stem", "padding in a layer of its own"),
    *("frozen norms without momentum", "wrappers around single blocks"),
}


def zero_head(net):
    nn.init.zeros_(net.fc.weight)
    return net


@pytest.mark.parametrize("case", fast_only(QUICK, WRONG))
def test_a_network_that_computes_something_else_is_refused(case):
    with pytest.raises(
        InputError,
        match=r"does not compute what .*the outputs differ by up to",
    ) as caught:
        as_network(WRONG[case]())
    message = str(caught.value)
    assert "\n" not in message
    assert ("64x64" if "32" in case else "32x32") in message
    assert ("with random weights" in message) == ("hidden" in case)


@pytest.mark.parametrize("case", fast_only(QUICK, RIGHT))
def test_a_network_that_computes_the_same_passes(case):
    from_torch(RIGHT[case]())


def test_a_pool_that_differs_at_other_sizes_only_is_refused():
    """It is equal at the size that is tried first; what the layer declares is the explanation."""
    with pytest.raises(InputError, match=r"stem\.pool is MaxPool2d\(.*ceil_mode=True"):
        as_network(pooled_with_ceil())


def test_layers_that_no_option_describes_are_listed_as_they_are():
    """The stride on the second convolution; no layer that the module does not have is named."""
    net = made()
    net.layer2[0].conv1.stride, net.layer2[0].conv2.stride = (1, 1), (2, 2)
    with pytest.raises(
        InputError, match=r"stage2\.0\.conv2 has .*this library has no such"
    ) as caught:
        as_network(net)
    assert "blur" not in str(caught.value).lower()


def test_norms_that_train_otherwise_are_refused():
    """In evaluation mode they compute the same."""
    net = made()
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    norm.load_state_dict(net.bn1.state_dict())
    net.bn1 = norm
    with pytest.raises(InputError, match=r"stem\.norm is InstanceNorm2d, which normalises each"):
        as_network(net)


def test_options_of_the_result_do_not_change_the_comparison():
    import jax.numpy as jnp

    assert from_torch(made(), dtype=jnp.bfloat16, eps=1e-3).stem.norm.eps == 1e-3
    with pytest.raises(InputError, match="does not compute"):
        from_torch(made(act=F.gelu), dtype=jnp.bfloat16)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("block", [torch_ref.Block, torch_ref.BasicBlock, torch_ref.Bottleneck])
@pytest.mark.slow
def test_a_bare_block_is_run_on_feature_maps(block, stride):
    from_torch(block(8, 8, stride))
    wrong = type("Wrong", (block,), {"forward": lambda self, x: block.forward(self, x) * 1.01})
    with pytest.raises(InputError, match="feature maps of 32x32"):
        as_network(wrong(8, 8, stride))


class Watched(Net):
    """Remembers every size that it was given, and raises at those that do not suit it."""

    def __init__(self, suits, **choices):
        super().__init__(**choices)
        self.suits, self.seen = suits, []

    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    def forward(self, x):
        self.seen.append(x.shape[-1])
        if x.shape[-1] not in self.suits:
            raise ValueError(f"expects {self.suits}, got {x.shape[-1]}")
        return super().forward(x)


@pytest.mark.parametrize(
    ("suits", "tried"), [((32, 64, 224), [32]), ((64, 224), [32, 64]), ((224,), [32, 64, 224])]
)
@pytest.mark.slow
def test_larger_images_are_tried_where_small_ones_raise(suits, tried):
    module = made(Watched, suits=suits)
    from_torch(module)
    assert list(dict.fromkeys(module.seen)) == tried
    with pytest.raises(InputError, match=f"{tried[-1]}x{tried[-1]}"):
        as_network(made(Watched, suits=suits, act=F.gelu))


def test_a_module_that_never_runs_is_refused_with_what_it_raised():
    with pytest.raises(
        InputError,
        match=r"32x32 raises ValueError: expects \(\), got 32; 64x64 raises .*224x224 raises",
    ):
        from_torch(made(Watched, suits=()))


class Wrapped(Net):
    """Returns what ``wrap`` makes of the logits."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


class Output:
    def __init__(self, logits):
        self.logits = logits


@pytest.mark.parametrize(
    "wrap",
    [
        Output,
        lambda x: (x,),
        lambda x: {"out": x},
        lambda x: OrderedDict(logits=x, probabilities=x.softmax(-1)),
    ],
)
@pytest.mark.slow
def test_the_obvious_tensor_of_another_output_is_taken(wrap):
    from_torch(made(Wrapped, wrap=wrap))
    with pytest.raises(InputError, match="does not compute"):
        as_network(made(Wrapped, wrap=lambda x: wrap(2 * x)))


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda x: (x, 2 * x), r"returns 2 tensors of the same shape, \[2, 5\]"),
        (lambda x: x[:, :3], r"returns \[2, 3\], and custom basic ResNet.* returns \[2, 5\]"),
        (lambda x: "logits", "returns no tensor at all"),
    ],
)
def test_an_output_that_cannot_be_compared_is_refused(wrap, message):
    with pytest.raises(InputError, match=message):
        as_network(made(Wrapped, wrap=wrap))


class Backbone(nn.Module):
    """Features beside a projector, as contrastive training has them."""

    def __init__(self, **choices):
        super().__init__()
        self.encoder = Net(**choices)
        self.encoder.fc = nn.Identity()
        self.projector = nn.Sequential(nn.Linear(WIDTHS[-1], 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x):
        return self.projector(self.encoder(x))


def test_the_converted_part_of_a_larger_module_is_compared():
    assert from_torch(made(Backbone)).head is None
    with pytest.raises(InputError, match="does not compute"):
        as_network(made(Backbone, act=F.gelu))


def test_what_a_dropped_head_is_given_is_compared():
    assert from_torch(made(), ignore=["fc.*"]).head is None
    with pytest.raises(InputError, match="does not compute"):
        from_torch(made(act=F.gelu), ignore=["fc.*"])


def test_a_feature_map_is_compared_where_there_is_no_head():
    class Body(Net):
        def __init__(self, **choices):
            super().__init__(**choices)
            del self.fc

        def forward(self, x):
            return self.body(x)

    from_torch(made(Body))
    with pytest.raises(InputError, match="does not compute"):
        as_network(made(Body, act=F.gelu))


def test_weights_that_are_not_finite_do_not_hide_a_difference():
    def broken(**choices):
        net = made(**choices)
        with torch.no_grad():
            net.conv1.weight[0, 0, 0, 0] = torch.nan
        return net

    with pytest.warns(UserWarning, match="carried as they are"):
        from_torch(broken())
    with pytest.raises(InputError, match="does not compute"):
        as_network(broken(act=F.gelu))


class Restless(Net):
    """Draws random numbers and changes a buffer when it runs; with a lock it cannot be copied."""

    def __init__(self, locked=False, wrong=False):
        super().__init__()
        self.lock = threading.Lock() if locked else None
        self.wrong = wrong
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(3), persistent=False)

    def forward(self, x):
        torch.rand(1), np.random.rand(), random.random()
        self.calls += 1
        return self.dropout(super().forward(x)) + self.wrong


@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
@pytest.mark.parametrize("locked", [False, True], ids=["copied", "restored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.slow
def test_the_module_and_every_random_state_stay_as_they_were(dtype, locked, wrong):
    module = made(Restless, locked=locked, wrong=wrong).to(dtype)
    module.train()
    module.layer1.eval()
    module.conv1.weight.requires_grad_(False)
    module.fc.weight.grad = torch.ones_like(module.fc.weight)
    module.fc.register_forward_hook(lambda *_: None)

    def facts():
        values = {}
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            bits = t.detach().numpy().tobytes()
            values[name] = (id(t), t.data_ptr(), t.dtype, t.device, t.requires_grad, bits)
        modes = {}
        for name, part in module.named_modules():
            hooks = list(part._forward_hooks), list(part._forward_pre_hooks)
            modes[name] = (part.training, hooks)
        drawn = (
            torch.get_rng_state().numpy().tobytes(),
            str(np.random.get_state()),
            random.getstate(),
        )
        return (
            values,
            list(module.state_dict()),
            modes,
            drawn,
            torch.is_grad_enabled(),
            module.fc.weight.grad.sum().item(),
        )

    before = facts()
    if wrong:
        with pytest.raises(InputError, match="does not compute"):
            from_torch(module)
    else:
        from_torch(module)
    assert facts() == before
    module(torch.zeros(2, 3, 32, 32, dtype=dtype)).sum().backward()
    assert module.layer1[0].conv1.weight.grad is not None


def test_a_module_that_converts_to_float32_itself_passes():
    class Converting(Net):
        def forward(self, x):
            return super().forward(x.float())

    from_torch(made(Converting))


class Leaky(Net):
    """For the command line."""

    def __init__(self):
        super().__init__(act=lambda x: F.leaky_relu(x, 0.1))


@pytest.mark.slow
def test_the_advice_of_the_message_finds_the_layer(capsys):
    spec = f"{__file__}:Leaky"
    assert run(["verify", "--torch", spec, "--eval-only", "--precision", "float64"]) == 1
    assert "PyTorch applies LeakyReLU(0.1)" in " ".join(capsys.readouterr().out.split())
