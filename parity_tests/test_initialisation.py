"""Fresh weights come from PyTorch's distributions; architectures that make no sense are refused."""

from collections import Counter

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from flax.errors import TraceContextError
from jax.sharding import NamedSharding, PartitionSpec

import torch_ref
from flax_resblock import (
    BlockConfig,
    BottleneckBlock,
    ResidualBlock,
    ResNetConfig,
    architectures,
    create,
)
from flax_resblock.config import architecture, from_json, to_json, walk
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.initializers import INITIALIZERS
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.resnet import ResNet
from flax_resblock.parity.battery import BATTERY

SIGNIFICANT = 1e-4
"""p-value below which two samples are said to come from different distributions; the seeds are
fixed, so nothing here is left to chance.
"""


COMPILED: Counter[str] = Counter()
"""How often jax has compiled something, by event."""


def _count(event: str, _: float, **__: str | int) -> None:
    COMPILED.update([event] if "backend_compile" in event else [])


jax.monitoring.register_event_duration_secs_listener(_count)


def same_distribution(ours, theirs) -> bool:
    from scipy import stats  # slow to import

    return stats.ks_2samp(np.asarray(ours).ravel(), np.asarray(theirs).ravel()).pvalue > SIGNIFICANT


def test_a_bare_block_starts_as_nn_conv2d_does():
    torch.manual_seed(0)
    theirs, ours = torch_ref.Block(48, 64, 2), ResidualBlock(48, 64, 2, rngs=nnx.Rngs(0))
    pairs = (
        (theirs.block[0], ours.conv1),
        (theirs.block[3], ours.conv2),
        (theirs.skip[0], ours.shortcut.conv),
    )
    for torch_conv, conv in pairs:
        assert same_distribution(conv.kernel[...], torch_conv.weight.detach())
        assert not same_distribution(
            nnx.Conv(48, 64, (3, 3), rngs=nnx.Rngs(0)).kernel[...], torch_conv.weight.detach()
        )


@pytest.mark.parametrize("name", ["basic", "bottleneck"])
def test_a_network_starts_as_torchvisions_do(name):
    settings = {
        "block": name,
        "depths": (1, 1),
        "widths": (32, 64),
        "groups": 1 if name == "basic" else 4,
        "num_classes": 40,
    }
    torch.manual_seed(1)
    theirs, ours = torch_ref.ResNet(**settings), ResNet(ResNetConfig(**settings), rngs=nnx.Rngs(1))
    pairs = {
        "stem": (theirs.conv1.weight, ours.stem.conv.kernel),
        "conv2": (theirs.layer2[0].conv2.weight, ours.stage2[0].conv2.kernel),
        "shortcut": (theirs.layer2[0].downsample[0].weight, ours.stage2[0].shortcut.conv.kernel),
        "head": (theirs.fc.weight, ours.head.kernel),
        "bias": (theirs.fc.bias, ours.head.bias),
    }
    for place, (tensor, variable) in pairs.items():
        assert same_distribution(variable[...], tensor.detach()), place
    assert not same_distribution(
        ours.stage2[0].conv2.kernel[...] * 1.2, theirs.layer2[0].conv2.weight.detach()
    )


