"""The same training run in both frameworks: same batches, same optimizer, everything compared after
every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx

from flax_resblock.cpu.switch import compiler_options
from flax_resblock.parity.inputs import nudged
from flax_resblock.parity.oracle import FLOAT64_LIMIT, TRAJECTORY_LIMIT, relative_l2
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, Side
from flax_resblock.parity.parts import Devices, Part, Tensors, by_entries
from flax_resblock.parity.taps import arrays_by_path, as_array, as_tensor, split_model
from flax_resblock.runs.optimizers import adamw


@dataclass(frozen=True)
class Recipe:
    """An optimizer in both frameworks.

    Attributes:
      name: ``"sgd"`` or ``"adamw"``.
      weight_decay: In PyTorch's sense: SGD adds it to the gradient, AdamW takes it off the
        parameters.
      momentum: Nesterov's, of SGD.
      learning_rate: 0 before :func:`moderate` has chosen one.
    """

    name: str
    weight_decay: float
    momentum: float = 0.0
    learning_rate: float = 0.0
    eps: float = 1e-8

    def of_torch(self, module: torch.nn.Module) -> torch.optim.Optimizer:
        """PyTorch's own optimizer."""
        options: Any = {"lr": self.learning_rate, "weight_decay": self.weight_decay}
        if self.name == "adamw":
            return torch.optim.AdamW(module.parameters(), eps=self.eps, **options)
        options |= {"momentum": self.momentum, "nesterov": True}
        return torch.optim.SGD(module.parameters(), **options)

    def of_optax(self) -> optax.GradientTransformation:
        """The same in optax."""
        if self.name == "adamw":
            return adamw(self.learning_rate, eps=self.eps, weight_decay=self.weight_decay)
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.sgd(self.learning_rate, momentum=self.momentum, nesterov=True),
        )


RECIPES = MappingProxyType(
    {"sgd": Recipe("sgd", 5e-4, momentum=0.9), "adamw": Recipe("adamw", 0.05)}
)

FIRST_STEP = 0.005
"""How far the first step moves the tensor that it moves most, relative to that tensor. At several
percent a deep network on a small batch is chaotic: the last bit of its input decides after ten
steps where it is, in either framework, and no comparison says anything."""


WIDE_EPS = 1e-4
"""``eps`` of AdamW where gradients vanish but for rounding, see :func:`moderate`."""


