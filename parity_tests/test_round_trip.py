"""There and back is the same bits, for every architecture, naming scheme, dtype and format."""

import itertools
import math
import warnings
from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_resblock import (
    BlockConfig,
    CheckpointError,
    InputError,
    ResNetConfig,
    checkpoint,
    from_torch,
    load,
    save,
    to_torch,
)
from flax_resblock.checkpoint.torch_file import state_to_numpy, with_tensors
from flax_resblock.config import ARCHITECTURES, architecture, choices_of, walk
from flax_resblock.convert import NAMINGS, StateMap, describe, identify
from flax_resblock.convert.detection.assumption_rules import ASSUMABLE_FIELDS
from flax_resblock.convert.opening import interpret
from flax_resblock.convert.state_map import transcode
from flax_resblock.parity.battery import BATTERY
from parity_tests.support import DTYPES, assert_same_bits, fast_only, fewest, random_bits
from torch_ref import Block, ResNet

SMALL = ResNetConfig(
    block="bottleneck", depths=(1, 2), widths=(4, 8), stem_width=6, num_classes=3, groups=2
)
OPTION_A = ResNetConfig(
    depths=(1, 1), widths=(6, 12), stem="cifar", stem_width=6, shortcut="zero_pad", num_classes=4
)
BLOCKS = {
    "basic": BlockConfig(in_channels=4, out_channels=6, stride=2),
    "wide grouped bottleneck": BlockConfig(
        in_channels=8, out_channels=16, kind="bottleneck", groups=2, base_width=128
    ),
    "grouped option A block": BlockConfig(
        in_channels=4, out_channels=8, groups=2, shortcut="zero_pad"
    ),
}
SCHEMES = [name for name, naming in NAMINGS.items() if not naming.told]
"""Those for any network; the others are in test_jax_checkpoints.py."""
UNNAMED = {
    "akamaster": "shortcut.conv",
    "huggingface_backbone": "head",
    "children": "head",
    "openmmlab_backbone": "stem.conv",
    "timm_v2_d": "stem.conv",
}
"""What a naming scheme has no name for: its networks have none."""
EDGE_COUNTERS = (0, 7, 2**31 - 1, 2**31, 2**40)


@pytest.fixture(autouse=True)
def odd_values_are_meant():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*carried as they are")
        yield


def few_architectures():
    """Small networks with every value of every option that a named architecture has."""
    networks = sorted(
        ARCHITECTURES.items(), key=lambda one: sum(math.prod(slot.shape) for slot in walk(one[1]))
    )
    fields = choices_of(ResNetConfig)
    return fewest(
        {name: {(field, getattr(config, field)) for field in fields} for name, config in networks}
    )


@pytest.mark.parametrize(
    ("name", "dtype"), [*zip(few_architectures(), itertools.cycle(DTYPES), strict=False)]
)
def test_an_architecture_survives_bit_for_bit_and_loads_strictly(name, dtype):
    config = architecture(name)
    state = random_bits(config, DTYPES[dtype], seed=len(name))
    model = from_torch(
        state, assumptions={field: getattr(config, field) for field in ASSUMABLE_FIELDS}
    )
    assert model.config == config
    back = to_torch(model)
    assert_same_bits(back, state)
    assert all(value.flags.writeable for value in back.values())
    with torch.device("meta"):
        module = ResNet(**asdict(architecture(name)))
    module.load_state_dict(with_tensors(back), strict=True, assign=True)
    assert_same_bits(state_to_numpy(module.state_dict()), state)


def test_the_counter_survives():
    for counter in EDGE_COUNTERS:
        state = random_bits(OPTION_A, np.float32, counter=counter)
        assert_same_bits(to_torch(from_torch(state)), state)


def test_mixed_dtypes_survive():
    state = random_bits(SMALL, np.float32)
    for number, key in enumerate(state):
        if state[key].dtype == np.float32:
            dtype = list(DTYPES.values())[number % 4]
            state[key] = (
                np.random.default_rng(number)
                .integers(0, 256, (*state[key].shape, np.dtype(dtype).itemsize), np.uint8)
                .view(dtype)[..., 0]
                .copy()
            )
    assert_same_bits(to_torch(from_torch(state)), state)


