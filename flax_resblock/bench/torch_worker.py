"""PyTorch's side: ``python -m flax_resblock.bench.torch_worker TASK``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from flax_resblock.bench import worker
from flax_resblock.bench.worker import Task, batch_of, config_of, serve
from flax_resblock.parity.reference import torch_reference


def _ready(task: Task) -> torch.nn.Module:
    module = torch_reference(config_of(task.case))
    module.load_state_dict(load_file(task.weights))
    return module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _images(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = batch_of(task.case)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2))
    return tensor.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels).long()


def train_step(task: Task) -> Callable[[], float]:
    """Loss, gradients and update, as a training loop writes them."""
    module = _ready(task).train()
    rate, momentum, decay = worker.LEARNING_RATE, worker.MOMENTUM, worker.DECAY
    optimizer = torch.optim.SGD(module.parameters(), rate, momentum, weight_decay=decay)
    images, labels = _images(task)
    network: Any = torch.compile(module) if task.how == "compile" else module

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        outputs = network(images)
        loss = (
            torch.nn.functional.cross_entropy(outputs, labels)
            if outputs.ndim == 2
            else outputs.square().mean()
        )
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def forward(task: Task) -> Callable[[], torch.Tensor]:
    """In evaluation mode; for inference with norms fused by torch.fx, or frozen by the compiler."""
    module: Any = _ready(task).eval()
    if task.case.what == "inference" and task.how == "eager":
        from torch.fx.experimental.optimization import fuse

        module = fuse(module).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if task.how == "compile":
        from torch._inductor import config

        config.freezing = task.case.what == "inference"  # pyright: ignore[reportAttributeAccessIssue]
        module = torch.compile(module)
    images, _ = _images(task)
    return lambda: module(images)


def conversion(task: Task) -> Callable[[], torch.nn.Module]:
    """``torch.load``, then ``load_state_dict``."""
    module = _ready(task)
    path = task.weights.with_suffix(".pth")
    torch.save(module.state_dict(), path)

    def load() -> torch.nn.Module:
        module.load_state_dict(torch.load(path, weights_only=True))
        return module

    return load


def _total(module: torch.nn.Module) -> float:
    return float(sum(tensor.double().sum() for tensor in module.state_dict().values()))


def main() -> None:
    """Serves one task."""
    task = Task.of(sys.argv[1])
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    if task.case.what == "train-step":
        serve(task.threads, lambda: train_step(task), float)
        return
    torch.set_grad_enabled(False)
    if task.case.what == "conversion":
        serve(task.threads, lambda: conversion(task), _total)
    else:
        serve(task.threads, lambda: forward(task), lambda y: float(y.double().abs().mean()))


if __name__ == "__main__":
    main()
