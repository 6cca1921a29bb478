"""Pre-activation and wide residual networks, group norms and standardised kernels: read from
weights with no flags, from modules, folded, and never taken for one another."""

from __future__ import annotations

import warnings
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import (
    AssumptionWarning,
    BatchNorm,
    BlockConfig,
    CheckpointError,
    InputError,
    ResNetConfig,
    from_torch,
    to_torch,
)
from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.checkpoint.unwrap import record_of
from flax_resblock.config import architecture, from_json, name_of, to_json
from flax_resblock.convert.opening import interpret
from flax_resblock.export.fold import fold_batch_norm
from flax_resblock.nn.resnet import build
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.inputs import adversarial_images, randomised_norm_state
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from parity_tests.cifar_networks import NETWORKS, PreActivationNetwork, zagoruyko
from parity_tests.families import randomise
from parity_tests.support import assert_same_bits, fast_only, output, random_bits, torch_output

SMALL = {"depths": (1, 1), "widths": (8, 16), "stem_width": 8, "num_classes": 3, "stem": "cifar"}
FLOAT64 = PRECISIONS["float64"]


def network(name: str, **changes) -> PreActivationNetwork:
    torch.manual_seed(0)
    return randomise(PreActivationNetwork(**{**NETWORKS[name], **changes}))