@pytest.mark.parametrize("name", BATTERY)
def test_every_option_survives(name):
    config = BATTERY[name]
    state = random_bits(config, np.float32)
    told = {field: getattr(config, field) for field in ASSUMABLE_FIELDS if hasattr(config, field)}
    model = from_torch(state, stride=getattr(config, "stride", None), assumptions=told)
    same = {"dilation": config.dilation} if isinstance(config, BlockConfig) else {}
    assert replace(model.config, **same) == config
    assert_same_bits(to_torch(model), state)


PRE_ACTIVATION = ("wide_resnet", "xternalz", "zagoruyko", "timm_v2", "timm_v2_d")
"""Naming schemes of networks in this order alone."""


def suited(config, naming):
    """The configuration with what all networks of a naming scheme have."""
    changes = {"order": "pre_activation"} if naming in PRE_ACTIVATION else {}
    if naming == "timm_v2_d":
        changes["shortcut"] = "pooled"
    return replace(config, **changes)


CONFIGS = {"bottleneck": SMALL, "option A": OPTION_A, **BLOCKS}
PAIRS = [*zip(SCHEMES, itertools.cycle(["bottleneck", "option A"]), strict=False)]
PAIRS += zip(SCHEMES, itertools.cycle(BLOCKS), strict=False)
"""A network and a block for each naming scheme; the others where there is time."""


@pytest.mark.parametrize(
    "pair", fast_only(PAIRS, itertools.product(SCHEMES, CONFIGS)), ids="-".join
)
def test_every_naming_scheme_survives(pair):
    naming, config = pair[0], CONFIGS[pair[1]]
    config = suited(config, naming)
    unnamed = UNNAMED.get(naming)
    if unnamed and any(slot.name.endswith(unnamed) for slot in walk(config)):
        with pytest.raises(InputError, match=rf"'{naming}' has no name for .*{unnamed}"):
            StateMap(config, NAMINGS[naming])
        return
    state = random_bits(config, np.float32, naming=naming)
    # a bare block does not show that its shortcut pools
    told = {"naming": naming} if naming == "timm_v2_d" else {}
    model = from_torch(state, stride=getattr(config, "stride", None), **told)
    assert replace(model.config, shortcut_from=config.shortcut_from) == config  # is assumed
    assert_same_bits(to_torch(model, naming), state)
    changed = {**state, next(iter(state)): -state[next(iter(state))]}
    with pytest.raises(AssertionError):
        assert_same_bits(to_torch(model, naming), changed)


@pytest.mark.parametrize("naming", SCHEMES)
def test_a_naming_names_every_tensor_once(naming):
    config = replace(OPTION_A, num_classes=None) if naming in UNNAMED else OPTION_A
    config = suited(config, naming)
    if UNNAMED.get(naming) == "stem.conv":
        config = replace(config, stem="deep", stem_hidden=(2, 3))
    entries = StateMap(config, NAMINGS[naming]).entries
    assert (
        len({e.torch_key for e in entries}) == len({e.flax_path for e in entries}) == len(entries)
    )


FILES = [*itertools.product(["bfloat16"], ["net.pth", "net.safetensors", "net"])]
FILES += [("float64", "net"), ("float32", "net.safetensors"), ("float16", "net.pth")]


@pytest.mark.parametrize(("dtype", "target"), FILES)
def test_every_file_format_survives(dtype, target, tmp_path):
    state = random_bits(SMALL, DTYPES[dtype], counter=2**40)
    model = from_torch(state)
    save(model, tmp_path / target)
    again = load(tmp_path / target)
    assert again.config == model.config
    assert again.stem.norm.use_running_average
    assert_same_bits(to_torch(again), state)
    beside = {f"{target}.sha256.json"} if target.endswith(".pth") else set()
    assert {path.name for path in tmp_path.iterdir()} == {target} | beside


