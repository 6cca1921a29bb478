"""An optimizer travels with its run: torch to optax and back bit for bit, and training goes on in
the other framework as if nothing had happened.
"""

import copy
import functools
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from jax.tree_util import GetAttrKey
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from flax_resblock import CheckpointError, ResNetConfig, from_torch, to_torch
from flax_resblock.checkpoint.torch_file import plain, with_tensors
from flax_resblock.convert import StateMap
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT, relative_l2
from flax_resblock.runs.optimizer_state import (
    OptimizerState,
    find_optimizer,
    fresh_optimizer,
    read_optimizer,
    write_optimizer,
)
from flax_resblock.runs.optimizers import optimizer_of, parameter_path, record_of, state_of
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState, read_schedule, write_schedule
from flax_resblock.runs.schedules import Options, Schedule, base_rate
from flax_resblock.training.pace import Pace
from flax_resblock.training.step import TrainState, make_train_step
from parity_tests.test_training import at_the_first_rate
from torch_ref import ResNet
from torch_ref.training import sgd, warmup_cosine

CONFIG = ResNetConfig(depths=(1, 1), widths=(4, 6), stem="cifar", stem_width=4, num_classes=5)
MAP = StateMap(CONFIG, "torchvision")
BATCH, BEFORE, AFTER = 8, 4, 10


def module_of(seed=0):
    torch.manual_seed(seed)
    return ResNet(**asdict(CONFIG)).double()


def _by_ndim(module, first):
    split = [[p for p in module.parameters() if (p.ndim > 1) is kernel] for kernel in (True, False)]
    groups = [{"params": split[0], "weight_decay": 0.02}, {"params": split[1], "weight_decay": 0.0}]
    return groups if first else groups[::-1]


def _head_apart(**options):
    """SGD with momentum whose second group, the head, has other options."""

    def make(module):
        body = [parameter for name, parameter in module.named_parameters() if "fc" not in name]
        return torch.optim.SGD(
            [{"params": body}, {"params": module.fc.parameters(), **options}], lr=0.03, momentum=0.9
        )

    return make


OPTIMIZERS = {
    "sgd, two groups": lambda m: sgd(m, 0.05),
    "sgd, one group": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.03, momentum=0.8, weight_decay=1e-3
    ),
    "sgd without momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.03),
    "sgd, momentum in one group": _head_apart(momentum=0),
    "sgd, two rates": _head_apart(lr=0.09),
    "adam": lambda m: torch.optim.Adam(
        m.parameters(), lr=0.003, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.01
    ),
    "adamw, decay first": lambda m: torch.optim.AdamW(_by_ndim(m, True), lr=0.003),
    "adamw, decay last": lambda m: torch.optim.AdamW(_by_ndim(m, False), lr=0.003),
    "adamw, named": lambda m: torch.optim.AdamW(
        list(m.named_parameters())[::-1], lr=0.003, weight_decay=0.05
    ),
}

RUNS = {name: (make, None) for name, make in OPTIMIZERS.items()} | {
    "sgd, two groups": (
        OPTIMIZERS["sgd, two groups"],
        lambda o: warmup_cosine(o, warmup_steps=3, total_steps=40),
    ),
    "sgd, one cycle": (
        OPTIMIZERS["sgd, two groups"],
        lambda o: OneCycleLR(o, max_lr=[0.1, 0.04], total_steps=BEFORE + AFTER),
    ),
    "adam, one cycle": (
        OPTIMIZERS["adam"],
        lambda o: OneCycleLR(o, max_lr=0.004, total_steps=20, three_phase=True, base_momentum=0.7),
    ),
    "adamw, one cycle": (
        OPTIMIZERS["adamw, decay first"],
        lambda o: OneCycleLR(o, max_lr=[0.002, 0.005], total_steps=16, anneal_strategy="linear"),
    ),
    "sgd, two rates in steps": (OPTIMIZERS["sgd, two rates"], lambda o: StepLR(o, 3, 0.5)),
    "sgd, two rates down to one": (
        OPTIMIZERS["sgd, two rates"],
        lambda o: CosineAnnealingLR(o, 12, eta_min=0.01),
    ),
}
"""Optimizer and scheduler, which is stepped after every batch."""


def batches(count):
    rng = np.random.default_rng(5)
    return [
        (
            adversarial_images(CONFIG, batch=BATCH, height=8, width=7, seed=i),
            rng.integers(0, 5, BATCH),
        )
        for i in range(count)
    ]


