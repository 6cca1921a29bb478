"""PyTorch's side on an accelerator: ``python -m flax_resblock.bench.torch_device TASK``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from flax_resblock.bench.torch_worker import mean_size, network_of, sgd, stepping, tensors_of
from flax_resblock.bench.worker import Alone, Task, TimedProgram, resident, serve

_WARM = 3
"""Repetitions before a CUDA graph is captured."""


def _settings(task: Task) -> str:
    """The fastest that each precision allows."""
    if task.device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("torch has no GPU here")
    tf32 = task.case.precision != "float32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    return "cuda" if task.device == "gpu" else "cpu"


def _compiled(network: torch.nn.Module, how: str, alone: Alone) -> Any:
    """The network as ``torch.compile`` makes it; with the default mode it compiles before it waits
    for the device."""
    if how == "max-autotune":
        return torch.compile(network, mode=how)
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx

    config.force_non_lazy_backward_lowering = True  # pyright: ignore[reportAttributeAccessIssue]

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        compiled: Any = compile_fx(graph, inputs)

        def run(*arguments: Any) -> Any:
            alone.begin()
            return compiled(*arguments)

        return run

    return torch.compile(network, backend=backend)


def _captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A step as one CUDA graph. The first repetitions are those that warm it up."""
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU of NVIDIA")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm = [step() for _ in range(_WARM)]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def run() -> torch.Tensor:
        if warm:
            return warm.pop(0)
        graph.replay()
        return result

    return run


def _training(task: Task, module: Any, images: Any, labels: Any, alone: Alone) -> Callable[[], Any]:
    """A step as a training loop writes it."""
    network = module
    if task.how in ("compile", "max-autotune"):
        network = _compiled(module, task.how, alone)
    narrow = task.case.precision == "bfloat16"
    kept = task.how != "graph"  # of the weights in bfloat16, which a graph must make itself
    kind = images.device.type
    forward = torch.autocast(kind, torch.bfloat16, enabled=narrow, cache_enabled=kept)
    return stepping(network, sgd(module, fused=images.is_cuda), images, labels, forward)


def _inference(task: Task, module: Any, images: Any, alone: Alone) -> Callable[[], Any]:
    """In evaluation mode, with norms fused."""
    from torch.fx.experimental.optimization import fuse

    network: Any = fuse(module.eval())
    if task.case.precision == "bfloat16":
        network, images = network.bfloat16(), images.bfloat16()
    network = network.to(memory_format=torch.channels_last)
    if task.how in ("compile", "max-autotune"):
        network = _compiled(network, task.how, alone)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return network(images)

    return forward


def program(task: Task, alone: Alone) -> TimedProgram:
    """A training step or inference, in channels last."""
    device = _settings(task)
    module = network_of(task, device)
    images, labels = tensors_of(task, device)
    if task.case.what == "train-step":
        run = _training(task, module.train(), images, labels, alone)
    else:
        run = _inference(task, module, images, alone)
    if task.how == "graph":
        alone.begin()
        run = _captured(run)
    cuda = device == "cuda"
    return TimedProgram(
        device=torch.cuda.get_device_name() if cuda else "cpu",
        run=run,
        wait=torch.cuda.synchronize if cuda else lambda: None,
        value=mean_size,
        memory=torch.cuda.max_memory_allocated if cuda else resident,
        profile=lambda repeat: _profile(repeat, cuda),
    )


def _profile(repeat: Callable[[], None], cuda: bool) -> list[dict[str, Any]]:
    from torch.profiler import ProfilerActivity, profile

    kind = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        repeat()
    found = []
    for event in profiler.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent:
            row = {"name": event.key[:300], "scope": "", "seconds": spent / 1e6}
            found.append(row | {"count": event.count})
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    serve(Task.of(sys.argv[1]), program)
