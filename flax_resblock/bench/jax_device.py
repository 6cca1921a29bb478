"""JAX's side on an accelerator: ``python -m flax_resblock.bench.jax_device TASK``. It never imports
torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import flax_resblock
from flax_resblock.bench.jax_worker import mean_size, run, stepping
from flax_resblock.bench.kernels import kernels_of_trace
from flax_resblock.bench.worker import Alone, Task, TimedProgram, batch_of, resident
from flax_resblock.export.inference import compile_inference


def _memory() -> int:
    found = jax.devices()[0].memory_stats() or {}
    return found.get("peak_bytes_in_use", resident())


def _profile(run: Callable[[], None]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        return kernels_of_trace(Path(folder))


def program(task: Task, alone: Alone) -> TimedProgram:
    """The step of ``flax-resblock train``, or the network as ``compile_inference`` prepares it."""
    case = task.case
    if task.device == "gpu" and jax.default_backend() == "cpu":
        raise RuntimeError("jax has no GPU here")
    jax.config.update("jax_default_matmul_precision", {"float32": "highest"}.get(case.precision))
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else None
    model = flax_resblock.load(task.weights, dtype=dtype)
    images, labels = (jax.device_put(array) for array in batch_of(case))
    if case.what == "train-step":
        step, leaves = stepping(model, images, labels)
        last = [leaves.arrays]

        def repeat() -> jax.Array:
            loss = step()
            last[0] = leaves.arrays
            return loss

    else:
        alone.begin()
        compiled = compile_inference(model, images)
        last: list[Any] = [images]

        def repeat() -> jax.Array:
            last[0] = compiled(images)
            return last[0]

    def wait() -> None:
        jax.block_until_ready(last[0])

    kind = jax.devices()[0].device_kind
    return TimedProgram(kind, repeat, wait, mean_size, _memory, _profile)


if __name__ == "__main__":
    run(program)
