"""An optimizer travels with its run: torch to optax and back bit for bit, and training goes on in the other framework as if nothing had happened."""

import copy
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import CheckpointError, ResNetConfig, from_torch, to_torch
from flax_resblock.checkpoint.torch_file import plain, with_tensors
from flax_resblock.convert import LAYOUTS, StateMap
from flax_resblock.convert.optimizer import Group, OptimizerState, find, fresh, read, write
from flax_resblock.optimizers import direction_of, record_of, state_of
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT, relative_l2
from torch_ref import ResNet
from torch_ref.training import sgd, warmup_cosine
from train.schedule import WarmupCosine
from train.step import TrainState, make_train_step

CONFIG = ResNetConfig(depths=(1, 1), widths=(4, 6), stem="cifar", stem_width=4, num_classes=5)
MAP = StateMap(CONFIG, LAYOUTS["torchvision"])
BATCH, BEFORE, AFTER = 8, 4, 10


def module_of(seed=0):
    torch.manual_seed(seed)
    return ResNet(**asdict(CONFIG)).double()


def _by_ndim(module, first):
    kernels, rest = [p for p in module.parameters() if p.ndim > 1], [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": 0.02}, {"params": rest, "weight_decay": 0.0}]
    return groups if first else groups[::-1]


OPTIMIZERS = {
    "sgd, two groups": lambda m: sgd(m, 0.05),
    "sgd, one group": lambda m: torch.optim.SGD(m.parameters(), lr=0.03, momentum=0.8, weight_decay=1e-3),
    "sgd without momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.03),
    "sgd, two rates": lambda m: torch.optim.SGD(
        [{"params": [p for n, p in m.named_parameters() if "fc" not in n]}, {"params": m.fc.parameters(), "lr": 0.09}], lr=0.03, momentum=0.9
    ),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.003, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.01),
    "adamw, decay first": lambda m: torch.optim.AdamW(_by_ndim(m, True), lr=0.003),
    "adamw, decay last": lambda m: torch.optim.AdamW(_by_ndim(m, False), lr=0.003),
    "adamw, named": lambda m: torch.optim.AdamW(list(m.named_parameters())[::-1], lr=0.003, weight_decay=0.05),
}


def batches(count):
    rng = np.random.default_rng(5)
    return [(adversarial_images(CONFIG, batch=BATCH, height=8, width=7, seed=i), rng.integers(0, 5, BATCH)) for i in range(count)]


def torch_steps(module, optimizer, scheduler, data):
    for images, labels in data:
        loss = torch.nn.functional.cross_entropy(module.train()(torch.from_numpy(np.moveaxis(images, -1, 1).copy())), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def schedule_for(optimizer, name):
    return warmup_cosine(optimizer, warmup_steps=3, total_steps=40) if name.startswith("sgd, two groups") else None


def rates(optimizer, name):
    """The first group's learning rate by step."""
    peak = optimizer.param_groups[0].get("initial_lr", optimizer.param_groups[0]["lr"])
    return WarmupCosine(peak=peak, warmup_steps=3, total_steps=40) if schedule_for(optimizer, name) is not None else lambda _: peak


def jax_steps(state_dict, record, rate, data, first):
    """Steps in JAX from a torch state dict and optimizer record; yields state dict and record after each."""
    with jax.enable_x64(True):
        model = from_torch(state_dict)
        model.train()
        graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        direction = direction_of(record)
        step = make_train_step(graphdef, direction)
        state = TrainState(*jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, stats)), state_of(record, params))
        for number, (images, labels) in enumerate(data, start=first):
            state, _ = step(state, jnp.asarray(images), jnp.asarray(labels), rate(number))
            nnx.update(model, state.params, state.stats)
            yield to_torch(model), record_of(record, state.opt_state)


def worst(ours, theirs):
    return max(relative_l2(ours[key], value) for key, value in theirs.items())