def torch_steps(module, optimizer, scheduler, data):
    for images, labels in data:
        loss = torch.nn.functional.cross_entropy(
            module.train()(torch.from_numpy(np.moveaxis(images, -1, 1).copy())),
            torch.from_numpy(labels),
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def set_up(name, seed=0):
    """Module, optimizer and scheduler before the first step."""
    module = module_of(seed)
    optimizer, scheduler = RUNS[name]
    made = optimizer(module)
    return module, made, None if scheduler is None else scheduler(made)


class Moment(NamedTuple):
    """What a torch run could save after a step: the state dicts of its module, optimizer and
    scheduler.
    """

    weights: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None


@functools.cache
def reference(name, steps):
    """A torch run after every step."""
    module, optimizer, scheduler = set_up(name)
    history = []
    for batch in batches(steps):
        torch_steps(module, optimizer, scheduler, [batch])
        states = (
            plain(module.state_dict()),
            plain(optimizer.state_dict()),
            None if scheduler is None else scheduler.state_dict(),
        )
        history.append(Moment(*copy.deepcopy(states)))
    return tuple(history)


def run_of(moment, steps):
    record = read_optimizer(moment.optimizer, MAP)
    if moment.scheduler is None:
        return Run(record, steps=steps)
    options = [group.options for group in record.groups]
    return Run(record, ScheduleState(*read_schedule(moment.scheduler, options)), steps)


COMPILED: dict[str, Any] = {}


def compiled(graphdef, run, pace):
    """The train step; one for all runs whose optimizers differ only in what a step is given: rates,
    and momenta where the schedule moves them.
    """
    given = {"lr", "initial_lr", "max_lr", "min_lr"}
    if pace.rates(pace.start).momenta is not None:
        given |= {"momentum", "betas", "max_momentum", "base_momentum"}
    computes = [
        (
            sorted((key, value) for key, value in group.options.items() if key not in given),
            group.options.get("betas", ())[1:],
            group.paths,
        )
        for group in run.optimizer.groups
    ]
    key = repr((run.optimizer.kind, computes, sorted(given)))
    if key not in COMPILED:
        COMPILED[key] = make_train_step(graphdef, optimizer_of(run.optimizer))
    return COMPILED[key]


def jax_steps(weights, run, data, *, optimizer=None):
    """A run goes on in JAX; yields state dict, run and optimizer state after each step.
    ``optimizer`` takes another one, a chain that begins with a trace.
    """
    with jax.enable_x64(True):
        model = from_torch(weights)
        model.train()
        graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        buffers = state_of(run.optimizer, params)
        if optimizer is not None:
            momentum = run.optimizer.tensors["momentum_buffer"]
            trace = jax.tree_util.tree_map_with_path(
                lambda keys, _: jnp.array(momentum[parameter_path(keys)]), params
            )
            buffers = (optax.TraceState(trace), *optimizer.init(params)[1:])
        state = TrainState(
            *jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, stats)), buffers
        )
        pace = Pace.of(run, 1000)
        step = (
            make_train_step(graphdef, optimizer)
            if optimizer is not None
            else compiled(graphdef, run, pace)
        )
        for number, (images, labels) in enumerate(data, start=pace.start):
            state, _ = step(state, jnp.asarray(images), jnp.asarray(labels), pace.rates(number))
            nnx.update(model, state.params, state.stats)
            yield to_torch(model), pace.after(number + 1), state.opt_state
        assert step.compilations == 1


def worst(ours, theirs):
    return max(relative_l2(ours[key], value) for key, value in theirs.items())


def momentum_of(group):
    return group.options["betas"] if "betas" in group.options else group.options["momentum"]


@functools.cache
def gone_on(name):
    """State dict, run and optimizer after every step in JAX, from where torch was after
    :data:`BEFORE`.
    """
    start = reference(name, BEFORE + AFTER)[BEFORE - 1]
    steps = jax_steps(start.weights, run_of(start, BEFORE), batches(BEFORE + AFTER)[BEFORE:])
    return [
        copy.deepcopy((weights, run, record_of(run.optimizer, state)))
        for weights, run, state in steps
    ]  # the next step takes the arrays' memory


each_run = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in RUNS]
)


@each_run
def test_a_torch_run_goes_on_in_jax(name):
    history = reference(name, BEFORE + AFTER)
    for (ours, _, record), there in zip(gone_on(name), history[BEFORE:], strict=True):
        assert worst(ours, there.weights) <= TRAJECTORY_LIMIT
        expected = read_optimizer(there.optimizer, MAP)
        assert {key: set(found) for key, found in record.tensors.items()} == {
            key: set(found) for key, found in expected.tensors.items()
        }
        for key, found in expected.tensors.items():
            assert all(
                relative_l2(record.tensors[key][path], value) <= TRAJECTORY_LIMIT
                for path, value in found.items()
            )
        assert {path: float(step) for path, step in record.steps.items()} == {
            path: float(step) for path, step in expected.steps.items()
        }
        for group, truth in zip(record.groups, expected.groups, strict=True):
            assert group.options["lr"] == pytest.approx(truth.options["lr"], rel=1e-12)
            assert momentum_of(group) == pytest.approx(momentum_of(truth), rel=1e-12)


