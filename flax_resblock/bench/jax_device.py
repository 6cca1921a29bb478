"""JAX's side on an accelerator: ``python -m flax_resblock.bench.jax_device TASK``. It never imports
torch."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_resblock
from flax_resblock.bench.device_worker import Alone, Program, serve
from flax_resblock.bench.jax_worker import sgd
from flax_resblock.bench.kernels import kernels_of_trace
from flax_resblock.bench.worker import Task, batch_of, resident
from flax_resblock.cpu.switch import conv_lowering
from flax_resblock.export.inference import compile_inference
from flax_resblock.training.pace import Rates
from flax_resblock.training.state import Leaves, split
from flax_resblock.training.step import make_train_step


def _memory() -> int:
    found = jax.devices()[0].memory_stats() or {}
    return found.get("peak_bytes_in_use", resident())


def _profile(run: Callable[[], None]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return kernels_of_trace(Path(folder))


def program(task: Task, alone: Alone) -> Program:
    """The step of ``flax-resblock train``, or the network as ``compile_inference`` prepares it."""
    case = task.case
    if task.device == "gpu" and jax.default_backend() == "cpu":
        raise RuntimeError("jax has no GPU here")
    jax.config.update("jax_default_matmul_precision", {"float32": "highest"}.get(case.precision))
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else None
    model = flax_resblock.load(task.weights, dtype=dtype)
    images, labels = (jax.device_put(array) for array in batch_of(case))
    if case.what == "train-step":
        optimizer = sgd()
        graphdef, state = split(model, optimizer)
        step, leaves = make_train_step(graphdef, optimizer), Leaves(state)
        rates = Rates(np.zeros(1, np.float32))
        last: list[Any] = [leaves.arrays]

        def run() -> jax.Array:
            loss = step.advance(leaves, images, labels, rates).loss
            last[0] = leaves.arrays
            return loss

    else:
        alone.begin()
        compiled = compile_inference(model, images)
        last = [images]

        def run() -> jax.Array:
            last[0] = compiled(images)
            return last[0]

    def wait() -> None:
        jax.block_until_ready(last[0])

    return Program(
        device=jax.devices()[0].device_kind,
        run=run,
        wait=wait,
        value=lambda result: float(np.abs(np.asarray(result, np.float64)).mean()),
        memory=_memory,
        profile=_profile,
    )


def main() -> None:
    """Serves one task."""
    task = Task.of(sys.argv[1])
    with conv_lowering("xla" if task.how == "xla" else "auto"):
        serve(task, program)


if __name__ == "__main__":
    main()
