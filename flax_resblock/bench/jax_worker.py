"""JAX's side: ``python -m flax_resblock.bench.jax_worker TASK``. It never imports torch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_resblock
from flax_resblock.bench import worker
from flax_resblock.bench.worker import Alone, Task, TimedProgram, batch_of, serve
from flax_resblock.cpu.switch import compiler_options, conv_lowering
from flax_resblock.export.inference import compile_inference
from flax_resblock.nn.resnet import ResNet
from flax_resblock.training.pace import Rates
from flax_resblock.training.state import Leaves, split
from flax_resblock.training.step import make_train_step


def sgd() -> optax.GradientTransformationExtraArgs:
    """The same update as ``torch.optim.SGD`` with momentum and decay."""
    return optax.with_extra_args_support(
        optax.chain(
            optax.add_decayed_weights(worker.DECAY),
            optax.sgd(worker.LEARNING_RATE, momentum=worker.MOMENTUM),
        )
    )


def stepping(
    model: nnx.Module, images: jax.Array, labels: jax.Array
) -> tuple[Callable[[], jax.Array], Leaves]:
    """The step of ``flax-resblock train``, which returns the loss, and the state it changes."""
    optimizer = sgd()
    graphdef, state = split(model, optimizer)
    step, leaves = make_train_step(graphdef, optimizer), Leaves(state)
    rates = Rates(np.zeros(1, np.float32))
    return lambda: step.advance(leaves, images, labels, rates).loss, leaves


def train_step(task: Task) -> Callable[[], float]:
    """The step of :func:`stepping`; of a bare block, the same with the mean square as loss."""
    model = flax_resblock.load(task.weights)
    images, labels = (jnp.asarray(array) for array in batch_of(task.case))
    if not isinstance(model, ResNet):
        return _block_step(model, images)
    step, _ = stepping(model, images, labels)
    return lambda: float(step())


def _block_step(model: nnx.Module, images: jax.Array) -> Callable[[], float]:
    model.train()
    optimizer = sgd()
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    leaves, structure = jax.tree.flatten((params, stats, optimizer.init(params)))

    def step(leaves: list[jax.Array], images: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        params, stats, state = jax.tree.unflatten(structure, leaves)

        def loss_of(params: Any) -> Any:
            block = nnx.merge(graphdef, params, stats, copy=True)
            return jnp.mean(jnp.square(block(images))), nnx.state(block, nnx.BatchStat)

        (loss, new), gradients = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return jax.tree.leaves((optax.apply_updates(params, updates), new, state)), loss

    compiled = jax.jit(step, donate_argnums=0, compiler_options=compiler_options())
    held = [[jnp.array(leaf, copy=True) for leaf in leaves]]

    def run() -> float:
        held[0], loss = compiled(held[0], images)
        return float(loss)

    return run


def forward(task: Task) -> Callable[[], jax.Array]:
    """In evaluation mode; for inference as :func:`flax_resblock.compile_inference` prepares it."""
    model = flax_resblock.load(task.weights)
    images = jnp.asarray(batch_of(task.case)[0])
    if task.case.what == "inference" and task.how == "auto":
        compiled = compile_inference(model, images)
        return lambda: jax.block_until_ready(compiled(images))
    graphdef, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)

    def evaluate(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, jax.tree.unflatten(structure, leaves))
        return model(images, use_running_average=True)

    run = jax.jit(evaluate, compiler_options=compiler_options())
    return lambda: jax.block_until_ready(run(leaves, images))


def conversion(task: Task) -> Callable[[], Any]:
    """From PyTorch's names and layout in a file to a model on the device; or the least that this
    can be, its bytes copied in memory."""
    path = task.weights
    if task.how == "copy":
        from safetensors.numpy import load_file

        tensors = load_file(path)
        return lambda: {name: np.copy(tensor) for name, tensor in tensors.items()}

    def load() -> Any:
        return jax.block_until_ready(jax.tree.leaves(nnx.state(flax_resblock.load(path))))

    return load


def _total(tensors: Any) -> float:
    return float(sum(np.asarray(leaf, np.float64).sum() for leaf in jax.tree.leaves(tensors)))


def mean_size(outputs: Any) -> float:
    """The mean absolute value."""
    return float(np.abs(np.asarray(outputs, np.float64)).mean())


def program(task: Task, alone: Alone) -> TimedProgram:
    """What the task names; every repetition ends when its result is there."""
    make, value = {
        "train-step": (train_step, float),
        "conversion": (conversion, _total),
    }.get(task.case.what, (forward, mean_size))
    return TimedProgram("cpu", make(task), lambda: None, value)


def run(program: Callable[[Task, Alone], TimedProgram]) -> None:
    """Serves the task that the command line names."""
    task = Task.of(sys.argv[1])
    with conv_lowering("xla" if task.how == "xla" else "auto"):
        serve(task, program)


if __name__ == "__main__":
    run(program)