def quietly(read, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read(*arguments, **options)


@pytest.mark.parametrize("name", fast_only(["meliketoy"], NETWORKS))
def test_a_repositorys_network_is_read_with_no_flags_equals_it_and_goes_back(name):
    module = network(name)
    state = state_to_numpy(module.state_dict())
    with jax.enable_x64(True):
        with pytest.warns(AssumptionWarning, match="shortcut_from="):
            model = from_torch(module.state_dict())
        config = model.config
        assert config.order == "pre_activation"
        assert config.final_norm == bool(module.last)
        images = adversarial_images(config, batch=3, height=17, width=14)
        assert relative_l2(output(model, images), torch_output(module, images)) <= FLOAT64_LIMIT
    opened = quietly(interpret, record_of(module.state_dict(), "it"))
    naming = opened.state_map.naming
    assert_same_bits(to_torch(model, naming), {key: state[key] for key in to_torch(model, naming)})
    assert set(to_torch(model, naming)) == set(state)
    module.dropout = None
    for block in module.modules():
        if getattr(block, "dropout", None) is not None:
            block.dropout = None  # random numbers are no part of the comparison
    pair = ReferencePair(config, state, {}, naming=naming, module=module)
    found = compare_pair(pair, images, Plan(gradients=True, precisions=("float64",)))
    assert found.passed, [row for row in found.measurements if not row.verdict.passed][:3]
    stated = {row.quantity for row in found.measurements}
    assert {"eval forward", "train forward", "running statistics", "parameter gradient"} <= stated
    other = {"shortcut_from": "activated" if config.shortcut_from == "input" else "input"}
    wrong = replace(pair, config=replace(config, **other))  # the negative control
    found = compare_pair(wrong, images, Plan(train=False, precisions=("float64",)))
    worst = max(row.verdict.excess for row in found.measurements)
    assert worst > 100


CONTRARY = {"meliketoy": False, "kuangliu": True, "bearpaw": False}


@pytest.mark.parametrize("name", fast_only(["meliketoy"], CONTRARY))
def test_a_module_tells_what_its_tensors_and_layers_do_not(name):
    """Each convention under the names of a repository that has the other one."""
    module = network(name, from_input=CONTRARY[name])
    model = from_torch(module)
    assert model.config.shortcut_from == ("input" if CONTRARY[name] else "activated")
    assert model.config.dropout == NETWORKS[name].get("dropout", 0)
    images = np.random.default_rng(0).normal(0.2, 1, (2, 17, 16, 3))
    assert relative_l2(output(model, images), torch_output(module, images)) < 1e-5


@pytest.mark.slow
def test_a_norm_with_a_momentum_of_its_own_is_refused_or_ported_and_never_lost():
    module = network("meliketoy", dropout=0.0)
    module.get_submodule(module.last).momentum = 0.9
    with pytest.raises(InputError, match=r"norms differ in \(eps, momentum\)"):
        from_torch(module, image_size=(16, 16))
    model = from_torch(module)
    found = {one.momentum for _, one in nnx.iter_modules(model) if isinstance(one, BatchNorm)}
    assert found == {0.1, 0.9}
    assert model.bn1.momentum == 0.9


def test_dropout_that_is_no_layer_is_said(monkeypatch):
    """Training then drops values in PyTorch and not in Flax."""
    module = network("kuangliu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_torch(module)  # the control
    relu = torch.nn.functional.relu
    dropping = "parity_tests.cifar_networks.F.relu"
    monkeypatch.setattr(dropping, lambda x: torch.dropout(relu(x), 0.3, module.training))
    with pytest.warns(UserWarning, match="draws random numbers"):
        from_torch(module)


def test_the_other_order_fails_by_far():
    """Of a block of constant width both orders have the same tensors."""
    config = BlockConfig(in_channels=4, out_channels=4)
    before = replace(config, order="pre_activation")
    images = adversarial_images(config, batch=2)
    pair = ReferencePair.random(config)
    truth = np.moveaxis(torch_output(pair.torch(FLOAT64), images), 1, -1)
    with jax.enable_x64(True):
        models = [pair.flax(FLOAT64), replace(pair, config=before).flax(FLOAT64)]
        right, wrong = (np.asarray(one(images, use_running_average=True)) for one in models)
    assert relative_l2(right, truth) <= FLOAT64_LIMIT
    assert relative_l2(wrong, truth) > 100 * FLOAT64_LIMIT


def test_networks_written_without_modules_are_read():
    module = network("with a last norm", last="bn1")
    tensors = zagoruyko(module)
    assert "group1.block0.convdim" in tensors
    with jax.enable_x64(True):
        model = from_torch(tensors, assume="known")
        images = adversarial_images(model.config, batch=2)
        assert relative_l2(output(model, images), torch_output(module, images)) <= FLOAT64_LIMIT
    back = to_torch(model, "zagoruyko")
    assert {key: back[key].tobytes() for key in tensors} == {
        key: value.numpy().tobytes() for key, value in tensors.items()
    }


def test_an_order_that_the_tensors_do_not_tell_is_announced():
    """Of blocks of constant width: both orders fit, and --order says which it is."""
    config = ResNetConfig(**{**SMALL, "depths": (2,), "widths": (8,)})
    state = random_bits(config, np.float32)
    with pytest.warns(AssumptionWarning, match="order='pre_activation'"):
        assert from_torch(state, naming="torchvision").config == config
    wider = random_bits(ResNetConfig(**SMALL), np.float32)
    with pytest.warns(AssumptionWarning) as caught:
        from_torch(wider)
    assert "order=" not in str(caught[0].message)  # the control
    before = replace(config, order="pre_activation")
    found = from_torch(random_bits(before, np.float32), assume="known", naming="torchvision")
    assert found.config.order == "pre_activation"  # its norm is behind the blocks


def test_options_are_read_from_the_tensors_and_go_back_bit_for_bit():
    for changes in (
        {"order": "pre_activation", "block": "bottleneck", "shortcut_from": "input"},
        {"order": "pre_activation", "final_norm": False, "norm": "group", "shortcut_from": "input"},
        {"norm": "group", "shortcut_size": 3, "norm_groups": 8},
        {"order": "pre_activation", "stem": "deep", "stem_hidden": (4, 5), "shortcut": "pooled"},
        {"order": "pre_activation", "stem_norm": True},
        {"attention": "se", "attention_multiple": 1, "attention_bias": False},
    ):
        config = ResNetConfig(**{**SMALL, "norm_groups": 8, **changes})
        config = replace(config, shortcut_from="input")
        assert from_json(to_json(config)) == config
        state = random_bits(config, np.float32)
        model = from_torch(state, assume="known")
        assert model.config == config, changes
        assert {k: v.tobytes() for k, v in to_torch(model).items()} == {
            k: v.tobytes() for k, v in state.items()
        }
    block = BlockConfig(in_channels=4, out_channels=8, stride=2, order="pre_activation")
    block = replace(block, shortcut_from="input")
    assert quietly(from_torch, random_bits(block, np.float32), stride=2).config == block


def test_standardised_kernels_of_group_norms_are_assumed_where_big_transfer_has_them():
    config = replace(architecture("resnetv2_50x1_bit"), depths=(1, 1), widths=(32, 64))
    config = replace(config, stem_width=32, num_classes=3)
    state = ReferencePair.random(config)
    tensors = to_torch(state.flax(PRECISIONS["float32"]), "timm_v2")
    with pytest.warns(AssumptionWarning, match=r"norm_groups=16.*\n.*kernels are standardised"):
        assert from_torch(tensors).config == config
    told = {"norm_groups": 16, "standardized": False, "stem_pool": "3x3"}
    other = from_torch(tensors, assumptions=told, assume="known").config
    assert (other.norm_groups, other.standardized, other.stem_pool) == (16, False, None)
    with jax.enable_x64(True):  # the negative controls: each of them alone
        images = adversarial_images(config, batch=2, height=9, width=8)
        truth = output(state.flax(FLOAT64), images)
        assert relative_l2(torch_output(state.torch(FLOAT64), images), truth) <= FLOAT64_LIMIT
        for name, value in {**told, "standardized_eps": 1e-6}.items():
            wrong = replace(state, config=replace(config, **{name: value}))
            found = relative_l2(output(wrong.flax(FLOAT64), images), truth)
            assert found > 100 * FLOAT64_LIMIT, name


def test_folding_keeps_the_norms_that_follow_an_addition():
    config = ResNetConfig(**SMALL, order="pre_activation", standardized=True)
    for changes in ({}, {"norm": "frozen"}, {"norm": "group", "norm_groups": 4}):
        pair = ReferencePair.random(replace(config, **changes))
        images = adversarial_images(pair.config, batch=2, height=9, width=8).astype(np.float32)
        model = pair.flax(PRECISIONS["float32"])
        folded = fold_batch_norm(model)
        left = {
            path[:-1] for path, _ in nnx.to_flat_state(nnx.state(folded)) if path[-1] == "scale"
        }
        kept = {("stage1", 0, "norm1"), ("stage2", 0, "norm1"), ("norm",)}
        inner = {("stage1", 0, "norm2"), ("stage2", 0, "norm2")}
        assert left == (kept | inner if "norm_groups" in changes else kept)
        for network in (model, folded):
            network.eval()
        assert relative_l2(output(folded, images), output(model, images)) < 1e-5


def test_frozen_norms_are_no_parameters_and_training_leaves_them():
    model = build(BlockConfig(in_channels=4, out_channels=4, norm="frozen"), rngs=nnx.Rngs(0))
    model.train()
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    assert names == {"kernel"}
    before = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    model(np.ones((2, 8, 8, 4), np.float32))
    after = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
    assert all(np.array_equal(a[...], b[...]) for (_, a), (_, b) in zip(before, after, strict=True))
    assert not any("tracked" in key for key in to_torch(model))


def test_dropout_drops_in_training_alone():
    config = BlockConfig(in_channels=4, out_channels=4, order="pre_activation", dropout=0.5)
    model = build(config, rngs=nnx.Rngs(0, dropout=1))
    images = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 4)).astype(np.float32)
    model.train()
    assert not np.array_equal(model(images), model(images))
    model.eval()
    assert np.array_equal(model(images), model(images))


