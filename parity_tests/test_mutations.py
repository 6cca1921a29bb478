"""Every known fault, on either side, is found and named; correct pairs raise no alarm."""

import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import BatchNorm, BlockConfig, ResNetConfig
from flax_resblock.nn.conv import Conv
from flax_resblock.parity import compare
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.diagnose import diagnose
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from parity_tests.faults import BLOCK, FAULTS, NETWORK, Fault, Faulty, forward_of, rounded_conv
from parity_tests.support import REPOSITORY, fast_only


def injected(fault: Fault, seed: int = 3) -> tuple[Faulty, np.ndarray]:
    """The pair with the fault, and images: another size for a network than for a block."""
    base = ReferencePair.random(fault.config, seed)
    height, width = (37, 28) if isinstance(fault.config, ResNetConfig) else (10, 7)
    images = adversarial_images(fault.config, batch=3, height=height, width=width, seed=seed + 2)
    return Faulty(
        base.config, base.state, base.norm_options, edit=fault.edit, side=fault.side
    ), images


def _cases():
    """Faults of a bare block in every run; those of a network where there is time."""
    for fault in FAULTS:
        yield pytest.param(
            fault,
            id=f"{fault.name}-{fault.side}",
            marks=[] if isinstance(fault.config, BlockConfig) else [pytest.mark.slow],
        )


@pytest.mark.parametrize("fault", list(_cases()))
def test_a_fault_is_detected_found_and_named(fault):
    pair, images = injected(fault)
    # what evaluation does not show, training must
    train = _passes(pair, images, Plan(train=False, precisions=("float64",)))
    assert not train or not _passes(
        pair, images, Plan(gradients=fault.gradients, precisions=("float64",))
    )
    found = diagnose(pair, images, train=train, gradients=fault.gradients)
    assert (found[0].slot, found[0].side) == (fault.slot, fault.side), found
    assert found[0].cause == fault.cause, found


def _passes(pair, images, plan) -> bool:
    try:
        return compare_pair(pair, images, plan).passed
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # shapes that do not even meet are a detection too
        if "shape" not in str(error) and "size" not in str(error):
            raise
        return False


QUANTITIES = {
    "same-padding": "eval forward",
    "stride": "eval forward",
    "swapped-tensor": "eval forward",
    "eps": "eval forward",
    "momentum-complement": "running statistics",
    "biased-variance": "running statistics",
}


@pytest.mark.slow
@pytest.mark.parametrize("cause", QUANTITIES)
def test_a_wrong_variant_fails_by_a_hundred_times_the_limit(cause):
    pair, images = injected(next(f for f in FAULTS if (f.cause, f.side) == (cause, "flax")))
    rows = [m for m in compare_pair(pair, images).measurements if m.quantity == QUANTITIES[cause]]
    for precision in ("float64", "float32"):
        assert max(m.verdict.excess for m in rows if m.precision == precision) >= 100