@pytest.mark.parametrize("name", INITIALIZERS)
def test_kernels_have_the_moments_and_bounds_of_their_distribution(name):
    """In every dtype, over the border between two blocks, and each value independent of all
    others."""
    init, shape = INITIALIZERS[name], (3, 3, 160, 200)  # more than one block of random numbers
    scale = (9 * 160) ** -0.5 if name == "torch_default" else (2 / (9 * 200)) ** 0.5
    deviation = scale / 3**0.5 if name == "torch_default" else scale
    drawn = {dtype: init(jax.random.key(5), shape, dtype) for dtype in ("float32", "bfloat16")}
    with jax.enable_x64(True):
        drawn["float64"] = init(jax.random.key(5), shape, "float64")
    from scipy import stats

    truth = stats.uniform(-1, 2) if name == "torch_default" else stats.norm()
    for dtype, values in drawn.items():
        assert (values.dtype, values.shape) == (dtype, shape)
        flat = np.asarray(values, np.float64).ravel()
        assert abs(flat.mean()) < 5 * deviation / flat.size**0.5, dtype
        assert abs(flat.std() / deviation - 1) < 0.006, dtype
        if dtype != "bfloat16":
            assert stats.kstest(flat[:50000] / scale, truth.cdf).pvalue > SIGNIFICANT, dtype
            assert stats.kstest(flat[:50000] / scale * 1.05, truth.cdf).pvalue < SIGNIFICANT, dtype
        if name == "torch_default":
            assert abs(flat).max() <= float(np.asarray(scale, values.dtype))
        else:
            assert abs(flat).max() > 4 * scale, "truncated"
    flat = np.asarray(drawn["float32"]).ravel()
    for lag in (1, 200, flat.size // 2, 1 << 18):
        assert abs(np.corrcoef(flat[:-lag], flat[lag:])[0, 1]) < 5 / (flat.size - lag) ** 0.5, lag


def test_no_two_kernels_and_no_two_seeds_share_their_random_numbers():
    config = ResNetConfig(block="basic", depths=(2,), widths=(24,), stem_width=24, num_classes=None)
    models = [ResNet(config, rngs=nnx.Rngs(seed)) for seed in (0, 1, 0)]
    kernels = [
        [np.asarray(block.conv1.kernel[...]).ravel() for block in model.stage1] for model in models
    ]
    (a, b), (c, _), (again, _) = kernels
    np.testing.assert_array_equal(a, again)
    for one, other in ((a, b), (a, c), (b, c)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / a.size**0.5
    rngs = nnx.Rngs(0)
    for _ in range(2):  # a stream goes on
        Linear(3, 2, rngs=rngs)
    assert int(rngs.params.count[...]) == 4


def test_traced_creation_gives_the_same_weights_on_any_number_of_devices():
    def make(rngs) -> ResidualBlock:
        return ResidualBlock(8, 16, 2, rngs=rngs)

    def arrays(made: nnx.Module | nnx.State) -> list[np.ndarray]:
        return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(made, nnx.Param))]

    def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
        return all(np.array_equal(*pair) for pair in zip(one, other, strict=True))

    eager = arrays(make(nnx.Rngs(3)))
    assert same(eager, arrays(nnx.jit(lambda: make(nnx.Rngs(3)))()))
    assert not same(eager, arrays(nnx.jit(lambda: make(nnx.Rngs(4)))()))
    mesh = jax.make_mesh((jax.device_count(),), ("d",), (jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec())
    whole = jax.jit(lambda: nnx.state(make(nnx.Rngs(3)), nnx.Param), out_shardings=spread)()
    assert same(eager, [np.asarray(leaf) for leaf in jax.tree.leaves(whole)])
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(whole)} == {jax.device_count()}
    several = nnx.split_rngs(splits=2)(nnx.vmap(make))(nnx.Rngs(3))
    first, second = np.asarray(several.conv1.kernel[...])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 5 / first.size**0.5
    outside = nnx.Rngs(0)
    with pytest.raises(TraceContextError):  # its counter would be stepped once, while tracing
        nnx.jit(lambda: make(outside))()


def test_creation_compiles_nothing():
    """The sizes are those of no other test."""

    def compilations(widths: tuple[int, ...]) -> int:
        before = COMPILED.copy()
        create("resnet50", widths=widths, num_classes=41, rngs=nnx.Rngs(0))
        return (COMPILED - before).total()

    nnx.Rngs(0)
    assert compilations((28, 60, 92, 124)) == 0
    before = COMPILED.copy()
    jax.block_until_ready(jax.numpy.ones((3, 41)))
    assert (COMPILED - before).total() > 0


