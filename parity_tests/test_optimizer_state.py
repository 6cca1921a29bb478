"""The state of an optimizer, read and written bit for bit, or refused with the reason."""

import copy
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.tree_util import GetAttrKey

from flax_resblock import CheckpointError, from_torch
from flax_resblock.checkpoint.torch_file import plain, with_tensors
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS as OPTIMIZERS_KNOWN
from flax_resblock.runs.optimizer_state import (
    fresh_optimizer,
    read_optimizer,
    write_optimizer,
)
from flax_resblock.runs.optimizers import optimizer_of, parameter_path, record_of, state_of
from parity_tests.optimizer_runs import (
    MAP,
    OPTIMIZERS,
    RUNS,
    batches,
    by_ndim,
    module_of,
    reference,
    torch_steps,
)
from parity_tests.support import fast_only, same

AMBIGUOUS = {
    *("sgd, two groups", "sgd, one cycle"),
    *("adamw, decay first", "adamw, decay last", "adamw, one cycle"),
}
"""Runs with as many kernels as biases, which before the first step have no buffer whose shape tells
them apart.
"""


KEPT = [("sgd, two groups", torch.bfloat16), ("adamw, one cycle", torch.bfloat16)]
KEPT += [("adam", torch.float64), *((name, torch.float32) for name in RUNS)]


@pytest.mark.parametrize("kept", fast_only(KEPT[:3] + KEPT[4::2], KEPT), ids=str)
def test_there_and_back_is_bit_exact(kept):
    name, dtype = kept
    module = module_of().to(dtype)
    make, schedule = RUNS[name]
    optimizer = make(module)
    scheduler = schedule and schedule(optimizer)
    for step in range(3):
        original = plain(optimizer.state_dict())
        if step == 0 and name in AMBIGUOUS:
            words = r"fits 2 of the usual ways: biases (fir|la)st, kernels (fir|la)st"
            with pytest.raises(CheckpointError, match=words):
                read_optimizer(original, MAP)
        else:
            record = read_optimizer(original, MAP)
            assert same(write_optimizer(record, MAP), original)
            with jax.enable_x64(True):
                params = nnx.state(from_torch(plain(module.state_dict())), nnx.Param)
                back = write_optimizer(record_of(record, state_of(record, params)), MAP)
            assert same(back, original)
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def test_the_buffers_hold_what_torch_calls_them():
    there = reference("adamw, decay last", 2)[-1]
    record = read_optimizer(there.optimizer, MAP)
    with jax.enable_x64(True):
        state = state_of(record, nnx.state(from_torch(there.weights), nnx.Param))
    wanted = ("stage1", 0, "conv1", "kernel")
    (kernel,) = (
        leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(state)
        if GetAttrKey("mu") in keys and parameter_path(keys)[-4:] == wanted
    )
    number = [path for group in record.groups for path in group.paths].index(wanted)
    moment = there.optimizer["state"][number]["exp_avg"]
    np.testing.assert_array_equal(np.asarray(kernel), moment.transpose(2, 3, 1, 0))
    counters = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int32]
    assert [int(counter) for counter in counters] == [2, 2]  # one per group


def test_an_optimizer_made_here_is_one_that_torch_takes():
    classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    sgd_options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    for kind, options in (("sgd", sgd_options), ("adamw", {"lr": 1e-3}), ("adam", {})):
        record = fresh_optimizer(kind, MAP, **options)
        module = module_of()
        optimizer = classes[kind](by_ndim(module, True), lr=0.5)
        optimizer.load_state_dict(with_tensors(write_optimizer(record, MAP)))
        torch_steps(module, optimizer, None, batches(1))
        assert read_optimizer(plain(optimizer.state_dict()), MAP).kind == kind


def _edited(change, name="sgd, two groups"):
    def make():
        state = copy.deepcopy(reference(name, 1)[-1].optimizer)
        change(state["param_groups"], state["state"])
        return state

    return make


def _without(*names):
    """Without some of what every parameter has."""

    def change(_, state):
        for found in state.values():
            for name in names:
                del found[name]

    return change


