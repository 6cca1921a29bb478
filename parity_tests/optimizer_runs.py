"""Short training runs with every kind of optimizer: in torch, and going on in JAX."""

import copy
import functools
from dataclasses import asdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR

from flax_resblock import ResNetConfig, from_torch, to_torch
from flax_resblock.checkpoint.torch_file import plain
from flax_resblock.convert import StateMap
from flax_resblock.parity.inputs import adversarial_images
from flax_resblock.runs.optimizer_state import read_optimizer
from flax_resblock.runs.optimizers import optimizer_of, parameter_path, record_of, state_of
from flax_resblock.runs.run import Run
from flax_resblock.runs.scheduler_state import ScheduleState, read_schedule
from flax_resblock.training.pace import Pace
from flax_resblock.training.state import TrainState
from flax_resblock.training.step import make_train_step
from torch_ref import ResNet
from torch_ref.training import sgd, warmup_cosine

CONFIG = ResNetConfig(depths=(1, 1), widths=(4, 6), stem="cifar", stem_width=4, num_classes=5)
MAP = StateMap(CONFIG, "torchvision")
BATCH, BEFORE, AFTER = 8, 4, 10


def module_of(seed=0):
    torch.manual_seed(seed)
    return ResNet(**asdict(CONFIG)).double()


def by_ndim(module, first):
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
    "adamw, decay first": lambda m: torch.optim.AdamW(by_ndim(m, True), lr=0.003),
    "adamw, decay last": lambda m: torch.optim.AdamW(by_ndim(m, False), lr=0.003),
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
    """What a torch run could save after a step: state dicts of module, optimizer and scheduler."""

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


def compiled(graphdef, run, pace, dtype):
    """The train step; one for all runs whose optimizers differ only in rates and momenta."""
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
    key = repr((run.optimizer.kind, computes, sorted(given), dtype))
    if key not in COMPILED:
        COMPILED[key] = make_train_step(graphdef, optimizer_of(run.optimizer))
    return COMPILED[key]


def jax_steps(weights, run, data, *, optimizer=None):
    """A run goes on in JAX: state dict, run and optimizer state after each step."""
    dtype = next(iter(weights.values())).dtype
    with jax.enable_x64(dtype == np.float64):
        model = from_torch(weights)
        model.train()
        graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
        buffers = state_of(run.optimizer, params)
        if optimizer is not None:
            momentum = run.optimizer.tensors["momentum_buffer"]
            trace = jax.tree_util.tree_map_with_path(
                lambda keys, _: jnp.array(momentum[parameter_path(keys)]), params
            )
            buffers = tuple(
                optax.TraceState(trace) if isinstance(part, optax.TraceState) else part
                for part in optimizer.init(params)
            )
        state = TrainState(
            *jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), (params, stats)), buffers
        )
        pace = Pace.of(run, 1000)
        step = (
            make_train_step(graphdef, optimizer)
            if optimizer is not None
            else compiled(graphdef, run, pace, dtype)
        )
        for number, (images, labels) in enumerate(data, start=pace.start):
            state, _ = step(state, jnp.asarray(images), jnp.asarray(labels), pace.rates(number))
            nnx.update(model, state.params, state.stats)
            yield to_torch(model), pace.after(number + 1), state.opt_state
        assert step.compilations == 1


def momentum_of(group):
    return group.options["betas"] if "betas" in group.options else group.options["momentum"]


@functools.cache
def gone_on(name):
    """State dict, run and optimizer after every step in JAX, from torch's step :data:`BEFORE`."""
    start = reference(name, BEFORE + AFTER)[BEFORE - 1]
    steps = jax_steps(start.weights, run_of(start, BEFORE), batches(BEFORE + AFTER)[BEFORE:])
    return [
        copy.deepcopy((weights, run, record_of(run.optimizer, state)))
        for weights, run, state in steps
    ]  # the next step takes the arrays' memory