@each_run
def test_a_jax_run_goes_on_in_torch(name):
    history, back = reference(name, BEFORE + AFTER), 3
    weights, run, record = gone_on(name)[back - 1]
    module, optimizer, scheduler = set_up(name, seed=9)
    module.load_state_dict(
        {key: torch.from_numpy(np.array(value)) for key, value in weights.items()}, strict=True
    )
    optimizer.load_state_dict(with_tensors(write_optimizer(record, MAP)))
    if scheduler is not None:
        scheduler.load_state_dict(
            write_schedule(run.schedule, [group.options for group in record.groups])
        )
    torch_steps(module, optimizer, scheduler, batches(BEFORE + AFTER)[BEFORE + back :])
    assert worst(plain(module.state_dict()), history[-1].weights) <= TRAJECTORY_LIMIT


def _with_optimizer(run, **changes):
    return replace(run, optimizer=replace(run.optimizer, **changes))


def _with_options(run, **options):
    return _with_optimizer(
        run,
        groups=tuple(
            replace(group, options={**group.options, **options}) for group in run.optimizer.groups
        ),
    )


def _with_schedule(run, schedule, position=BEFORE):
    return replace(run, schedule=ScheduleState(schedule, position))


@dataclass(frozen=True)
class OneShare(Schedule):
    """The share that the first group has, for all of them."""

    schedule: Schedule
    first: Options

    def rate(self, step, group):
        return base_rate(group) * self.schedule.rate(step, self.first) / base_rate(self.first)


def _one_share(run):
    return _with_schedule(run, OneShare(run.schedule.schedule, run.optimizer.groups[0].options))


def _changed(**fields):
    """The run with a schedule whose fields are others."""
    return lambda run: _with_schedule(run, replace(run.schedule.schedule, **fields))


CONTROLS = {
    "buffers dropped": (
        "sgd, two groups",
        lambda run: _with_optimizer(run, tensors={"momentum_buffer": {}}),
    ),
    "decay of the norms": ("sgd, two groups", lambda run: _with_options(run, weight_decay=5e-4)),
    "schedule off by one": (
        "sgd, two groups",
        lambda run: _with_schedule(run, run.schedule.schedule, BEFORE + 1),
    ),
    "no Nesterov": ("sgd, two groups", lambda run: _with_options(run, nesterov=False)),
    "momentum left as it was": ("sgd, one cycle", _changed(cycle_momentum=False)),
    "beta of Adam left as it was": ("adam, one cycle", _changed(cycle_momentum=False)),
    "beta of AdamW left as it was": ("adamw, one cycle", _changed(cycle_momentum=False)),
    "the first group's peak for both": (
        "adamw, one cycle",
        lambda run: _with_options(run, max_lr=0.002, initial_lr=0.002 / 25, min_lr=0.002 / 25e4),
    ),
    "one rate for both": (
        "sgd, two rates in steps",
        lambda run: _with_options(run, initial_lr=0.03),
    ),
    "steps of another length": ("sgd, two rates in steps", _changed(step_size=4)),
    "one share of the rate for both groups": ("sgd, two rates down to one", _one_share),
    "no floor under the cosine": ("sgd, two rates down to one", _changed(eta_min=0.0)),
}


def largest_error(name, change, optimizer=None):
    history = reference(name, BEFORE + AFTER)
    start = history[BEFORE - 1]
    steps = jax_steps(
        start.weights,
        change(run_of(start, BEFORE)),
        batches(BEFORE + AFTER)[BEFORE:],
        optimizer=optimizer,
    )
    return max(
        worst(ours, there.weights)
        for (ours, *_), there in zip(steps, history[BEFORE:], strict=True)
    )


@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_carried_over_wrongly_shows_a_thousandfold(control):
    assert largest_error(*CONTROLS[control]) >= 1000 * TRAJECTORY_LIMIT


def test_decay_after_the_momentum_shows_a_thousandfold():
    def kernels(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: any(getattr(key, "key", None) == "kernel" for key in path), tree
        )

    late = at_the_first_rate(
        optax.trace(0.9, nesterov=True), optax.add_decayed_weights(5e-4, mask=kernels)
    )
    assert largest_error("sgd, two groups", lambda run: run, late) >= 1000 * TRAJECTORY_LIMIT