def _sgd(parameters):
    return plain(torch.optim.SGD(parameters, momentum=0.9).state_dict())


def _lamb(**options):
    """timm's LAMB, before its first step."""
    usual = OPTIMIZERS_KNOWN["timm-lamb"]
    group = {**usual.options, **usual.only, "foreach": None, **options, "params": list(range(20))}
    return {"state": {}, "param_groups": [group]}


def _split_at(number):
    parameters = list(module_of().parameters())
    return [{"params": parameters[:number]}, {"params": parameters[number:]}]


BAD = {
    "no state": (lambda: {"epoch": 1}, "no state of a torch optimizer"),
    "a changed LAMB": (
        lambda: _lamb(caution=True),
        "param group 0: caution=True has no counterpart here",
    ),
    "another optimizer": (
        lambda: plain(torch.optim.Rprop(module_of().parameters()).state_dict()),
        "no optimizer with a counterpart here",
    ),
    "another model": (
        lambda: _sgd(torch.nn.Linear(3, 4).parameters()),
        "it has 2 parameters, the model 20",
    ),
    "unknown names": (
        lambda: _sgd([(f"x.{n}", p) for n, p in module_of().named_parameters()]),
        r"it names x\.conv1\.weight",
    ),
    "names missing": (
        lambda: _sgd(list(module_of().named_parameters())[1:]),
        r"leaves out conv1\.weight",
    ),
    "an odd split": (
        lambda: _sgd(_split_at(5)),
        "param groups of 5 . 15 parameters, which does not fit any",
    ),
    "a wrong shape": (
        _edited(lambda _, state: state[0].update(momentum_buffer=np.zeros((2, 2)))),
        "does not fit any",
    ),
    "steps that differ": (
        _edited(lambda _, state: state[3].update(step=np.array(9.0, np.float32)), "adam"),
        r"updated a different number of times \(1, 9 steps\)",
    ),
    "an unknown tensor": (
        _edited(lambda _, state: state[3].update(square_avg=state[3]["momentum_buffer"])),
        "keeps square_avg per parameter",
    ),
    "an unknown option": (
        _edited(lambda groups, _: groups[1].update(trust=1)),
        "param group 1 has options that sgd does not know: trust",
    ),
    "a missing option": (
        _edited(lambda groups, _: groups[1].pop("nesterov")),
        "param group 1 lacks nesterov",
    ),
    "momentum of one missing": (
        _edited(lambda _, state: state.pop(3)),
        r"lacks momentum_buffer of 1 of 20 parameters: layer2\.0\.conv1\.weight\..*were "
        r"frozen, which JAX would not keep, or the file is damaged",
    ),
    "momentum of two never made": (
        _edited(lambda _, state: [state[i].update(momentum_buffer=None) for i in (0, 8)]),
        r"lacks momentum_buffer of 2 of 20 parameters: conv1\.weight, \S+",
    ),
    "first moment of one missing": (
        _edited(lambda _, state: state[3].pop("exp_avg"), "adam"),
        "lacks exp_avg of 1 of 20 parameters",
    ),
    "a parameter that Adam never saw": (
        _edited(lambda _, state: state.pop(0), "adam"),
        r"lacks exp_avg of 1 of 20 parameters: conv1\.weight\.",
    ),
    "steps without moments": (
        _edited(_without("exp_avg", "exp_avg_sq"), "adam"),
        "lacks exp_avg of 20 of 20 parameters: .* and 17 more",
    ),
    "tensors of no parameter": (
        _edited(lambda _, state: state.update({77: {}})),
        "parameters 77 that are in none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_counterpart_is_refused_by_name(case):
    make, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read_optimizer(make(), MAP)
    assert "`flax_resblock.load`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_groups_with_momentum_need_a_buffer():
    state = copy.deepcopy(reference("sgd, momentum in one group", 2)[-1].optimizer)
    assert len(read_optimizer(state, MAP).tensors["momentum_buffer"]) == 18
    state["param_groups"][1]["momentum"] = 0.9
    words = r"lacks momentum_buffer of 2 of 20 parameters: fc\.weight, fc\.bias"
    with pytest.raises(CheckpointError, match=words):
        read_optimizer(state, MAP)


def test_an_optimizer_before_its_first_step_starts_at_zero():
    for name, words in {
        "sgd, one group": "no momentum_buffer yet",
        "adam": "no exp_avg yet",
    }.items():
        record = read_optimizer(plain(OPTIMIZERS[name](module_of()).state_dict()), MAP)
        assert record.notes[1] == f"{words}, as before the first step; it starts at zero"
        with jax.enable_x64(True):
            state = state_of(
                record, nnx.state(from_torch(plain(module_of().state_dict())), nnx.Param)
            )
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(state))
    assert (
        len(
            read_optimizer(
                plain(OPTIMIZERS["sgd without momentum"](module_of()).state_dict()), MAP
            ).notes
        )
        == 1
    )


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "model.net."])
def test_names_that_wrappers_put_before_the_parameters_are_understood(prefix):
    def stepped(before):
        module = module_of()
        named = [(f"{before}{name}", parameter) for name, parameter in module.named_parameters()]
        optimizer = torch.optim.SGD(named[::-1], lr=0.1, momentum=0.9)
        torch_steps(module, optimizer, None, batches(1))
        return read_optimizer(plain(optimizer.state_dict()), MAP)

    wrapped, bare = stepped(prefix), stepped("")
    assert wrapped.groups == bare.groups
    assert wrapped.notes == bare.notes
    assert same(write_optimizer(wrapped, MAP), write_optimizer(bare, MAP))