@dataclass(frozen=True)
class Trajectory(Part):
    """Training steps from the same start.

    Networks with several logits are trained on cross entropy with random labels, everything else on
    the mean squared distance to a random target.

    Attributes:
      batches: One per step; the logits in evaluation mode are those of the first.
      target: Random, of the output's shape.
    """

    recipe: Recipe
    batches: tuple[np.ndarray, ...]
    target: np.ndarray
    limit64: float = TRAJECTORY_LIMIT

    @property
    def title(self) -> str:
        one = self.recipe
        eps = f", eps {one.eps:g}" if one.eps != Recipe.eps else ""
        return f"training with {one.name}, learning rate {one.learning_rate:.2g}{eps}"

    @property
    def steps(self) -> int:
        """Number of training steps."""
        return len(self.batches)

    @property
    def _labels(self) -> np.ndarray | None:
        classifies = self.target.ndim == 2 and self.target.shape[-1] > 1
        return self.target.argmax(-1) if classifies else None

    def _name(
        self, pair: Pair, loss: Any, parameters: Any, buffers: Any, logits: np.ndarray, side: Side
    ) -> Tensors:
        name = self.recipe.name
        tensors: Tensors = {(f"{name}: loss", "loss"): np.asarray(loss)}
        tensors[f"{name}: eval logits", "output"] = logits
        tensors |= by_entries(pair, f"{name}: parameters", parameters, side=side)
        quantity = f"{name}: running statistics"
        return tensors | by_entries(pair, quantity, buffers, side=side, statistics=True)

    def run(
        self, side: Side, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        run = self._torch if side == "torch" else self._flax
        yield from run(pair, precision, images, devices)

    def _torch(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        device = devices.torch
        module = pair.torch(precision).to(device)
        optimizer = self.recipe.of_torch(module)
        for batch in (images, *self.batches[1:]):
            optimizer.zero_grad()
            loss = self.torch_loss(module.train(), precision, batch, device)
            loss.backward()
            optimizer.step()
            with torch.no_grad(), precision.of_torch(device):
                logits = module.eval()(as_tensor(images, precision, device))
            parameters, buffers = (
                {key: value.detach().cpu().numpy() for key, value in named}
                for named in (module.named_parameters(), module.named_buffers())
            )
            yield self._name(pair, loss.item(), parameters, buffers, as_array(logits), "torch")

    def torch_loss(
        self, module: torch.nn.Module, precision: Precision, batch: np.ndarray, device: torch.device
    ) -> torch.Tensor:
        """The loss of one batch, ready for ``backward()``."""
        with precision.of_torch(device):
            output = module(as_tensor(batch, precision, device))
        output = output.to(as_tensor(np.zeros(1), precision).dtype)
        if self._labels is None:
            return torch.nn.functional.mse_loss(output, as_tensor(self.target, precision, device))
        return torch.nn.functional.cross_entropy(output, torch.from_numpy(self._labels).to(device))

    def _flax(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        optimizer = self.recipe.of_optax()
        with precision.of_jax(), jax.default_device(devices.jax):
            model = pair.flax(precision)
            graphdef, parameters, rest = split_model(model, True)
            evaluating = split_model(model, False)[0]
            state = optimizer.init(parameters)
            target = jnp.asarray(self.target, precision.storage)
            labels = None if self._labels is None else jnp.asarray(self._labels)

        def loss(parameters: Any, rest: Any, batch: Any) -> Any:
            module = nnx.merge(graphdef, parameters, rest, copy=True)
            output = module(batch).astype(precision.storage)  # pyright: ignore[reportCallIssue]
            entropy = optax.softmax_cross_entropy_with_integer_labels
            each = jnp.square(output - target) if labels is None else entropy(output, labels)
            return jnp.mean(each), nnx.state(module, nnx.Not(nnx.Param))

        @partial(jax.jit, compiler_options=compiler_options())
        def step(parameters: Any, rest: Any, state: Any, batch: Any) -> Any:
            differentiated = jax.value_and_grad(loss, has_aux=True)
            (value, rest), gradient = differentiated(parameters, rest, batch)
            updates, state = optimizer.update(gradient, state, parameters)
            return value, optax.apply_updates(parameters, updates), rest, state

        @partial(jax.jit, compiler_options=compiler_options())
        def evaluate(parameters: Any, rest: Any, batch: Any) -> Any:
            return nnx.merge(evaluating, parameters, rest, copy=True)(batch)  # pyright: ignore[reportCallIssue]

        for batch in (images, *self.batches[1:]):
            with precision.on_jax(devices.jax):
                x = jnp.asarray(batch, precision.storage)
                value, parameters, rest, state = step(parameters, rest, state, x)
                y = evaluate(parameters, rest, jnp.asarray(images, precision.storage))
                tensors = arrays_by_path(parameters), arrays_by_path(rest), np.asarray(y)
                found = self._name(pair, value, *tensors, "flax")
            yield found


def moderate(part: Trajectory, pair: Pair) -> Trajectory:
    """The same with a learning rate at which the first step moves no tensor by more than
    :data:`FIRST_STEP` of its norm; as it is where it has a rate.

    A gradient that is nothing but rounding, as of a bias in front of a norm, is divided by its own
    size in AdamW and would move its parameter at random. There ``eps`` is :data:`WIDE_EPS`.
    """
    if part.recipe.learning_rate:
        return part
    precision = PRECISIONS["float64"]
    module = pair.torch(precision).train()
    part.torch_loss(module, precision, part.batches[0], torch.device("cpu")).backward()
    moved, sizes = [0.0], [0.0]
    for parameter in module.parameters():
        norm = float(parameter.detach().norm())
        if parameter.grad is not None:
            sizes.append(float(parameter.grad.abs().max()))
        if parameter.grad is not None and norm:
            first = (1 + part.recipe.momentum) * parameter.grad
            if part.recipe.name == "adamw":
                first = parameter.grad.sign()
            moved.append(float(first.norm()) / norm)
    rate = FIRST_STEP / max(moved) if max(moved) else 1e-3
    recipe = replace(part.recipe, learning_rate=float(f"{rate:.1e}"))
    if any(0 < size < FLOAT64_LIMIT * max(sizes) for size in sizes):
        recipe = replace(recipe, eps=WIDE_EPS)
    return replace(part, recipe=recipe)


def own_spread(part: Trajectory, pair: Pair, images: np.ndarray) -> float:
    """How far PyTorch's float64 run ends from itself when its input moves by one unit in the last
    place: the largest relative difference at any step."""
    exact = PRECISIONS["float64"]
    batches = images, nudged(images, exact.epsilon, np.random.default_rng(2))
    runs = (part.run("torch", pair, exact, batch, Devices()) for batch in batches)
    return max(
        relative_l2(there[key], value)
        for here, there in zip(*runs, strict=True)
        for key, value in here.items()
    )
