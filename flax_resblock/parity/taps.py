"""Captures every slot's activation and gradient on both sides, without any code in the models.

PyTorch has hooks. For nnx the ``__call__`` of the classes involved is wrapped during one trace;
instances outside the model are left alone. On the Flax side the gradient of an activation is that
of a zero added to it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.config import Path
from flax_resblock.cpu.compiling import give_memory_back, options_for
from flax_resblock.parity.devices import JaxDevice
from flax_resblock.parity.pair import PRECISIONS, Precision

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trace:
    """What one run of a model produced, as numpy arrays, images and activations in NHWC.

    Attributes:
      output: ``(N, ...)``.
      activations: By slot name, in the order in which the slots ran.
      statistics: Buffers after the run, by the names of their side.
      gradients: Of parameters, by the names of their side; of activations under
        ``activation_gradients``.
      input_gradient: Of the input; None when no cotangent was given.
      inputs: What every slot was fed; only where asked for.
    """

    output: np.ndarray
    activations: dict[str, np.ndarray]
    statistics: dict[Any, np.ndarray]
    gradients: dict[Any, np.ndarray] = field(default_factory=dict)
    activation_gradients: dict[str, np.ndarray] = field(default_factory=dict)
    input_gradient: np.ndarray | None = None
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


@contextmanager
def calls_replaced(
    classes: Iterable[type], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block, ``wrap`` of their own ``__call__`` is that of the classes."""
    originals = {cls: vars(cls)["__call__"] for cls in classes}
    for cls, original in originals.items():
        setattr(cls, "__call__", wrap(original))  # noqa: B010
    try:
        yield
    finally:
        for cls, original in originals.items():
            setattr(cls, "__call__", original)  # noqa: B010


@contextmanager
def hooked(
    model: nnx.Module, on_input: Callable[[Path, Any], Any], on_output: Callable[[Path, Any], Any]
) -> Iterator[None]:
    """Within the block a submodule of ``model`` is called with ``on_input(path, x)`` and returns
    ``on_output(path, y)``."""
    places: dict[int, Any] = {id(module): path for path, module in nnx.iter_modules(model)}
    defining = {
        next(base for base in type(m).__mro__ if "__call__" in base.__dict__)
        for _, m in nnx.iter_modules(model)
        if callable(m)
    }
    running: set[int] = set()

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            # another model's, or a call of super().__call__
            if id(self) not in places or id(self) in running or not args:
                return original(self, *args, **kwargs)
            path = places[id(self)]
            running.add(id(self))
            try:
                output = original(self, on_input(path, args[0]), *args[1:], **kwargs)
            finally:
                running.discard(id(self))
            return on_output(path, output)

        return call

    with calls_replaced(defining, wrap):
        yield


def trace_flax(
    model: nnx.Module,
    images: np.ndarray,
    slots: Mapping[str, Path],
    *,
    train: bool = False,
    cotangent: np.ndarray | None = None,
    precision: Precision = PRECISIONS["float32"],
    device: JaxDevice | None = None,
) -> Trace:
    """Runs an nnx model once, compiled; the model is left as it was.

    Args:
      model: Called with one array; in the same precision, or a narrower one.
      images: ``(N, H, W, C)``, cast to ``precision.storage``.
      train: Training mode: batch statistics normalise and update the running ones.
      cotangent: Shape of the output; gradients are those of ``sum(output * cotangent)``.
      device: To compute on; None: jax's default.
    """
    options = options_for(device, light=cotangent is None)
    with precision.on_jax(device):
        graphdef, params, rest = split_model(model, train)
        by_path = {path: name for name, path in slots.items()}

        def widened(value: Any) -> Any:
            """The same number in the precision of the comparison."""
            floating = jnp.issubdtype(value.dtype, jnp.floating)
            return value.astype(precision.storage) if floating else value

        def run(params: Any, zeros: dict[str, Any], images: Any) -> tuple[Any, Any]:
            state = jax.tree.map(widened, (params, rest))
            module = nnx.merge(graphdef, *state, copy=True)
            activations: dict[str, Any] = {}

            def on_output(path: Path, output: Any) -> Any:
                name = by_path.get(path)
                if name is None:
                    return output
                activations[name] = output
                return output + zeros[name] if name in zeros else output

            with hooked(module, lambda _, value: value, on_output):
                output = module(images)  # pyright: ignore[reportCallIssue]
            return output, (activations, nnx.state(module, nnx.BatchStat))

        x = jnp.asarray(images, precision.storage)
        if cotangent is None:
            compiled = jax.jit(run, compiler_options=options).lower(params, {}, x).compile()
            give_memory_back()
            output, (activations, statistics) = compiled(params, {}, x)
            return Trace(np.asarray(output), host_tree(activations), arrays_by_path(statistics))
        shapes = jax.eval_shape(run, params, {}, x)[1][0]
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}

        def loss(params: Any, zeros: Any, x: Any, weight: Any) -> tuple[Any, Any]:
            output, aux = run(params, zeros, x)
            return jnp.sum(output * weight), (output, *aux)

        gradient = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)
        compiled = jax.jit(gradient, donate_argnums=(1,), compiler_options=options)
        weight = jnp.asarray(cotangent, precision.storage)
        found, (output, activations, statistics) = compiled(params, zeros, x, weight)
        of_params, of_activations, of_input = found
        return Trace(
            np.asarray(output),
            host_tree(activations),
            arrays_by_path(statistics),
            arrays_by_path(of_params),
            {name: np.asarray(of_activations[name]) for name in activations},
            np.asarray(of_input),
        )


