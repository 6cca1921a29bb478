"""Every optimizer that a run can have: there and back bit for bit, and 50 steps beside torch."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import CheckpointError
from flax_resblock.checkpoint.torch_file import plain, with_tensors
from flax_resblock.convert.state_map import TensorMap
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT, relative_l2
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.optimizer_state import OptimizerState, read_optimizer, write_optimizer
from flax_resblock.runs.optimizers import moving, optimizer_of, record_of, state_of
from flax_resblock.runs.update_rules import RULES, ParameterStep
from parity_tests.families import import_timm
from parity_tests.optimizer_runs import MAP, module_of
from parity_tests.support import fast_only, same

NAMES = ("layer1.0.conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias", "fc.weight")
ENTRIES = [entry for entry in MAP.parameters if entry.torch_key in NAMES]
SMALL = TensorMap(ENTRIES, ENTRIES)
BEFORE, AFTER = 3, 50
DOCS = Path(__file__).parents[1] / "docs" / "training-runs.md"

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def _timm(name: str, **options: Any) -> Make:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import_timm()
        return getattr(importlib.import_module("timm.optim"), name)(groups, **options)

    return make


def _torch(name: str, **options: Any) -> Make:
    return lambda groups: getattr(torch.optim, name)(groups, **options)


DECAY = {"weight_decay": 0.03}
OTHER = {"betas": (0.7, 0.96), "eps": 1e-6}


class Case(NamedTuple):
    """An optimizer, and an option that makes it another one: the negative control."""

    make: Make
    wrong: dict[str, Any]


CASES = {
    "SGD, dampening": Case(
        _torch("SGD", lr=0.02, momentum=0.8, dampening=0.3, **DECAY), {"dampening": 0.31}
    ),
    "SGD, Nesterov, maximize": Case(
        _torch("SGD", lr=0.02, momentum=0.8, nesterov=True, maximize=True, **DECAY),
        {"maximize": False},
    ),
    "Adam, amsgrad": Case(_torch("Adam", lr=0.01, amsgrad=True, **DECAY), {"eps": 1e-5}),
    "Adam, decoupled decay": Case(
        _torch("Adam", lr=0.01, decoupled_weight_decay=True, **DECAY), {"weight_decay": 0.0}
    ),
    "AdamW, amsgrad, maximize": Case(
        _torch("AdamW", lr=0.01, amsgrad=True, maximize=True, **OTHER), {"betas": (0.7, 0.95)}
    ),
    "AdamW, maximize": Case(
        _torch("AdamW", lr=0.01, maximize=True, foreach=False, **DECAY), {"maximize": False}
    ),
    "AdamW, rate in a tensor": Case(
        _torch("AdamW", lr=torch.tensor([0.01], dtype=torch.float64), foreach=False, **OTHER),
        {"lr": 0.0101},
    ),
    "RMSprop": Case(_torch("RMSprop", lr=0.01, **DECAY), {"alpha": 0.98}),
    "RMSprop, centered, momentum": Case(
        _torch("RMSprop", lr=0.01, centered=True, momentum=0.7, maximize=True, **DECAY),
        {"momentum": 0.71},
    ),
    "Adagrad": Case(
        _torch("Adagrad", lr=0.05, lr_decay=0.01, initial_accumulator_value=0.1, **DECAY),
        {"lr_decay": 0.0},
    ),
    "Adadelta": Case(_torch("Adadelta", lr=0.5, maximize=True, **DECAY), {"rho": 0.91}),
    "NAdam": Case(_torch("NAdam", lr=0.01, **OTHER, **DECAY), {"momentum_decay": 0.005}),
    "NAdam, decoupled decay": Case(
        _torch("NAdam", lr=0.01, decoupled_weight_decay=True, maximize=True, **DECAY),
        {"decoupled_weight_decay": False},
    ),
    "RAdam": Case(_torch("RAdam", lr=0.01, **OTHER, **DECAY), {"eps": 1e-5}),
    "RAdam, decoupled decay": Case(
        _torch("RAdam", lr=0.01, decoupled_weight_decay=True, maximize=True, **DECAY),
        {"decoupled_weight_decay": False},
    ),
    "Adamax": Case(_torch("Adamax", lr=0.01, maximize=True, **OTHER, **DECAY), {"eps": 1e-3}),
    "LAMB (timm)": Case(_timm("Lamb", lr=0.01, **DECAY), {"max_grad_norm": None}),
    "LAMB (timm), other options": Case(
        _timm(
            "Lamb",
            lr=0.01,
            bias_correction=False,
            grad_averaging=False,
            trust_clip=True,
            always_adapt=True,
            decoupled_decay=True,
            **DECAY,
        ),
        {"bias_correction": True},
    ),
    "LARS (timm)": Case(_timm("Lars", lr=0.5, momentum=0.8, **DECAY), {"trust_coeff": 0.0011}),
    "LARS (timm), other options": Case(
        _timm(
            "Lars",
            lr=0.02,
            momentum=0.8,
            nesterov=True,
            trust_coeff=0.05,
            trust_clip=True,
            always_adapt=True,
            **DECAY,
        ),
        {"trust_clip": False},
    ),
}


def _parameters() -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in module_of().named_parameters() if name in NAMES}


def _groups(parameters: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups, the second without decay."""
    named = list(parameters.items())
    return [{"params": named[1::2][::-1]}, {"params": named[::2], "weight_decay": 0.0}]