def reference(name, steps):
    """State dicts and optimizer states of a torch run, after every step."""
    module = module_of()
    optimizer = OPTIMIZERS[name](module)
    scheduler = schedule_for(optimizer, name)
    history = []
    for batch in batches(steps):
        torch_steps(module, optimizer, scheduler, [batch])
        history.append((copy.deepcopy(plain(module.state_dict())), copy.deepcopy(plain(optimizer.state_dict()))))
    return optimizer, history


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_torch_run_goes_on_in_jax(name):
    optimizer, history = reference(name, BEFORE + AFTER)
    weights, state = history[BEFORE - 1]
    rate = rates(optimizer, name)
    steps = jax_steps(weights, read(state, MAP), rate, batches(BEFORE + AFTER)[BEFORE:], BEFORE)
    for (ours, record), (theirs, truth) in zip(steps, history[BEFORE:], strict=True):
        assert worst(ours, theirs) <= TRAJECTORY_LIMIT
        expected = read(truth, MAP).tensors
        assert {key: set(found) for key, found in record.tensors.items()} == {key: set(found) for key, found in expected.items()}
        for key, found in expected.items():
            assert all(relative_l2(record.tensors[key][path], value) <= TRAJECTORY_LIMIT for path, value in found.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_jax_run_goes_on_in_torch(name):
    optimizer, history = reference(name, BEFORE + AFTER)
    weights, state = history[0]
    rate = rates(optimizer, name)
    *_, (now, record) = jax_steps(weights, read(state, MAP), rate, batches(BEFORE)[1:], 1)
    module = module_of(9)
    module.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in now.items()}, strict=True)
    again = OPTIMIZERS[name](module)
    scheduler = schedule_for(again, name)
    truth = history[BEFORE - 1][1]  # the rates of step 4, as the scheduler has them
    saved = write(record, MAP)
    for group, there in zip(saved["param_groups"], truth["param_groups"], strict=True):
        group["lr"] = there["lr"]
        if "param_names" in there:
            group["param_names"] = there["param_names"]
    again.load_state_dict(with_tensors(saved))
    if scheduler is not None:
        for _ in range(BEFORE):
            scheduler.step()
        for group, there in zip(again.param_groups, truth["param_groups"], strict=True):
            group["lr"] = there["lr"]
    torch_steps(module, again, scheduler, batches(BEFORE + AFTER)[BEFORE:])
    assert worst(plain(module.state_dict()), history[-1][0]) <= TRAJECTORY_LIMIT


def _dropped(record):
    return replace(record, tensors={name: {} for name in record.tensors})


def _decaying_norms(record):
    decay = max(float(group.options["weight_decay"]) for group in record.groups)
    return replace(record, groups=tuple(Group({**g.options, "weight_decay": decay}, g.paths) for g in record.groups))


def _no_nesterov(record):
    return replace(record, groups=tuple(Group({**g.options, "nesterov": False}, g.paths) for g in record.groups))


