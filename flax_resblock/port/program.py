"""The ported network compiled once, in pieces, for everything that a proof asks of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_resblock.config import Path
from flax_resblock.cpu.pieces import InPieces
from flax_resblock.cpu.switch import conv_lowering
from flax_resblock.nn.variables import flat_arrays, set_values, variable_at
from flax_resblock.parity.pair import Precision
from flax_resblock.parity.taps import Trace, arrays_by_path, calls_replaced, hooked, host_tree


class Program:
    """Runs a model on batches of a shape without compiling again, whatever its weights are.

    Args:
      model: Called with one array; in the same precision; not modified.
      slots: Attribute path of every slot by name.
      precision: To compute in.
      train: Training mode, with gradients.
      tracer: A single thread that traces the model.
    """

    def __init__(
        self,
        model: nnx.Module,
        slots: Mapping[str, Path],
        precision: Precision,
        *,
        train: bool,
        tracer: Executor,
    ) -> None:
        self.precision, self.train, self._tracer = precision, train, tracer
        with precision.on_jax(None):
            copied = nnx.clone(model)
            (copied.train if train else copied.eval)()
            self._split = nnx.split(copied)
            self.params = arrays_by_path(nnx.state(copied, nnx.Param))
            self.statistics = arrays_by_path(nnx.state(copied, nnx.BatchStat))
        self._runs: dict[tuple[int, ...], Future[InPieces]] = {}
        self._slots = {path: name for name, path in slots.items()}
        self._paths = tuple(self.params), tuple(self.statistics)

    def __call__(
        self, images: np.ndarray, weight: np.ndarray | None = None, pull: float = 0.0
    ) -> Trace:
        """Runs the model with :attr:`params` and :attr:`statistics`, and leaves them as they are.

        Args:
          images: The input.
          weight: Of every output. In training mode the gradients are those of
            ``sum(output * weight) + pull / 2 * sum(output**2)``.
          pull: Of all outputs towards zero.
        """
        run = self.compile(images, weight).result()
        with self.precision.on_jax(None):
            state = list(self.params.values()), list(self.statistics.values())
            arguments = jax.device_put(state, may_alias=True)
            numbers = (images, weight, pull) if self.train else (images,)
            arguments = *arguments, *(jnp.asarray(n, self.precision.storage) for n in numbers)
            if not self.train:
                output, (activations, _) = run(*arguments)
                return Trace(np.asarray(output), host_tree(activations), self.statistics)
            found, output, (activations, statistics) = run(*arguments)
            of_params, of_input = found
            return Trace(
                np.asarray(output),
                host_tree(activations),
                dict(zip(self._paths[1], map(np.asarray, statistics), strict=True)),
                dict(zip(self._paths[0], map(np.asarray, of_params), strict=True)),
                input_gradient=np.asarray(of_input),
            )

    def compile(self, images: np.ndarray, weight: np.ndarray | None = None) -> Future[InPieces]:
        """Begins to compile, in threads of its own, unless images of this shape were here before.

        Args:
          images, weight: As for a call; their numbers do not matter.
        """
        if images.shape not in self._runs:
            self._runs[images.shape] = self._tracer.submit(self._traced, images, weight)
        return self._runs[images.shape]

    def _traced(self, images: np.ndarray, weight: np.ndarray | None) -> InPieces:
        shapes = [images.shape, *(() if weight is None else (weight.shape, ()))]
        with self.precision.on_jax(None), conv_lowering("xla"):
            state = list(self.params.values()), list(self.statistics.values())
            run = self._gradients if self.train else self._outputs
            dtype = self.precision.storage
            return InPieces(run, *state, *(jax.ShapeDtypeStruct(one, dtype) for one in shapes))

    def descend(
        self, batches: Sequence[np.ndarray], targets: np.ndarray, rate: float
    ) -> dict[Any, np.ndarray]:
        """Takes a step of SGD with momentum 0.9 for each batch, down the mean squared distance of
        the outputs to the targets.

        Returns:
          Every array of the model afterwards.
        """
        before = self.params, self.statistics
        self.params = dict(self.params)
        momentum = {path: np.zeros_like(value) for path, value in self.params.items()}
        pull = 2 / targets.size
        for batch in batches:
            found = self(batch, -pull * targets, pull)
            self.statistics = found.statistics
            for path, gradient in found.gradients.items():  # one by one: all fill much memory
                momentum[path] = 0.9 * momentum[path] + gradient
                self.params[path] = self.params[path] - rate * momentum[path]
            del found
        with self.precision.on_jax(None):
            model: Any = nnx.merge(*self._split, copy=True)
            set_values(model, {**self.params, **self.statistics})
        self.params, self.statistics = before
        return flat_arrays(model)

    def _outputs(self, params: Any, statistics: Any, images: jax.Array) -> tuple[Any, Any]:
        """The output; beside it the activations and the statistics afterwards."""
        module: Any = nnx.merge(*self._split, copy=True)
        paths = (*self._paths[0], *self._paths[1])
        set_values(module, dict(zip(paths, (*params, *statistics), strict=True)))
        activations: dict[str, Any] = {}

        def keep(path: Path, output: Any) -> Any:
            if path in self._slots:
                activations[self._slots[path]] = output
            return output

        with _traced_once(module), hooked(module, lambda _, value: value, keep):
            output = module(images)
        after = [variable_at(module, path)[...] for path in self._paths[1]]
        return output, (activations, after)

    def _gradients(
        self, params: Any, statistics: Any, images: jax.Array, weight: jax.Array, pull: jax.Array
    ) -> tuple[Any, Any, Any]:
        """The gradients of parameters and input, and what :meth:`_outputs` returns."""

        def forward(params: Any, images: jax.Array) -> Any:
            return self._outputs(params, statistics, images)

        output, backward, more = jax.vjp(forward, params, images, has_aux=True)
        return backward(weight + pull * output), output, more


@contextmanager
def _traced_once(model: nnx.Module) -> Iterator[None]:
    """Within it, layers of this library that are equal but for their numbers are traced once for
    inputs of each shape. :class:`InPieces` takes apart what that makes one operation."""
    parts = [part for _, part in nnx.iter_modules(model) if not _has_parts(part)]
    layers = [part for part in parts if type(part).__module__.startswith("flax_resblock.nn.")]
    own = {id(part) for part in layers}
    classes = {type(part) for part in layers if "__call__" in vars(type(part))}

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        @partial(jax.jit, static_argnums=0)
        def traced(graph: Any, state: Any, *arguments: Any) -> tuple[Any, Any]:
            layer = nnx.merge(graph, state)
            return original(layer, *arguments), nnx.state(layer)

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            arrays = all(isinstance(one, jax.Array) for one in arguments)
            if id(self) not in own or named or not arrays:
                return original(self, *arguments, **named)
            output, state = traced(*nnx.split(self), *arguments)
            nnx.update(self, state)
            return output

        return call

    with calls_replaced(classes, wrap):
        yield


def _has_parts(module: nnx.Module) -> bool:
    return any(isinstance(one, nnx.Module) for _, one in nnx.iter_children(module))