def test_one_share_of_the_rate_is_right_where_the_schedule_has_no_floor():
    """What spoils the control is the floor, not the wrapper."""
    assert largest_error("sgd, two rates in steps", _one_share) <= TRAJECTORY_LIMIT


def same(ours, theirs):
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(
            same(ours[key], value) for key, value in theirs.items()
        )
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(
            same(a, b) for a, b in zip(ours, theirs, strict=True)
        )
    if isinstance(theirs, np.ndarray):
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.tobytes() == theirs.tobytes()
        )
    return type(ours) is type(theirs) and ours == theirs


AMBIGUOUS = {
    *("sgd, two groups", "sgd, one cycle"),
    *("adamw, decay first", "adamw, decay last", "adamw, one cycle"),
}
"""Runs with as many kernels as biases, which before the first step have no buffer whose shape tells
them apart.
"""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in RUNS),
        ("sgd, two groups", torch.bfloat16),
        ("adamw, one cycle", torch.bfloat16),
        ("adam", torch.float64),
    ],
    ids=str,
)
def test_there_and_back_is_bit_exact(name, dtype):
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
        optimizer = classes[kind](_by_ndim(module, True), lr=0.5)
        optimizer.load_state_dict(with_tensors(write_optimizer(record, MAP)))
        torch_steps(module, optimizer, None, batches(1))
        assert read_optimizer(plain(optimizer.state_dict()), MAP).kind == kind


def test_the_entry_of_a_training_checkpoint_is_found():
    state = plain(sgd(module_of(), 0.1).state_dict())
    for extras in (
        {"optimizer": state},
        {"optimizer_state_dict": state},
        {"optimizer_states": [state], "epoch": 3},
        {"args": {}, "optim": state},
    ):
        name, found = find_optimizer(extras) or ("", {})
        assert name in extras
        assert found is state
    assert find_optimizer({"epoch": 3, "optimizer": "sgd"}) is None


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


def _split_at(number):
    parameters = list(module_of().parameters())
    return [{"params": parameters[:number]}, {"params": parameters[number:]}]


BAD = {
    "no state": (lambda: {"epoch": 1}, "no state of a torch optimizer"),
    "dampening": (
        _edited(lambda groups, _: groups[0].update(dampening=0.1)),
        "param group 0: dampening=0.1 has no counterpart",
    ),
    "amsgrad": (
        _edited(lambda groups, _: groups[0].update(amsgrad=True), "adam"),
        "amsgrad=True has no counterpart",
    ),
    "another optimizer": (
        lambda: plain(torch.optim.RMSprop(module_of().parameters()).state_dict()),
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
    "second moment of one missing": (
        _edited(lambda _, state: state[3].pop("exp_avg_sq"), "adam"),
        "lacks exp_avg_sq of 1 of 20 parameters",
    ),
    "a parameter that Adam never saw": (
        _edited(lambda _, state: state.pop(0), "adam"),
        r"lacks exp_avg of 1 of 20 parameters: conv1\.weight\.",
    ),
    "steps without moments": (
        _edited(_without("exp_avg", "exp_avg_sq"), "adam"),
        "lacks exp_avg of 20 of 20 parameters: .* and 17 more",
    ),
    "steps without second moments": (
        _edited(_without("exp_avg_sq"), "adamw, named"),
        "lacks exp_avg_sq of 20 of 20 parameters",
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
    assert "--weights-only" in str(caught.value)
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


def test_adam_and_adamw_of_an_old_torch_are_not_confused():
    state = plain(torch.optim.AdamW(module_of().parameters(), lr=1e-3).state_dict())
    assert read_optimizer(state, MAP).kind == "adamw"
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    with pytest.raises(CheckpointError, match=r"writes alike.*--optimizer"):
        read_optimizer(state, MAP)
    assert read_optimizer(state, MAP, kind="adamw").kind == "adamw"
    for group in state["param_groups"]:
        group["weight_decay"] = 0
    assert read_optimizer(state, MAP).kind == "adam"


def test_flags_that_only_say_how_are_kept():
    state = plain(torch.optim.SGD(module_of().parameters(), lr=0.1, foreach=True).state_dict())
    record = read_optimizer(state, MAP)
    assert isinstance(record, OptimizerState)
    assert write_optimizer(record, MAP)["param_groups"][0]["foreach"] is True


def test_a_fresh_state_can_be_donated():
    """A compiled step donates its state: no array may be in it twice."""
    for kind in ("sgd", "adam", "adamw"):
        state = optimizer_of(fresh_optimizer(kind, MAP)).init(
            nnx.state(from_torch(plain(module_of().float().state_dict())), nnx.Param)
        )
        pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(pointers)) == len(pointers)