def test_named_networks_are_those_of_their_papers():
    depth = {  # convolutions and the head, without projections
        "preresnet20": 20, "preresnet56": 56, "preresnet110": 110, "preresnet164": 164,
        "wrn_16_4": 14, "wrn_28_10": 26, "wrn_40_2": 38, "preact_resnet18": 18,
    }  # fmt: skip
    for name, layers in depth.items():
        config = architecture(name)
        convs = sum(s.multiplies and "shortcut" not in s.role for s in config.slots())
        assert convs == layers, name
        assert name_of(replace(config, num_classes=3)) == name
    parameters = {"wrn_28_10": 36_479_194, "wrn_40_2": 2_243_546, "wrn_16_4": 2_748_890}
    for name, number in parameters.items():
        assert sum(slot.parameters for slot in architecture(name).slots()) == number


def test_a_name_does_not_tell_what_repositories_spell_differently():
    state = network("bearpaw", widths=(16, 32, 64), depth=3).float().state_dict()
    state["conv1.weight"] = torch.zeros(16, 3, 3, 3)
    state["layer1.0.bn1.weight"] = torch.zeros(16)
    for name in ("bias", "running_mean", "running_var"):
        state[f"layer1.0.bn1.{name}"] = torch.ones(16)
    state["layer1.0.conv1.weight"] = torch.zeros(16, 16, 3, 3)
    del state["layer1.0.downsample.0.weight"]
    with pytest.warns(AssumptionWarning, match="shortcut_from='input'"):
        config = from_torch(state, architecture="preresnet20").config
    assert name_of(config) == "preresnet20"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = {"shortcut_from": "input"}
        from_torch(state, architecture="preresnet20", assumptions=told)


def test_mixed_norms_are_refused():
    state = random_bits(ResNetConfig(**SMALL, order="pre_activation"), np.float32)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        del state[f"layer1.0.bn2.{name}"]
    with pytest.raises(CheckpointError, match=r"missing +layer1\.0\.bn2\.running_mean"):
        from_torch(state)


def test_norm_states_of_group_norms_look_trained():
    state = {"n.weight": np.ones(4, np.float32), "n.bias": np.zeros(4, np.float32)}
    found = randomised_norm_state(state)
    assert set(found) == set(state)
    assert not np.array_equal(found["n.weight"], state["n.weight"])
