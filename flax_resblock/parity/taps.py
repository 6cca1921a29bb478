"""Every slot's activation and gradient, on both sides, without a line of tapping code in the models.

PyTorch has forward hooks. For nnx the ``__call__`` of the classes involved is wrapped for the time of one trace; instances outside the model are left
alone. Gradients of activations are those of a zero that is added to each of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Trace:
    """What one run of a model produced, as numpy arrays, images and activations in NHWC.

    Attributes:
      output: ``(N, ...)``.
      activations: By slot name, in the order in which the slots ran.
      statistics: Buffers after the run, by the names of their side.
      gradients: Of parameters, by the names of their side; of activations under ``activation_gradients``.
      input_gradient: Of the input; None when no cotangent was given.
    """

    output: np.ndarray
    activations: dict[str, np.ndarray]
    statistics: dict[Any, np.ndarray]
    gradients: dict[Any, np.ndarray] = field(default_factory=dict)
    activation_gradients: dict[str, np.ndarray] = field(default_factory=dict)
    input_gradient: np.ndarray | None = None


@contextmanager
def hooked(model: nnx.Module, on_output: Callable[[Path, Any], Any]) -> Iterator[None]:
    """Within the block every call of a submodule of ``model`` returns ``on_output(path, its output)``."""
    places = {id(module): path for path, module in nnx.iter_modules(model)}
    defining = {next(base for base in type(m).__mro__ if "__call__" in base.__dict__) for _, m in nnx.iter_modules(model) if callable(m)}
    originals = {cls: cls.__dict__["__call__"] for cls in defining}
    running: set[int] = set()

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in places or id(self) in running:  # not ours, or a call of super().__call__
                return original(self, *args, **kwargs)
            running.add(id(self))
            try:
                output = original(self, *args, **kwargs)
            finally:
                running.discard(id(self))
            return on_output(places[id(self)], output)

        return call

    for cls, original in originals.items():
        setattr(cls, "__call__", wrap(original))  # noqa: B010
    try:
        yield
    finally:
        for cls, original in originals.items():
            setattr(cls, "__call__", original)  # noqa: B010


def trace_flax(model: nnx.Module, images: np.ndarray, slots: Mapping[str, Path], *, train: bool = False, cotangent: np.ndarray | None = None) -> Trace:
    """Runs an nnx model once, compiled, in the dtype of ``images``; the model is left as it was.

    Args:
      model: Called with one array.
      images: ``(N, H, W, C)``.
      slots: Attribute path of every slot by name.
      train: Training mode: batch statistics normalise and update the running ones.
      cotangent: Shape of the output; gradients are those of ``sum(output * cotangent)``.
    """
    twin = nnx.clone(model)
    (twin.train if train else twin.eval)()
    graphdef, params, rest = nnx.split(twin, nnx.Param, ...)
    by_path = {path: name for name, path in slots.items()}

    def run(params: Any, zeros: dict[str, Any], images: Any) -> tuple[Any, Any]:
        module = nnx.merge(graphdef, params, rest, copy=True)
        activations: dict[str, Any] = {}

        def on_output(path: Path, output: Any) -> Any:
            name = by_path.get(path)
            if name is None:
                return output
            activations[name] = output
            return output + zeros[name] if name in zeros else output

        with hooked(module, on_output):
            output = module(images)  # pyright: ignore[reportCallIssue]
        return output, (activations, nnx.state(module, nnx.BatchStat))

    with jax.default_matmul_precision("highest"):
        x = jnp.asarray(images)
        if cotangent is None:
            output, (activations, statistics) = jax.jit(run)(params, {}, x)
            return Trace(_host(output), _host_tree(activations), _by_path(statistics))
        shapes = jax.eval_shape(run, params, {}, x)[1][0]
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}

        def loss(params: Any, zeros: Any, x: Any, weight: Any) -> tuple[Any, Any]:
            output, aux = run(params, zeros, x)
            return jnp.sum(output * weight), (output, *aux)

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
        (of_params, of_activations, of_input), (output, activations, statistics) = gradient(params, zeros, x, jnp.asarray(cotangent))
    return Trace(
        _host(output),
        _host_tree(activations),
        _by_path(statistics),
        _by_path(of_params),
        {name: _host(of_activations[name]) for name in activations},
        _host(of_input),
    )


def trace_torch(module: torch.nn.Module, images: np.ndarray, slots: Mapping[str, str], *, train: bool = False, cotangent: np.ndarray | None = None) -> Trace:
    """Runs a PyTorch module once in the dtype of ``images``; the module is left as it was.

    Args:
      module: Called with one tensor ``(N, C, H, W)``.
      images: ``(N, H, W, C)``.
      slots: Module name of every slot by slot name; ``""`` is the module itself.
      train, cotangent: As for :func:`trace_flax`; the cotangent is in Flax's layout.
    """
    twin = copy.deepcopy(module).train(train)
    x = torch.from_numpy(_channels_first(images)).requires_grad_(cotangent is not None)
    activations: dict[str, torch.Tensor] = {}
    zeros: dict[str, torch.Tensor] = {}

    def tap(name: str) -> Callable[..., Any]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor | None:
            activations[name] = output.detach().clone()  # a following in-place ReLU would overwrite it
            if cotangent is None:
                return None
            zeros[name] = torch.zeros_like(output, requires_grad=True)
            return output + zeros[name]

        return hook

    modules = dict(twin.named_modules())
    for name, place in slots.items():
        modules[place].register_forward_hook(tap(name))
    with torch.set_grad_enabled(cotangent is not None):
        output = twin(x)
        if cotangent is not None:
            (output * torch.from_numpy(_channels_first(cotangent))).sum().backward()
    return Trace(
        _channels_last(output),
        {name: _channels_last(value) for name, value in activations.items()},
        {name: value.detach().numpy() for name, value in twin.named_buffers()},
        {name: value.grad.numpy() for name, value in twin.named_parameters() if value.grad is not None},
        {name: _channels_last(zero.grad) for name, zero in zeros.items() if zero.grad is not None},
        None if x.grad is None else _channels_last(x.grad),
    )


def _channels_first(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(array, -1, 1)) if array.ndim == 4 else array


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    array = tensor.detach().numpy()
    return np.moveaxis(array, 1, -1) if array.ndim == 4 else array


def _host(array: Any) -> np.ndarray:
    return np.asarray(array)


def _host_tree(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: _host(value) for name, value in tree.items()}


def _by_path(state: Any) -> dict[Any, np.ndarray]:
    return {path: _host(variable[...]) for path, variable in dict(nnx.to_flat_state(state)).items()}