def test_a_prefix_that_only_some_names_have_is_part_of_the_name():
    named = [(f"module.{name}", parameter) for name, parameter in module_of().named_parameters()]
    named[0] = ("conv1.weight", named[0][1])
    words = r"names module\.bn1\.weight, .* which the model does not have"
    with pytest.raises(CheckpointError, match=words):
        read_optimizer(_sgd(named), MAP)


def test_parameters_by_name_in_place_of_numbers_are_those_of_a_full_state_dict_of_fsdp():
    state = copy.deepcopy(reference("adamw, named", 2)[-1].optimizer)
    names = state["param_groups"][0].pop("param_names")
    keyed = {
        "state": {names[number]: found for number, found in state["state"].items()},
        "param_groups": [{**state["param_groups"][0], "params": names}],
    }
    record, numbered = read_optimizer(keyed, MAP), reference("adamw, named", 2)[-1].optimizer
    assert same(write_optimizer(record, MAP), keyed)  # the program that wrote it takes it again
    numbered = write_optimizer(read_optimizer(numbered, MAP), MAP)
    assert same(write_optimizer(replace(record, by_name=False), MAP), numbered)


def test_adam_and_adamw_of_an_old_torch_are_not_confused():
    state = plain(torch.optim.AdamW(module_of().parameters(), lr=1e-3).state_dict())
    assert read_optimizer(state, MAP).kind == "adamw"
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    with pytest.raises(CheckpointError, match=r"writes alike.*`optimizer='adam'`"):
        read_optimizer(state, MAP)
    assert read_optimizer(state, MAP, kind="adamw").kind == "adamw"
    for group in state["param_groups"]:
        group["weight_decay"] = 0
    assert read_optimizer(state, MAP).kind == "adam"


def test_flags_that_only_say_how_are_kept():
    state = plain(torch.optim.SGD(module_of().parameters(), lr=0.1, foreach=True).state_dict())
    record = read_optimizer(state, MAP)
    assert write_optimizer(record, MAP)["param_groups"][0]["foreach"] is True


def test_a_fresh_state_can_be_donated():
    """A compiled step donates its state: no array may be in it twice."""
    for kind in ("sgd", "adam", "adamw"):
        state = optimizer_of(fresh_optimizer(kind, MAP)).init(
            nnx.state(from_torch(plain(module_of().float().state_dict())), nnx.Param)
        )
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