@pytest.mark.parametrize("target", ["block.safetensors", "block"])
def test_a_saved_block_remembers_its_stride_and_norm_constants(target, tmp_path):
    block = Block(4, 6, stride=2)
    for layer in block.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps, layer.momentum = 3e-4, None
    model = from_torch(block)
    assert (model.config.stride, model.norm1.eps, model.norm1.momentum) == (2, 3e-4, None)
    save(model, tmp_path / target)
    again = load(tmp_path / target)
    assert (again.config, again.norm1.eps, again.norm1.momentum) == (model.config, 3e-4, None)


def test_what_a_person_says_comes_before_what_the_file_remembers(tmp_path):
    save(from_torch(random_bits(OPTION_A, np.float32)), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointError, match=r"fc.weight \[4, 12\], expected \[9, 12\]"):
        load(tmp_path / "net.safetensors", num_classes=9)
    save(from_torch(Block(4, 6, stride=2)), tmp_path / "block")
    assert (
        load(tmp_path / "block").config.stride,
        load(tmp_path / "block", stride=1).config.stride,
    ) == (2, 1)


WRAPPED = {
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}, "param_groups": []}},
    "network": lambda s: {"network": s},
    "net": lambda s: {"net": s, "acc": 93.1},
    "ema": lambda s: {"ema": s},
    "state_dict_ema": lambda s: {"state_dict_ema": s},
    "nested": lambda s: {"state_dict": {"model": s}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "_orig_mod.": lambda s: {f"_orig_mod.{k}": v for k, v in s.items()},
    "model.": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "module._orig_mod.": lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    "averaged": lambda s: {
        "n_averaged": torch.tensor(4),
        **{f"module.{k}": v for k, v in s.items()},
    },
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_are_taken_off_and_named(wrapper, tmp_path):
    state = random_bits(SMALL, np.float32)
    torch.save(WRAPPED[wrapper](with_tensors(state)), tmp_path / "net.pth")
    record = checkpoint.read(tmp_path / "net.pth")
    assert_same_bits(dict(record.tensors), state)
    said = " ".join(record.notes)
    word = {
        "nested": "entry 'model'",
        "averaged": "n_averaged",
        "module._orig_mod.": "prefix '_orig_mod.'",
    }.get(wrapper, f"'{wrapper}'")
    assert word in said


def test_trained_weights_come_before_their_average_and_the_choice_is_said(tmp_path):
    ours, average = (random_bits(SMALL, np.float32, seed=seed) for seed in (1, 2))
    torch.save(
        {name: with_tensors(s) for name, s in {"model_ema": average, "model": ours}.items()},
        tmp_path / "net.pth",
    )
    record = checkpoint.read(tmp_path / "net.pth")
    assert_same_bits(dict(record.tensors), ours)
    assert "also there: model_ema" in record.notes[0]
    assert_same_bits(
        dict(checkpoint.read(tmp_path / "net.pth", entry="model_ema").tensors), average
    )


def test_absent_counters_are_filled_with_a_note():
    state = {
        key: value
        for key, value in random_bits(SMALL, np.float32).items()
        if "num_batches" not in key
    }
    source = interpret(checkpoint.Record("net", "test", state))
    assert "filled 12 absent num_batches_tracked with 0" in " ".join(source.notes)
    back = to_torch(from_torch(state))
    assert {int(value) for key, value in back.items() if "num_batches" in key} == {0}
    assert_same_bits({key: value for key, value in back.items() if "num_batches" not in key}, state)


def test_the_model_shares_no_memory_with_its_source():
    module = ResNet(**asdict(SMALL))
    model = from_torch(module)
    before = {key: value.copy() for key, value in to_torch(model).items()}
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.fill_(5)
    assert_same_bits(to_torch(model), before)


@pytest.mark.parametrize("target", ["net.safetensors", "net", "net.pth"])
def test_a_saved_network_remembers_what_its_weights_cannot_tell(target, tmp_path):
    config = replace(SMALL, dilated_stages=(2,), stride_on="1x1")
    model = from_torch(random_bits(config, np.float32), architecture=config)
    save(model, tmp_path / target)
    assert load(tmp_path / target).config == config
    if target == "net.pth":  # by the file beside it, since a state dict has no place for it
        (tmp_path / "net.pth.sha256.json").unlink()
        assert load(tmp_path / target).config == SMALL


def test_the_other_byte_order_keeps_its_values():
    state = random_bits(SMALL, np.float32)
    swapped = {key: value.astype(value.dtype.newbyteorder(">")) for key, value in state.items()}
    assert next(iter(swapped.values())).tobytes() != next(iter(state.values())).tobytes()
    assert_same_bits(to_torch(from_torch(swapped)), state)


@st.composite
def networks(draw):
    kind = draw(st.sampled_from(["basic", "bottleneck"]))
    stages = draw(st.integers(1, 3))
    widths = draw(st.lists(st.sampled_from([4, 8, 12]), min_size=stages, max_size=stages))
    shortcut = (
        draw(st.sampled_from(["projection", "zero_pad"]))
        if kind == "basic" and widths == sorted(widths)
        else "projection"
    )
    return ResNetConfig(
        block=kind,
        depths=tuple(draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages))),
        widths=tuple(widths),
        stem=draw(st.sampled_from(["imagenet", "cifar"])),
        stem_width=draw(
            st.sampled_from([w for w in (4, 8) if shortcut == "projection" or w <= widths[0]])
        ),
        groups=draw(st.sampled_from([1, 2, 4])),
        base_width=draw(st.integers(16, 150)) if kind == "bottleneck" else 64,
        stride_on=draw(st.sampled_from(["3x3", "1x1"])),
        in_channels=draw(st.sampled_from([1, 3, 4])),
        num_classes=draw(st.sampled_from([None, 1, 10])),
        shortcut=shortcut,
    )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    networks(),
    st.sampled_from(["torchvision", "sequential", "kuangliu", "flax"]),
    st.integers(0, 99),
)
def test_any_network_is_identified_and_survives(config, naming, seed):
    state = random_bits(config, np.float32, naming=naming, seed=seed)
    match = identify(describe(state))
    found = match.state_map.config
    assert found.base_width <= config.base_width
    assert [block.inner_width for _, _, block in found.blocks()] == [
        block.inner_width for _, _, block in config.blocks()
    ]
    # weights do not tell the one, and only the inner widths of the other
    told = replace(config, stride_on="3x3", base_width=found.base_width)
    if not any(block.changes_shape for _, _, block in config.blocks()):
        told = replace(told, shortcut=found.shortcut)  # no shortcut to tell by
    assert found == told
    torchvision = StateMap(config, NAMINGS["torchvision"])
    there = transcode(match.state_map, torchvision, state)
    assert_same_bits(transcode(torchvision, match.state_map, there), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_loaded_model_shares_nothing_with_its_file(suffix, tmp_path):
    # a kernel whose layout changes without moving a value
    pixels = ResNetConfig(depths=(1, 1), widths=(6, 12), stem="cifar", stem_width=6, in_channels=1)
    path, state = tmp_path / f"net{suffix}", random_bits(pixels, np.float32, seed=8)
    checkpoint.write(path, dict(state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random bits are rarely finite
        model = load(path)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert_same_bits(to_torch(model), state)


def test_values_go_where_and_as_wide_as_the_caller_says(tmp_path):
    path, state = tmp_path / "net.safetensors", random_bits(SMALL, np.float64, seed=9)
    checkpoint.write(path, dict(state))
    device = jax.devices()[-1]
    with warnings.catch_warnings(), jax.enable_x64(True), jax.default_device(device):
        warnings.simplefilter("ignore")
        wide = load(path)
    assert {
        (leaf.dtype.name, *leaf.devices()) for leaf in jax.tree.leaves(nnx.state(wide, nnx.Param))
    } == {("float64", device)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        narrow = load(path)
    # jax would make them float32
    assert {type(leaf) for leaf in jax.tree.leaves(nnx.state(narrow, nnx.Param))} == {np.ndarray}
    for model in (wide, narrow):
        assert_same_bits(to_torch(model), state)