def test_the_table_of_the_docs_lists_exactly_these_faults():
    text = (REPOSITORY / "docs" / "verification.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == 5]
    listed = [tuple(cell.strip().strip("`") for cell in row.strip("|").split("|")) for row in rows]
    sides = {"flax": "Flax", "torch": "PyTorch"}
    assert [row for row in listed if row[1] in sides.values()] == [
        (f.name, sides[f.side], f.slot, f.cause) for f in FAULTS
    ]


@pytest.mark.slow
def test_without_a_fault_nothing_is_diagnosed():
    """The negative control of every diagnosis."""
    for config in (BLOCK, NETWORK):
        pair, images = injected(Fault("none", "flax", lambda _: None, None, None, config))
        assert diagnose(pair, images, gradients=True, precisions=("float32", "bfloat16")) == []


@pytest.mark.parametrize("bits", fast_only([7], [7, 10]))
def test_narrow_arithmetic_that_float64_does_not_have_is_named(bits):
    """TF32 and bfloat16 show only where float32 is asked for: on a GPU or TPU float64 is right."""

    class Narrow(Faulty):
        def flax(self, precision):
            model = ReferencePair.flax(self, precision)
            if precision.name == "float32":
                self.edit(model)
            return model

    base = ReferencePair.random(BLOCK, 1)
    pair = Narrow(
        base.config,
        base.state,
        base.norm_options,
        edit=forward_of(Conv, rounded_conv(bits), "conv2"),
    )
    images = adversarial_images(BLOCK, batch=3, seed=4)
    comparison = compare_pair(pair, images, Plan(train=False))
    assert {m.precision for m in comparison.measurements if not m.verdict.passed} == {"float32"}
    (found,) = diagnose(pair, images, train=False, precisions=("float32",))
    assert (found.slot, found.cause, found.side) == ("conv2", "reduced-precision", "flax")
    assert f"{bits} mantissa bits" in found.sentence


class Opaque(torch.nn.Module):
    """A block whose layers cannot be hooked: a function over the tensors of its state dict."""

    def __init__(self, block, kernel_of=lambda kernel: kernel):
        super().__init__()
        for name, value in block.state_dict(keep_vars=True).items():
            home = self
            for part in name.split(".")[:-1]:
                if part not in dict(home.named_children()):
                    home.add_module(part, torch.nn.Module())
                home = getattr(home, part)
            home.register_parameter(
                name.rpartition(".")[2], value
            ) if value.requires_grad else home.register_buffer(name.rpartition(".")[2], value)
        self.kernel_of = kernel_of

    def forward(self, x):
        def norm(bn, y):
            return torch.nn.functional.batch_norm(
                y, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.1, 1e-5
            )

        y = torch.relu(norm(self.bn1, torch.nn.functional.conv2d(x, self.conv1.weight, padding=1)))
        return torch.relu(
            norm(
                self.bn2,
                torch.nn.functional.conv2d(y, self.kernel_of(self.conv2.weight), padding=1),
            )
            + x
        )


@pytest.mark.slow
def test_where_only_outputs_can_be_seen_the_layer_is_found_by_bisection():
    base = ReferencePair.random(BLOCK, 1)
    images = adversarial_images(BLOCK, batch=2, seed=4)
    for kernel_of, expected in ((lambda k: k.flip(2), ["conv2"]), (lambda k: k, [])):
        module = Opaque(base.torch(PRECISIONS["float32"]), kernel_of)
        found = diagnose(ReferencePair(BLOCK, base.state, {}, module=module), images, train=False)
        assert [d.slot for d in found] == expected
        assert all("silen" in d.evidence and d.side == "torch" for d in found)


def _random_case(number: int):
    rng = np.random.default_rng([7, number])
    kind = ("basic", "bottleneck")[number % 2]
    widths = [int(4 * rng.integers(1, 4)) for _ in range(2)]
    stride, dilation = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    groups = int(rng.choice([1, 2])) if number % 3 else 1
    if number % 5 == 4:
        stem = ("cifar", "imagenet")[number // 5 % 2]
        channels, classes = int(rng.integers(1, 5)), [None, 3, 11][number % 3]
        config = ResNetConfig(
            block=kind,
            depths=(1, 1),
            widths=tuple(widths),
            stem=stem,
            stem_width=4,
            in_channels=channels,
            num_classes=classes,
        )
    else:
        expansion = 1 if kind == "basic" else 4
        settings = {
            "kind": kind,
            "stride": stride,
            "dilation": dilation,
            "groups": groups,
            "shortcut": "projection" if number % 4 else "zero_pad",
        }
        config = BlockConfig(
            in_channels=widths[0], out_channels=max(widths) * expansion, **settings
        )
    size = {"height": int(rng.integers(7, 40)), "width": int(rng.integers(7, 40))}
    options = {"eps": float(rng.choice([1e-5, 1e-3])), "momentum": [0.1, 0.37, None][number % 3]}
    precisions = (("float64",), ("float32",), ("bfloat16",), ("float64", "float32"))[number % 4]
    plan = Plan(
        gradients=number % 3 == 0,
        isolated=number % 5 == 0,
        steps=3 if number % 10 == 1 else 0,
        precisions=precisions,
    )
    return config, size, options, plan


@pytest.mark.slow
@pytest.mark.parametrize("number", range(15))
def test_a_correct_pair_raises_no_alarm(number):
    config, size, options, plan = _random_case(number)
    images = adversarial_images(config, batch=2 + number % 3, seed=number, **size)
    comparison = compare_pair(ReferencePair.random(config, number, **options), images, plan)
    failed = [m for m in comparison.measurements if not m.verdict.passed]
    assert not failed, (config, failed[:3])


class TorchNet(torch.nn.Module):
    """A network that this project has no name for."""

    def __init__(self):
        super().__init__()
        self.c1 = torch.nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.b1 = torch.nn.BatchNorm2d(8)
        self.c2 = torch.nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = torch.nn.Linear(8 * 4 * 4, 5)

    def forward(self, x):
        x = torch.relu(self.c2(torch.relu(self.b1(self.c1(x)))))
        return self.fc(x.flatten(1))


class FlaxNet(nnx.Module):
    """Its port, with mistakes to choose."""

    def __init__(
        self,
        *,
        padding=1,
        order=(0, 3, 1, 2),
        activation=nnx.relu,
        eps=1e-5,
        channels=slice(None),
        dilation=1,
    ):
        rngs = nnx.Rngs(0)
        self.c1 = nnx.Conv(3, 8, (3, 3), strides=2, padding=padding, use_bias=False, rngs=rngs)
        self.b1 = BatchNorm(8, eps=eps, rngs=rngs)
        self.c2 = nnx.Conv(8, 8, (3, 3), padding=dilation, kernel_dilation=dilation, rngs=rngs)
        self.fc = nnx.Linear(128, 5, rngs=rngs)
        self.order, self.activation, self.channels = order, activation, channels

    def __call__(self, x):
        x = self.activation(self.b1(self.c1(x[..., self.channels])))
        x = nnx.relu(self.c2(x)).transpose(self.order)
        return self.fc(x.reshape(len(x), -1))


PORTS = {
    "a right one": ({}, None),
    "'SAME' at stride 2": ({"padding": "SAME"}, ("c1", "same-padding")),
    "flattened as NHWC": ({"order": (0, 1, 2, 3)}, ("fc", "flatten-order")),
    "SiLU": ({"activation": nnx.silu}, ("c2", "other-activation")),
    "no ReLU": ({"activation": lambda x: x}, ("c2", "missing-relu")),
    "another eps": ({"eps": 1e-3}, ("b1", "eps")),
    "BGR": ({"channels": slice(None, None, -1)}, ("c1", "reversed-channels")),
    "dilation": ({"dilation": 2}, ("c2", "dilation")),
}


@pytest.mark.parametrize("port", fast_only(["BGR"], PORTS))
def test_a_mistake_in_a_port_of_an_unknown_network_is_named(port):
    mistakes, expected = PORTS[port]
    norm = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    norm["num_batches_tracked"] = "num_batches_tracked"
    table = {f"{layer}.weight": f"{layer}.kernel" for layer in ("c1", "c2", "fc")}
    table |= {f"{layer}.bias": f"{layer}.bias" for layer in ("c2", "fc")}
    table |= {f"b1.{theirs}": f"b1.{ours}" for theirs, ours in norm.items()}
    images = np.random.default_rng(2).normal(0.3, 1.5, (3, 8, 8, 3))
    options = {"state_map": table, "copy_weights": True, "precisions": ("float64",)}
    found = compare(TorchNet(), FlaxNet(**mistakes), images, **options)
    assert [(d.slot, d.cause, d.side) for d in found.diagnosis] == (
        [] if expected is None else [(*expected, "flax")]
    )
    assert found.passed == (expected is None)


OTHER_NORMS = {
    "GroupNorm": (
        lambda eps: torch.nn.GroupNorm(2, 8, eps=eps),
        lambda eps: nnx.GroupNorm(8, num_groups=2, epsilon=eps, rngs=nnx.Rngs(0)),
        (3, 6, 5, 8),
    ),
    "LayerNorm": (
        lambda eps: torch.nn.LayerNorm(8, eps=eps),
        lambda eps: nnx.LayerNorm(8, epsilon=eps, rngs=nnx.Rngs(0)),
        (7, 8),
    ),
}


@pytest.mark.parametrize("eps", fast_only([1e-3], [1e-6, 1e-3]))
@pytest.mark.parametrize("kind", fast_only(["GroupNorm"], OTHER_NORMS))
def test_another_eps_of_a_norm_without_running_statistics_is_named(kind, eps):
    """And not taken for narrow arithmetic, whose errors have about that size."""
    torch_norm, flax_norm, shape = OTHER_NORMS[kind]
    images = np.random.default_rng(0).normal(0.4, 0.1, shape)
    table = {"0.weight": "layers.0.scale", "0.bias": "layers.0.bias"}
    found = []
    for ours in (eps, 1e-5):  # the second is the control
        pair = torch.nn.Sequential(torch_norm(1e-5)), nnx.Sequential(flax_norm(ours))
        torch.nn.init.uniform_(pair[0][0].weight, 0.5, 1.5)
        options = {"state_map": table, "copy_weights": True, "precisions": ("float64",)}
        found.append([(d.cause, d.side) for d in compare(*pair, images, **options).diagnosis])
    assert found == [[("eps", "flax")], []]