def _noise(step: int, name: str, shape: Any) -> np.ndarray:
    return np.random.default_rng([step, NAMES.index(name)]).normal(size=tuple(shape))


class There(NamedTuple):
    """torch after a step: the parameters by Flax path, and the optimizer's state dict."""

    values: dict[Any, np.ndarray]
    state: dict[str, Any]


def _stepped(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], step: int
) -> There:
    """A step downhill in a noisy bowl."""
    for name, value in parameters.items():
        noise = torch.from_numpy(_noise(step, name, value.shape))
        value.grad = 0.3 * value.detach() + noise
    optimizer.step()
    arrays = plain({name: value.detach().clone() for name, value in parameters.items()})
    return There(SMALL.to_flax(arrays), copy.deepcopy(plain(optimizer.state_dict())))


@functools.cache
def torch_run(name: str) -> list[There]:
    parameters = _parameters()
    optimizer = CASES[name].make(_groups(parameters))
    return [_stepped(optimizer, parameters, step) for step in range(BEFORE + AFTER)]


def _error(name: str, change: Callable[[OptimizerState], OptimizerState]) -> float:
    """The largest relative difference of any parameter or buffer in :data:`AFTER` steps in JAX."""
    truth = torch_run(name)
    start = truth[BEFORE - 1]
    record = change(read_optimizer(start.state, SMALL))
    rates = np.array([group.options["lr"] for group in record.groups])
    optimizer, worst = optimizer_of(record), 0.0
    params: Any = nnx.State.from_flat_path(
        {path: nnx.Param(jnp.asarray(value)) for path, value in start.values.items()}
    )
    state = state_of(record, params)

    @jax.jit
    def update(params: Any, state: Any, noise: Any) -> Any:
        gradients = jax.tree.map(lambda value, more: 0.3 * value + more, params, noise)
        updates, state = optimizer.update(gradients, state, params, learning_rates=rates)
        return jax.tree.map(lambda value, by: value + by, params, updates), state

    for step in range(BEFORE, BEFORE + AFTER):
        arrays = {e.torch_key: _noise(step, e.torch_key, e.torch_shape) for e in ENTRIES}
        noise = nnx.State.from_flat_path(
            {path: nnx.Param(jnp.asarray(value)) for path, value in SMALL.to_flax(arrays).items()}
        )
        params, state = update(params, state, noise)
        ours = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params)}
        worst = max(worst, *(relative_l2(ours[p], v) for p, v in truth[step].values.items()))
    after, expected = record_of(record, state), read_optimizer(truth[-1].state, SMALL)
    for tensor, found in expected.tensors.items():
        assert after.tensors[tensor].keys() == found.keys()
        worst = max([worst, *(relative_l2(after.tensors[tensor][p], v) for p, v in found.items())])
    assert {p: float(n) for p, n in after.steps.items()} == {
        p: float(n) for p, n in expected.steps.items()
    }
    return worst


def _changed(options: dict[str, Any]) -> Callable[[OptimizerState], OptimizerState]:
    def change(record: OptimizerState) -> OptimizerState:
        groups = [replace(g, options={**g.options, **options}) for g in record.groups]
        return replace(record, groups=tuple(groups))

    return change


