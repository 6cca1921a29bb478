"""Runs a user's own PyTorch module and leaves it, and everything global, as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import numpy as np
import torch


def inner(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside wrappers that only decide where and how it runs."""
    while type(module).__name__ in ("DataParallel", "DistributedDataParallel", "OptimizedModule"):
        module = module.get_submodule("_orig_mod" if hasattr(module, "_orig_mod") else "module")
    return module


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Disables gradients and autocast; restores the random state of torch, numpy and Python."""
    of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)


@contextmanager
def runnable(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """A copy of the module in evaluation mode and float32 on the CPU.

    Where the module cannot be copied it is the module itself, restored afterwards."""
    with ExitStack() as stack:
        try:
            copied = copied_module(module)
        except Exception:  # whatever the module's attributes raise
            stack.enter_context(_restored(module))
            copied = module
        yield copied.to(device="cpu", dtype=torch.float32).eval()


def copied_module(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of the module; of a tensor that an earlier call left in an attribute it has the value,
    without the graph that ``copy.deepcopy`` raises on."""
    left = [
        one
        for part in module.modules()
        for one in vars(part).values()
        if isinstance(one, torch.Tensor) and not one.is_leaf
    ]
    return copy.deepcopy(module, {id(one): one.detach().clone() for one in left})


def draws_numbers(module: torch.nn.Module, *, channels: int, size: tuple[int, int]) -> bool:
    """Whether a module's output in training mode depends on the random state, as with dropout.

    Args:
      module: It is left as it was.
      channels, size: Of the images.
    """
    with global_state_kept(), runnable(inner(module)) as copied:
        copied.train()
        images, outputs = torch.randn(4, channels, *size), []
        for seed in (0, 1):
            torch.manual_seed(seed)
            with suppress(Exception):  # whatever the module's code raises
                outputs.append(copied(images))
    tensors = [one for one in outputs if isinstance(one, torch.Tensor)]
    return len(tensors) == 2 and not torch.equal(*tensors)


@contextmanager
def _restored(module: torch.nn.Module) -> Iterator[None]:
    """Gives the module copies of its tensors; afterwards it has its own and its modes again."""
    parts = list(module.modules())
    before = [(part, part.training, dict(part._parameters), dict(part._buffers)) for part in parts]
    copies: dict[int, Any] = {}

    def copied(tensor: torch.Tensor | None) -> Any:
        if tensor is not None and id(tensor) not in copies:
            value = tensor.detach().clone()
            if isinstance(tensor, torch.nn.Parameter):
                value = torch.nn.Parameter(value, requires_grad=tensor.requires_grad)
            copies[id(tensor)] = value
        return None if tensor is None else copies[id(tensor)]

    try:
        for part, _, parameters, buffers in before:
            part._parameters.update({name: copied(value) for name, value in parameters.items()})
            part._buffers.update({name: copied(value) for name, value in buffers.items()})
        yield
    finally:
        for part, training, parameters, buffers in before:
            part.training = training
            part._parameters.clear()
            part._parameters.update(parameters)
            part._buffers.clear()
            part._buffers.update(buffers)


def randomise(module: torch.nn.Module) -> None:
    """Gives the module random weights in place, and norms that look trained.

    The norms' scales are small enough for the activations of a deep network not to overflow."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 50
                parameter.data.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
        names = ("running_mean", "running_var", "weight")
        mean, var, scale = (getattr(part, name, None) for name in names)
        if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
            mean.normal_(0, 0.3, generator=generator)
            var.uniform_(0.5, 2, generator=generator)
            if isinstance(scale, torch.Tensor):
                scale.data.uniform_(0.3, 0.9, generator=generator)
