"""A resnet20 moves from PyTorch to JAX amid training and back, and ends where it would have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

from flax_resblock import ResNetConfig, from_torch, load_run, save, to_torch
from flax_resblock.checkpoint.torch_file import plain
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity.oracle import TRAJECTORY_LIMIT, relative_l2
from flax_resblock.runs.optimizer_state import read_optimizer
from flax_resblock.runs.optimizers import record_of
from flax_resblock.runs.run import Run
from flax_resblock.training.data import batches, digits
from parity_tests.optimizer_runs import jax_steps, torch_steps
from parity_tests.support import worst
from torch_ref import ResNet, training

CONFIG = ResNetConfig(
    depths=(3, 3, 3),
    widths=(16, 32, 64),
    stem="cifar",
    stem_width=16,
    in_channels=1,
    num_classes=10,
)
STATE_MAP = StateMap(CONFIG, NAMINGS["torchvision"])
BATCH, WARMUP, TOTAL = 16, 30, 300
LEAVES, RETURNS, STEPS = 20, 40, 200
"""Steps at which the run leaves PyTorch and returns to it, and how long it goes on after each."""

Snapshot = dict[Any, np.ndarray]
"""A run after a step: weights and statistics by key, the optimizer's tensors by name and path."""


def data(
    first: int, last: int, *, dtype: type = np.float64, draw: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels of the steps from ``first`` to before ``last``.

    Args:
      draw: Above 0, chooses by which unit in the last place of a float32 each pixel is moved.
    """
    train = digits().train
    epochs = (batches(train, BATCH, seed=0, epoch=epoch) for epoch in itertools.count())
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), first, last):
        images = batch.images.astype(np.float64)
        if draw:
            units = np.random.default_rng(draw).integers(-1, 2, images.shape)
            images = images * (1 + np.finfo(np.float32).eps * units)
        yield images.astype(dtype), batch.labels.astype(np.int64)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    kernels, rest = (
        [p for p in model.parameters() if (p.ndim > 1) is wanted] for wanted in (True, False)
    )
    groups = [{"params": kernels}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.05)


OPTIMIZERS = {"sgd": lambda model: training.sgd(model, 0.05, weight_decay=5e-4), "adamw": adamw}


def snapshot(weights: dict[str, np.ndarray], record: Any) -> Snapshot:
    buffers = {
        (name, path): np.array(value)
        for name, found in record.tensors.items()
        for path, value in found.items()
    }
    return {**{key: value.copy() for key, value in weights.items()}, **buffers}


class Torch:
    """The run in PyTorch, from its beginning or from a file."""

    def __init__(self, kind: str, path: Path | None = None, *, dtype: Any = np.float64) -> None:
        torch.manual_seed(0 if path is None else 1)
        self.dtype = dtype
        self.model = ResNet(**asdict(CONFIG)).to(torch.from_numpy(np.zeros(1, dtype)).dtype)
        self.optimizer = OPTIMIZERS[kind](self.model)
        self.scheduler = training.warmup_cosine(
            self.optimizer, warmup_steps=WARMUP, total_steps=TOTAL
        )
        if path is not None:  # each casts what it loads to the type that it has
            saved = torch.load(path, weights_only=True)
            self.model.load_state_dict(saved["model"], strict=True)
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["lr_scheduler"])

    def steps(self, first: int, last: int, *, draw: int = 0) -> Iterator[Snapshot]:
        for batch in data(first, last, dtype=self.dtype, draw=draw):
            torch_steps(self.model, self.optimizer, self.scheduler, [batch])
            record = read_optimizer(plain(self.optimizer.state_dict()), STATE_MAP)
            yield snapshot(plain(self.model.state_dict()), record)

    def save(self, path: Path) -> Path:
        both = self.optimizer, self.scheduler
        training.save_checkpoint(path, self.model, *both, epoch=0, step=LEAVES)
        return path


def in_jax(
    path: Path,
    count: int,
    *,
    spoil: Callable[[Run], Run] = lambda run: run,
    dtype: type = np.float64,
    back: Path | None = None,
) -> Iterator[Snapshot]:
    """The run in JAX from a file on; at step :data:`RETURNS` it is saved to ``back``."""
    model, run = load_run(path)
    steps = data(LEAVES, LEAVES + count, dtype=dtype)
    for weights, after, state in jax_steps(to_torch(model), spoil(run), steps):
        record = record_of(after.optimizer, state)
        if back is not None and after.steps == RETURNS:
            save(from_torch(weights), back, run=replace(after, optimizer=record))
        yield snapshot(weights, record)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def stayed(request, tmp_path_factory) -> tuple[str, list[Snapshot], Path]:
    """The run that never leaves PyTorch, and the file that it saved on its way."""
    run = Torch(request.param)
    before = list(run.steps(0, LEAVES))
    path = run.save(tmp_path_factory.mktemp("runs") / "run.pth")
    return request.param, [*before, *run.steps(LEAVES, RETURNS + STEPS)], path


@pytest.mark.slow
def test_200_steps_later_it_is_where_it_would_have_been_and_after_its_return_too(stayed, tmp_path):
    kind, truth, path = stayed
    with jax.enable_x64(True):
        there = in_jax(path, STEPS, back=tmp_path / "back.pth")
        errors = list(map(worst, there, truth[LEAVES : LEAVES + STEPS]))
    assert (len(errors), max(errors) <= TRAJECTORY_LIMIT) == (STEPS, True)
    again = Torch(kind, tmp_path / "back.pth").steps(RETURNS, RETURNS + STEPS)
    returned = list(map(worst, again, truth[RETURNS:]))
    assert (len(returned), max(returned) <= TRAJECTORY_LIMIT) == (STEPS, True)
    kernel = "layer2.1.conv1.weight"
    moved = relative_l2(truth[-1][kernel], truth[LEAVES][kernel])
    assert moved > 0.05  # the path leads somewhere
    print(
        f"{kind}: worst in JAX {max(errors):.1e}, back in PyTorch {max(returned):.1e}; a "
        f"kernel moved by {moved:.2f}"
    )


def _without_buffers(run: Run) -> Run:
    none = {name: {} for name in run.optimizer.tensors}
    return replace(run, optimizer=replace(run.optimizer, tensors=none))


def _one_step_late(run: Run) -> Run:
    assert run.schedule is not None
    return replace(run, schedule=replace(run.schedule, position=LEAVES + 1))


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [_without_buffers, _one_step_late])
def test_what_moves_wrongly_is_a_thousand_times_off(stayed, spoil):
    """As test_optimizer_steps.py shows of decay too, which the same functions carry."""
    _, truth, path = stayed
    with jax.enable_x64(True):
        errors = list(map(worst, in_jax(path, 5, spoil=spoil), truth[LEAVES : LEAVES + 5]))
    assert max(errors) >= 1000 * TRAJECTORY_LIMIT


FIRST = 4
"""Steps in float32 that the oracle judges; after more of them rounding decides."""
DRAWS = 8
"""Other roundings of PyTorch's run: its images moved by one unit in the last place."""


@pytest.fixture(scope="module")
def envelope(stayed, tmp_path_factory) -> tuple[Path, list[Snapshot], list[list[Snapshot]]]:
    """A float32 checkpoint, the float64 truth of its next steps, and PyTorch's float32 steps in
    several roundings."""
    kind, _, wide = stayed
    path = Torch(kind, wide, dtype=np.float32).save(tmp_path_factory.mktemp("narrow") / "run.pth")

    def steps(dtype: type, draw: int = 0) -> list[Snapshot]:
        return list(Torch(kind, path, dtype=dtype).steps(LEAVES, LEAVES + FIRST, draw=draw))

    return path, steps(np.float64), [steps(np.float32, draw) for draw in range(DRAWS + 1)]


def excess(path: Path, truth: list[Snapshot], draws: list[list[Snapshot]], **spoil: Any) -> float:
    """JAX's worst float32 error in units of what the criterion allows; at most 1 passes."""
    most = 0.0
    for step, ours in enumerate(in_jax(path, FIRST, dtype=np.float32, **spoil)):
        for key, value in truth[step].items():
            if np.any(value):
                yardstick = max(relative_l2(draw[step][key], value) for draw in draws)
                allowed = max(4 * yardstick, 8 * float(np.finfo(np.float32).eps))
                most = max(most, relative_l2(ours[key], value) / allowed)
    return most


@pytest.mark.slow
def test_the_first_float32_steps_are_as_exact_as_pytorchs(envelope):
    assert excess(*envelope) <= 1
    assert excess(*envelope, spoil=_without_buffers) >= 1000  # the control