CONTROLS = {
    "buffers dropped": (_dropped, lambda rate: rate),
    "decay of the norms": (_decaying_norms, lambda rate: rate),
    "schedule off by one": (lambda record: record, lambda rate: lambda step: rate(step + 1)),
    "no Nesterov": (_no_nesterov, lambda rate: rate),
    "decay after the momentum": (lambda record: record, lambda rate: rate),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_what_is_carried_over_wrongly_shows_a_thousandfold(control, monkeypatch):
    name = "sgd, two groups"
    optimizer, history = reference(name, BEFORE + AFTER)
    weights, state = history[BEFORE - 1]
    change, shift = CONTROLS[control]
    record = change(read(state, MAP))
    if control == "decay after the momentum":
        import optax

        import parity_tests.test_optimizer_state as here

        mask = {e.flax_path: e.flax_path[-1] == "kernel" for e in MAP.entries}
        path = lambda keys: tuple(k.key for k in keys if isinstance(k, jax.tree_util.DictKey))  # noqa: E731
        chosen = lambda tree: jax.tree_util.tree_map_with_path(lambda keys, _: mask[path(keys)], tree)  # noqa: E731
        late = optax.chain(optax.trace(0.9, nesterov=True), optax.add_decayed_weights(5e-4, mask=chosen))
        monkeypatch.setattr(here, "direction_of", lambda *_: late)
        monkeypatch.setattr(here, "state_of", lambda r, p: (state_of(r, p), late.init(p)[1]))
        monkeypatch.setattr(here, "record_of", lambda r, s: r)
        steps = here.jax_steps(weights, record, shift(rates(optimizer, name)), batches(BEFORE + AFTER)[BEFORE:], BEFORE)
    else:
        steps = jax_steps(weights, record, shift(rates(optimizer, name)), batches(BEFORE + AFTER)[BEFORE:], BEFORE)
    errors = [worst(ours, theirs) for (ours, _), (theirs, _) in zip(steps, history[BEFORE:], strict=True)]
    assert max(errors) >= 1000 * TRAJECTORY_LIMIT


def same(ours, theirs):
    if isinstance(theirs, dict):
        return list(ours) == list(theirs) and all(same(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))
    if isinstance(theirs, np.ndarray):
        return ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
    return type(ours) is type(theirs) and ours == theirs


def without_names(state):
    """Names tell which number is which; the way back numbers the parameters without them."""
    return {**state, "param_groups": [{k: v for k, v in group.items() if k != "param_names"} for group in state["param_groups"]]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_there_and_back_is_bit_exact(name, steps, dtype):
    module = module_of().to(dtype)
    optimizer = OPTIMIZERS[name](module)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    original = plain(optimizer.state_dict())
    if not steps and name in ("sgd, two groups", "adamw, decay first", "adamw, decay last"):  # as many kernels as biases, and no buffer whose shape tells
        with pytest.raises(CheckpointError, match=r"fits 2 of the usual ways: biases (fir|la)st, kernels (fir|la)st"):
            read(original, MAP)
        return
    record = read(original, MAP)
    assert same(write(record, MAP), without_names(original))
    with jax.enable_x64(True):
        params = nnx.state(from_torch(plain(module.state_dict())), nnx.Param)
        back = write(record_of(record, state_of(record, params)), MAP)
    assert same(back, without_names(original))


def test_the_buffers_hold_what_torch_calls_them():
    _, history = reference("adamw, decay last", 2)
    record = read(history[-1][1], MAP)
    with jax.enable_x64(True):
        state = state_of(record, nnx.state(from_torch(history[-1][0]), nnx.Param))
    assert int(state.count) == 2
    kernel = state.mu["stage1"][0]["conv1"]["kernel"]
    number = [path for group in record.groups for path in group.paths].index(("stage1", 0, "conv1", "kernel"))
    np.testing.assert_array_equal(np.asarray(jax.tree.leaves(kernel)[0]), history[-1][1]["state"][number]["exp_avg"].transpose(2, 3, 1, 0))


def test_an_optimizer_made_here_is_one_that_torch_takes():
    for kind, settings in (("sgd", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}), ("adamw", {"lr": 1e-3}), ("adam", {})):
        record = fresh(kind, MAP, **settings)
        module = module_of()
        classes = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
        optimizer = classes[kind](_by_ndim(module, True), lr=0.5)
        optimizer.load_state_dict(with_tensors(write(record, MAP)))
        torch_steps(module, optimizer, None, batches(1))
        assert read(plain(optimizer.state_dict()), MAP).kind == kind


def test_the_entry_of_a_training_checkpoint_is_found():
    state = plain(sgd(module_of(), 0.1).state_dict())
    for extras in ({"optimizer": state}, {"optimizer_state_dict": state}, {"optimizer_states": [state], "epoch": 3}, {"args": {}, "optim": state}):
        name, found = find(extras) or ("", {})
        assert name in extras
        assert found is state
    assert find({"epoch": 3, "optimizer": "sgd"}) is None


def _edited(change, name="sgd, two groups"):
    _, history = reference(name, 1)
    state = copy.deepcopy(history[-1][1])
    change(state)
    return state


BAD = {
    "no state": (lambda: {"epoch": 1}, "no state of a torch optimizer"),
    "dampening": (lambda: _edited(lambda s: s["param_groups"][0].update(dampening=0.1)), "param group 0: dampening=0.1 has no counterpart"),
    "amsgrad": (lambda: _edited(lambda s: s["param_groups"][0].update(amsgrad=True), "adam"), "amsgrad=True has no counterpart"),
    "another optimizer": (lambda: plain(torch.optim.RMSprop(module_of().parameters()).state_dict()), "no optimizer with a counterpart here"),
    "another model": (lambda: plain(torch.optim.SGD(torch.nn.Linear(3, 4).parameters(), momentum=0.9).state_dict()), "it has 2 parameters, the model 20"),
    "unknown names": (lambda: plain(torch.optim.SGD([(f"x.{n}", p) for n, p in module_of().named_parameters()]).state_dict()), r"it names x\.conv1\.weight"),
    "names missing": (lambda: plain(torch.optim.SGD(list(module_of().named_parameters())[1:]).state_dict()), r"leaves out conv1\.weight"),
    "an odd split": (
        lambda: plain(torch.optim.SGD([{"params": list(module_of().parameters())[:5]}, {"params": list(module_of().parameters())[5:]}]).state_dict()),
        "param groups of 5 . 15 parameters, which does not fit any",
    ),
    "a wrong shape": (lambda: _edited(lambda s: s["state"][0].update(momentum_buffer=np.zeros((2, 2)))), "does not fit any"),
    "steps that differ": (lambda: _edited(lambda s: s["state"][3].update(step=np.array(9.0, np.float32)), "adam"), "updated a different number of times"),
    "an unknown tensor": (lambda: _edited(lambda s: s["state"][3].update(square_avg=s["state"][3]["momentum_buffer"])), "keeps square_avg per parameter"),
    "an unknown option": (lambda: _edited(lambda s: s["param_groups"][1].update(trust=1)), "param group 1 has options that sgd does not know: trust"),
    "a missing option": (lambda: _edited(lambda s: s["param_groups"][1].pop("nesterov")), "param group 1 lacks nesterov"),
    "tensors of no parameter": (lambda: _edited(lambda s: s["state"].update({77: {}})), "parameters 77 that are in none"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_counterpart_is_refused_by_name(case):
    make, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        read(make(), MAP)
    assert "--weights-only" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_adam_and_adamw_of_an_old_torch_are_not_confused():
    state = plain(torch.optim.AdamW(module_of().parameters(), lr=1e-3).state_dict())
    assert read(state, MAP).kind == "adamw"
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    with pytest.raises(CheckpointError, match=r"writes alike.*--optimizer"):
        read(state, MAP)
    assert read(state, MAP, kind="adamw").kind == "adamw"
    for group in state["param_groups"]:
        group["weight_decay"] = 0
    assert read(state, MAP).kind == "adam"


def test_flags_that_only_say_how_are_kept():
    state = plain(torch.optim.SGD(module_of().parameters(), lr=0.1, foreach=True).state_dict())
    record = read(state, MAP)
    assert isinstance(record, OptimizerState)
    assert write(record, MAP)["param_groups"][0]["foreach"] is True