def trace_torch(
    module: torch.nn.Module,
    images: np.ndarray,
    slots: Mapping[str, str],
    *,
    train: bool = False,
    cotangent: np.ndarray | None = None,
    precision: Precision = PRECISIONS["float32"],
    device: torch.device = CPU,
    inputs: bool = False,
) -> Trace:
    """Runs a PyTorch module once; the module is left as it was.

    Args:
      module: Called with one tensor ``(N, C, H, W)``; in the same precision.
      images: ``(N, H, W, C)``, cast to ``precision.storage``.
      slots: Module name of every slot by slot name; ``""`` is the module itself.
      train, cotangent, precision: As for :func:`trace_flax`; the cotangent is in Flax's layout.
      inputs: Also keep what every slot was fed.
    """
    # a run without gradients leaves parameters as they are, and those in place are not copied
    in_place = () if cotangent is not None else module.parameters()
    kept = {id(one): one for one in in_place if one.device == device}
    module = copy.deepcopy(module, kept).to(device).train(train)
    x = as_tensor(images, precision, device).requires_grad_(cotangent is not None)
    activations: dict[str, np.ndarray] = {}
    gradients: dict[str, np.ndarray] = {}
    fed: dict[str, np.ndarray] = {}

    def tap(name: str, _: Any, args: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return  # a layer that returns several things is no slot
        if inputs and args and isinstance(args[0], torch.Tensor):
            fed[name] = as_array(args[0], copied=True)
        # a following in-place ReLU would overwrite the output
        activations[name] = as_array(output, copied=True)
        if output.requires_grad:
            output.register_hook(
                lambda gradient: gradients.__setitem__(name, as_array(gradient, copied=True))
            )

    modules = dict(module.named_modules())
    for name, place in slots.items():
        modules[place].register_forward_hook(partial(tap, name))
    with torch.set_grad_enabled(cotangent is not None):
        with precision.of_torch(device):
            output = module(x)
        if cotangent is not None:
            (output * as_tensor(cotangent, precision, device)).sum().backward()
    parameters = () if cotangent is None else module.named_parameters()
    return Trace(
        as_array(output),
        activations,
        {name: value.detach().cpu().numpy() for name, value in module.named_buffers()},
        {name: gradient_of(value).cpu().numpy() for name, value in parameters},
        {name: gradients[name] for name in activations if name in gradients},
        None if x.grad is None else as_array(x.grad),
        fed,
    )


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    """Its gradient; zero where nothing depends on it, as jax has it."""
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def split_model(model: nnx.Module, train: bool, variables: Any = nnx.Param) -> tuple[Any, Any, Any]:
    """Graph, one kind of variables (the parameters) and everything else of a copy of the model in
    training or evaluation mode."""
    copied = nnx.clone(model)
    (copied.train if train else copied.eval)()
    graphdef, chosen, rest = nnx.split(copied, variables, ...)
    return graphdef, chosen, rest


def as_tensor(array: np.ndarray, precision: Precision, device: torch.device = CPU) -> torch.Tensor:
    """A tensor in ``precision.storage``, images from NHWC to NCHW."""
    array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
    return torch.from_numpy(np.array(array, precision.storage, order="C")).to(device)


def as_array(tensor: torch.Tensor, *, copied: bool = False) -> np.ndarray:
    """A numpy array, images from NCHW to NHWC; bfloat16 as float32, which holds it exactly."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array = tensor.numpy()
    array = np.moveaxis(array, 1, -1) if array.ndim == 4 else array
    return np.array(array, order="C") if copied else array  # what is compared with is in C order


def host_tree(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Every array of a mapping as numpy."""
    return {name: np.asarray(value) for name, value in tree.items()}


def arrays_by_path(state: Any) -> dict[Any, np.ndarray]:
    """An nnx state as numpy arrays by attribute path."""
    return {path: np.asarray(variable[...]) for path, variable in nnx.to_flat_state(state)}
