"""Trains a PyTorch module and what it was ported to for some steps, and compares them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import Path
from flax_resblock.parity.inputs import nudged
from flax_resblock.parity.oracle import TORCH_FACTOR
from flax_resblock.parity.pair import Precision
from flax_resblock.parity.taps import as_tensor
from flax_resblock.parity.trajectory import FIRST_STEP
from flax_resblock.port.random_off import no_functional_dropout
from flax_resblock.port.side_by_side import FLOOR, SideBySide, relative_error

STEPS = 5
"""Of SGD with momentum, towards random outputs."""

RATES = 4
"""Rates of learning that are tried at most, each a tenth of the one before."""


def errors_after_steps(
    both: SideBySide, precision: Precision, shape: tuple[int, ...], limit: float
) -> dict[str, float]:
    """The relative error of every weight and statistic after training.

    A deep network may amplify the last bit of its images until its weights say nothing in either
    framework. Where PyTorch's own then move by a share of the limit, both train again more slowly.

    Args:
      both: The module and what it was ported to.
      shape: Of the output.
      limit: Of the errors.
    """
    rng = np.random.default_rng(2)
    images = [both.images + 0.1 * rng.standard_normal(both.images.shape) for _ in range(STEPS)]
    targets = rng.standard_normal(shape)
    moved = [nudged(one, precision.epsilon, rng) for one in images]
    truth, rate = _train_torch(both, images, targets, precision)
    slowest = rate / 10 ** (RATES - 1)
    while True:
        errors = _errors(both.descend(images, targets, precision, rate), truth)
        if max(errors.values()) <= limit or rate <= slowest:
            return errors
        own = _errors(_train_torch(both, moved, targets, precision, rate)[0], truth)
        if max(own.values()) <= limit / TORCH_FACTOR:
            return errors
        truth, rate = _train_torch(both, images, targets, precision, rate / 10)


def _train_torch(
    both: SideBySide,
    images: list[np.ndarray],
    targets: np.ndarray,
    precision: Precision,
    rate: float = 0.0,
) -> tuple[dict[Path, np.ndarray], float]:
    """PyTorch's tensors after a step for each batch, as Flax has them, and the rate.

    Args:
      rate: Of learning; 0: a moderate one.
    """
    module = both.trainable(precision)
    with no_functional_dropout(), torch.enable_grad():
        optimizer = torch.optim.SGD(module.parameters(), momentum=0.9)
        goal = torch.from_numpy(targets)
        for batch in images:
            optimizer.zero_grad()
            torch.mean((module(as_tensor(batch, precision)) - goal) ** 2).backward()
            rate = rate or _moderate(module)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    state = {name.removeprefix("net."): value for name, value in module.state_dict().items()}
    return both.ported.table.to_flax(state_to_numpy(state)), rate


def _moderate(module: torch.nn.Module) -> float:
    """A learning rate at which a step moves no tensor by more than a small share of its norm: with
    a higher one, training amplifies the last bit of a weight."""
    pairs = [(one.grad, one) for one in module.parameters() if one.grad is not None]
    moved = [float(grad.norm() / one.detach().norm()) for grad, one in pairs if one.any()]
    return min(FIRST_STEP / max(moved, default=1.0), 1.0) if any(moved) else 1e-3


def _errors(found: dict[Path, Any], truth: dict[Path, np.ndarray]) -> dict[str, float]:
    """Of every tensor of numbers, by its name."""
    floor = FLOOR * max(float(np.linalg.norm(value)) for value in truth.values())
    return {
        ".".join(map(str, path)): relative_error(found[path], value, floor)
        for path, value in truth.items()
        if value.dtype.kind == "f"
    }