def _sorted(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the options of each group in one order."""
    groups = [dict(sorted(group.items())) for group in state["param_groups"]]
    return {"state": state["state"], "param_groups": groups}


OFTEN = ("SGD", "AdamW", "RMSprop", "NAdam", "RAdam", "LAMB (timm)")
"""Optimizers that differ most from one another; the others where there is time."""
LAST = {one: name for name in CASES if (one := name.partition(",")[0]) in OFTEN}
"""The last case of each."""


@pytest.mark.parametrize("name", fast_only(LAST.values(), CASES))
def test_50_steps_are_torchs_and_the_state_goes_there_and_back_bit_for_bit(name):
    with jax.enable_x64(True):
        error = _error(name, lambda record: record)
        assert error <= TRAJECTORY_LIMIT
        assert _error(name, _changed(CASES[name].wrong)) >= 1000 * TRAJECTORY_LIMIT
        before = plain(CASES[name].make(_groups(_parameters())).state_dict())
        states = [before, torch_run(name)[0].state, torch_run(name)[-1].state]
        if name == "Adamax":  # before its first step, it may be the RAdam of an older torch
            with pytest.raises(CheckpointError, match="one of these: adamax, radam"):
                read_optimizer(states.pop(0), SMALL)
        for state in states:
            record = read_optimizer(state, SMALL)
            params: Any = nnx.State.from_flat_path(
                {p: nnx.Param(jnp.asarray(v)) for p, v in torch_run(name)[0].values.items()}
            )
            assert same(_sorted(write_optimizer(record, SMALL)), _sorted(state))
            back = record_of(record, state_of(record, params))
            assert same(_sorted(write_optimizer(back, SMALL)), _sorted(state))
    loaded = []
    for state in (with_tensors(write_optimizer(record, SMALL)), with_tensors(states[-1])):
        again = CASES[name].make(_groups(_parameters()))
        again.load_state_dict(state)
        loaded.append(_sorted(plain(again.state_dict())))
    assert same(*loaded)
    documented = re.search(rf"^\| {re.escape(name)} \| (\S+) \|$", DOCS.read_text("utf-8"), re.M)
    assert documented is not None, f"| {name} | {error:.0e} |"
    assert error / 10 <= float(documented[1]) <= 10 * error, f"| {name} | {error:.0e} |"


@pytest.mark.parametrize("kind", ["radam", "nadam"])
def test_float32_keeps_its_digits_at_every_count(kind):
    """Differences of nearly equal numbers would lose four of them in the first steps."""
    rng, counts = np.random.default_rng(0), (1, 5, 6, 300, 501, 10**6)
    values = {n: rng.uniform(0.5, 1.5, 5) for n in ("value", "gradient", "exp_avg", "exp_avg_sq")}

    def moved(count: int, dtype: Any) -> np.ndarray:
        value, gradient, mean, square = (jnp.asarray(array, dtype) for array in values.values())
        product = jnp.asarray(0.4 if count == 1 else 0.0, dtype)
        kept = {"exp_avg": mean, "exp_avg_sq": square, "mu_product": product}
        momentum = tuple(moving([0.9])[0].tolist())
        options = OPTIMIZERS[kind].options
        step = ParameterStep(
            value, gradient, kept, jnp.asarray(count), 0.1, momentum, None, options
        )
        return np.asarray(RULES[kind](step).by, np.float64)

    with jax.enable_x64(True):
        for count in counts:
            exact, narrow = moved(count, np.float64), moved(count, np.float32)
            assert relative_l2(narrow, exact) <= 16 * np.finfo(np.float32).eps, count


def test_every_optimizer_has_its_row():
    covered = {read_optimizer(torch_run(name)[0].state, SMALL).kind for name in CASES}
    assert covered == {name for name, kind in OPTIMIZERS.items() if kind.package}


def test_a_momentum_that_a_schedule_moves_reaches_the_rules():
    """As torch's OneCycleLR sets it in the param groups."""
    for name in ("NAdam", "RMSprop, centered, momentum"):
        record = read_optimizer(torch_run(name)[BEFORE - 1].state, SMALL)
        values = torch_run(name)[BEFORE - 1].values
        given, own = {"betas": (0.6, 0.96)}, {"momentum": 0.6}
        moved = _changed(given if name == "NAdam" else own)(record)
        with jax.enable_x64(True):
            params: Any = nnx.State.from_flat_path(
                {p: nnx.Param(jnp.asarray(v)) for p, v in values.items()}
            )
            updates = [
                optimizer_of(one).update(params, state_of(one, params), params, momenta=momenta)[0]
                for one, momenta in ((moved, None), (record, moving([0.6, 0.6])), (record, None))
            ]
        first, second, without = (jax.tree.leaves(one) for one in updates)
        for here, there, other in zip(first, second, without, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-12)
            assert not np.allclose(here, other, rtol=1e-6)
