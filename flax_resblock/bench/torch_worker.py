"""PyTorch's side: ``python -m flax_resblock.bench.torch_worker TASK``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from safetensors.torch import load_file

from flax_resblock.bench import worker
from flax_resblock.bench.worker import Alone, Task, TimedProgram, batch_of, config_of, serve
from flax_resblock.parity.reference import torch_reference


def network_of(task: Task, device: str = "cpu") -> Any:
    """The network with the task's weights, in channels last."""
    module: Any = torch_reference(config_of(task.case))
    module.load_state_dict(load_file(task.weights))
    return module.to(device=device, memory_format=torch.channels_last)


def tensors_of(task: Task, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Images in channels last, and labels."""
    images, labels = batch_of(task.case)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(device)
    labels = torch.from_numpy(labels).long().to(device)
    return tensor.contiguous(memory_format=torch.channels_last), labels


def sgd(module: torch.nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """The optimizer of both sides."""
    rate, momentum, decay = worker.LEARNING_RATE, worker.MOMENTUM, worker.DECAY
    return torch.optim.SGD(module.parameters(), rate, momentum, weight_decay=decay, fused=fused)


def train_step(task: Task) -> Callable[[], float]:
    """Loss, gradients and update, as a training loop writes them."""
    module = network_of(task).train()
    network: Any = torch.compile(module) if task.how == "compile" else module
    step = stepping(network, sgd(module), *tensors_of(task))
    return lambda: step().item()


def stepping(
    network: Any,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    forward: AbstractContextManager[Any] | None = None,
) -> Callable[[], torch.Tensor]:
    """A step, which returns the loss; its forward pass is computed within ``forward``."""

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with forward or nullcontext():
            outputs = network(images)
            classifies = outputs.ndim == 2  # a bare block does not
            entropy = torch.nn.functional.cross_entropy
            loss = entropy(outputs, labels) if classifies else outputs.square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def forward(task: Task) -> Callable[[], torch.Tensor]:
    """In evaluation mode; for inference with norms fused by torch.fx, or frozen by the compiler."""
    module = network_of(task).eval()
    if task.case.what == "inference" and task.how == "eager":
        from torch.fx.experimental.optimization import fuse

        module: Any = fuse(module).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if task.how == "compile":
        from torch._inductor import config

        config.freezing = task.case.what == "inference"  # pyright: ignore[reportAttributeAccessIssue]
        module = torch.compile(module)
    images, _ = tensors_of(task)
    return lambda: module(images)


def conversion(task: Task) -> Callable[[], torch.nn.Module]:
    """``torch.load``, then ``load_state_dict``."""
    module = network_of(task)
    path = task.weights.with_suffix(".pth")
    torch.save(module.state_dict(), path)

    def load() -> torch.nn.Module:
        module.load_state_dict(torch.load(path, weights_only=True))
        return module

    return load


def _total(module: torch.nn.Module) -> float:
    return float(sum(tensor.double().sum() for tensor in module.state_dict().values()))


def mean_size(outputs: torch.Tensor) -> float:
    """The mean absolute value."""
    return float(outputs.double().abs().mean())


def program(task: Task, alone: Alone) -> TimedProgram:
    """What the task names; every repetition ends when its result is there."""
    torch.set_num_threads(task.threads)
    torch.set_grad_enabled(task.case.what == "train-step")
    make, value = {
        "train-step": (train_step, float),
        "conversion": (conversion, _total),
    }.get(task.case.what, (forward, mean_size))
    return TimedProgram("cpu", make(task), lambda: None, value)


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(Task.of(sys.argv[1]), program)