def test_initialisers_of_jax_work_as_well():
    conv = Conv(3, 4, 5, kernel_init=jax.nn.initializers.constant(2.5), rngs=nnx.Rngs(0))
    assert bool((conv.kernel[...] == 2.5).all())


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("block", [ResidualBlock, BottleneckBlock])
def test_zero_init_residual_zeroes_the_last_norm_only_where_asked(block, zero):
    module = block(8, 8, rngs=nnx.Rngs(0), zero_init_residual=zero)
    last = module.norm2 if block is ResidualBlock else module.norm3
    assert bool((last.scale[...] == 0).all()) == zero
    assert bool((module.norm1.scale[...] == 1).all())
    if zero:
        module.eval()
        x = np.random.default_rng(0).standard_normal((1, 5, 4, 8)).astype(np.float32)
        np.testing.assert_array_equal(module(x), np.maximum(x, 0))


@pytest.mark.slow
def test_options_reach_every_layer():
    model = create(
        "resnet20",
        rngs=nnx.Rngs(0),
        dtype=jax.numpy.bfloat16,
        eps=1e-3,
        momentum=0.2,
        precision="highest",
    )
    logits = model(np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32))
    assert logits.dtype == jax.numpy.bfloat16
    norms = [m for _, m in nnx.iter_modules(model) if type(m).__name__ == "BatchNorm"]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.2)}
    assert {v.dtype for _, v in nnx.to_flat_state(nnx.state(model, nnx.Param))} == {
        np.dtype("float32")
    }
    assert {
        m.precision for _, m in nnx.iter_modules(model) if type(m).__name__ in ("Conv", "Linear")
    } == {"highest"}


def test_create_names_unknown_options_and_architectures():
    with pytest.raises(TypeError, match=r"unknown option colour; known: .*, block, depths"):
        create("resnet18", rngs=None, colour="red")
    with pytest.raises(TypeError, match=r"unknown option colour; known: dtype"):
        ResidualBlock(4, 4, rngs=None, colour="red")
    with pytest.raises(ValueError, match=r"'resnet19' is unknown; known: resnet18"):
        create("resnet19", rngs=None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": (1, 2)}, "same stages"),
        ({"depths": ()}, "same stages"),
        ({"widths": (0, 1, 2, 3)}, "positive integers"),
        ({"num_classes": 0}, "positive integers"),
        ({"dilated_stages": (1,)}, "stage 1 has no stride"),
        ({"base_width": 128}, "basic block has none"),
        ({"shortcut": "zero_pad", "widths": (64, 32, 64, 64)}, "cannot reduce 64 channels to 32"),
        ({"stem": "fancy"}, "'imagenet', 'deep' or 'cifar'"),
        ({"block": "bottleneck", "widths": (4,) * 4, "base_width": 8}, "no inner channel"),
        ({"stem_width": 6, "groups": 4}, "groups=4 must divide in_channels=6"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_network_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        architecture("resnet18", **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"out_channels": 6, "kind": "bottleneck"},
        {"stride": 0},
        {"groups": -1},
        {"shortcut": "magic"},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_block_is_refused(fields):
    with pytest.raises(ValueError, match=r"must be|unknown|multiple of 4"):
        BlockConfig(**{"in_channels": 4, "out_channels": 8, **fields})


def test_a_configuration_survives_json_and_names_every_slot_once():
    for config in (
        *(architecture(name, num_classes=3) for name in architectures()),
        *BATTERY.values(),
    ):
        assert from_json(to_json(config)) == config
        names = [slot.name for slot in walk(config)]
        assert len(set(names)) == len(names), config


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "[]",
        '{"type": "os.system"}',
        '{"type": "ResNetConfig", "colour": 1}',
        '{"type": "ResNetConfig", "depths": 3}',
    ],
)
def test_a_configuration_from_a_stranger_is_checked(text):
    with pytest.raises((ValueError, TypeError)):
        from_json(text)
