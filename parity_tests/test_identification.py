"""A state dict is read by its names and shapes; what is wrong is named, down to the tensor."""

from dataclasses import replace

import numpy as np
import pytest

from flax_resblock import BlockConfig, CheckpointError, InputError, ResNetConfig
from flax_resblock.config import architecture
from flax_resblock.convert import NAMINGS, StateMap, TensorInfo, identify
from parity_tests.support import fast_only

NETWORKS = {
    "basic": ResNetConfig(depths=(1, 2), widths=(6, 10), stem="cifar", stem_width=4, num_classes=3),
    "grouped basic": ResNetConfig(
        depths=(1, 1), widths=(8, 12), stem_width=4, groups=2, num_classes=4
    ),
    "grouped bottleneck": ResNetConfig(
        block="bottleneck", depths=(2, 1), widths=(4, 8), stem_width=6, num_classes=3, groups=2
    ),
    "option A": ResNetConfig(
        depths=(1, 1),
        widths=(6, 12),
        stem="cifar",
        stem_width=6,
        shortcut="zero_pad",
        num_classes=4,
    ),
    "no shortcut": ResNetConfig(
        depths=(2,), widths=(6,), stem="cifar", stem_width=6, num_classes=4
    ),
    "resnext": architecture("resnext50_32x4d"),
    "se": ResNetConfig(
        depths=(1, 1),
        widths=(16, 24),
        stem="deep",
        stem_hidden=(4, 6),
        stem_width=8,
        shortcut="pooled",
        attention="se",
        num_classes=3,
    ),
    "eca": ResNetConfig(
        block="bottleneck",
        depths=(2, 1),
        widths=(4, 8),
        stem_width=8,
        attention="eca",
        num_classes=3,
    ),
    "deep, without head": ResNetConfig(
        depths=(1, 1),
        widths=(8, 12),
        stem="deep",
        stem_hidden=(4, 6),
        stem_width=8,
        num_classes=None,
    ),
    "strided at once": ResNetConfig(
        depths=(1, 1), widths=(8, 12), stem_width=8, first_stride=2, num_classes=3
    ),
    "block": BlockConfig(in_channels=4, out_channels=6, stride=2),
    "bottleneck block": BlockConfig(in_channels=6, out_channels=16, kind="bottleneck", stride=2),
}


def names(naming, config):
    """Whether a naming scheme has names for all of a network, and is not another one's again."""
    try:
        scheme = NAMINGS[naming]
        return naming != "timm" and not scheme.told and bool(StateMap(config, scheme))
    except InputError:
        return False


READINGS = [
    (name, naming)
    for name, config in NETWORKS.items()
    for naming in NAMINGS
    if names(naming, config)
    and (naming == "torchvision" or name in ("basic", "deep, without head"))
]
"""Every network under torchvision's names, and one with and one without a head under all others
that are for any network."""


def described(config, naming="torchvision"):
    """Shapes and dtypes of a state dict, without any value."""
    entries = StateMap(config, NAMINGS[naming]).entries
    return {
        e.torch_key: TensorInfo(
            e.torch_shape, np.dtype(np.int64 if e.role == "counter" else np.float32)
        )
        for e in entries
    }


def complaint(found, config):
    """What identify says about a state dict that does not fit, without the advice at its end."""
    with pytest.raises(CheckpointError) as caught:
        identify(found, stride=getattr(config, "stride", None))
    return str(caught.value).split("\nNext nearest")[0].split("\nTry")[0]


def weights(found):
    """Keys of everything but the counters, and in a large network of every tenth."""
    keys = [key for key in found if "num_batches" not in key]
    return keys if len(keys) < 100 else keys[::10]


OFTEN = [(name, "torchvision") for name in ("basic", "no shortcut", "se", "bottleneck block")]
OFTEN += [("basic", "flax"), ("deep, without head", "senet")]


@pytest.mark.parametrize("reading", fast_only(OFTEN, READINGS), ids="-".join)
def test_whichever_tensor_is_missing_or_too_many_is_named_and_no_other(reading):
    name, naming = reading
    config = NETWORKS[name]
    found = described(config, naming)
    assert identify(found, stride=getattr(config, "stride", None)).state_map.config == config
    for key in weights(found):
        rest = {other: info for other, info in found.items() if other != key}
        assert complaint(rest, config).split("\n")[1:] == [f"  missing     {key}"]
    for extra in ("extra.weight", "conv9.weight", "layer1.0.bn9.bias"):
        more = {**found, extra: TensorInfo((3,), np.dtype(np.float32))}
        assert complaint(more, config).split("\n")[1:] == [f"  unexpected  {extra}"]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnext"])
@pytest.mark.slow
def test_whichever_tensor_has_a_wrong_shape_is_named(name):
    config = NETWORKS[name]
    found = described(config)
    for key in weights(found):
        shape = found[key].shape
        # weight against bias: one of the two is named, with both numbers
        head = key.split(".")[0] in ("fc", "linear", "head", "classifier", "backbone")
        for wrong in ((shape[0] + 1, *shape[1:]), (), (*shape, 1)):
            text = complaint({**found, key: replace(found[key], shape=wrong)}, config)
            assert (key in text) or (head and "bias" in text and str(shape[0] + 1) in text), text


@pytest.mark.parametrize("base_width", [7, 50, 63, 65, 100])
def test_the_base_width_serves_every_stage(base_width):
    """Narrow stages alone do not tell it: 16 planes have 12 inner channels at 48, 49, 50 and 51."""
    config = ResNetConfig(
        block="bottleneck",
        depths=(1, 1),
        widths=(16, 64),
        stem_width=8,
        groups=2,
        base_width=base_width,
        num_classes=3,
    )
    assert identify(described(config)).state_map.config == config


@pytest.mark.parametrize("shortcut", ["projection", "zero_pad"])
def test_a_stride_that_changes_the_function_is_asked_for(shortcut):
    found = described(BlockConfig(in_channels=4, out_channels=8, stride=2, shortcut=shortcut))
    with pytest.raises(
        CheckpointError, match=r"4->8 .*Its stride cannot be read off the weights.*`stride=2`"
    ):
        identify(found)
    assert [identify(found, stride=stride).state_map.config.stride for stride in (1, 2)] == [1, 2]


@pytest.mark.parametrize("number", [0, -1, 2.0, "2"])
@pytest.mark.parametrize("name", ["stride", "num_classes"])
def test_impossible_numbers_are_refused(name, number):
    with pytest.raises(InputError, match=f"{name}={number!r} must be a positive integer"):
        identify(
            described(NETWORKS["basic" if name == "num_classes" else "block"]), **{name: number}
        )


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"num_classes": 9}, r"fc.weight \[3, 10\], expected \[9, 10\].*\n.*It does fit"),
        (
            {"architecture": "resnet18"},
            r"does not fit resnet18.*\n.*missing +layer1.1.conv1.weight.* more\n(.*\n)+It does fit",
        ),
        ({"architecture": "resnet19"}, "architecture 'resnet19' is unknown; known: resnet18"),
        (
            {"naming": "kuangliu"},
            r"unexpected .*downsample.0.weight.*\n(.*\n)*It does fit .*naming='torchvision'",
        ),
        ({"naming": "keras"}, "naming scheme 'keras' is unknown; known: torchvision"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_a_person_says_wrongly_is_answered_with_what_fits(said, message):
    with pytest.raises(InputError, match=message):
        identify(described(NETWORKS["basic"]), **said)
