"""A PyTorch module and what it was ported to, with the same moved weights, run side by side."""

from __future__ import annotations

import copy
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import Path
from flax_resblock.nn.variables import on_device, set_values
from flax_resblock.parity.inputs import nudged
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS, Precision
from flax_resblock.parity.taps import Trace, as_tensor, trace_torch
from flax_resblock.port.calls import MOST_CALLS, Bounded
from flax_resblock.port.graphs import leaves
from flax_resblock.port.inputs import Shapes, in_one_array, random_inputs, unpacked, unpacked_last
from flax_resblock.port.network import PortedNetwork
from flax_resblock.port.operator_results import Dtypes, Rounded
from flax_resblock.port.program import Program
from flax_resblock.port.random_off import drop_nothing, no_functional_dropout, switch_off

SMALL = 64 * 64
"""Pixels of an image that is small enough for a larger batch. With few values a channel the
gradient of batch norm is a small difference of large numbers."""

FLOOR = 1e-2
"""Gradients are compared relative to themselves, or to this share of the largest of their kind:
that of a bias in front of a norm is zero but for rounding."""

MEDIUM = 96 * 96
"""Pixels of an image that a network asks for which leaves a single one of a smaller one: the norms
at its end have no more values a channel than there are images."""


def images_of(channels: int, size: tuple[int, int]) -> np.ndarray:
    """Random images ``(N, H, W, C)`` whose channels have different means, small ones: the gradient
    of a stem in front of batch norm is what is left of a sum to which they contribute nothing."""
    rng = np.random.default_rng(0)
    pixels = size[0] * size[1]
    batch = 6 if pixels <= SMALL else 12 if pixels <= MEDIUM else 3
    images = rng.standard_normal((batch, *size, channels))
    return images + np.linspace(-0.1, 0.2, channels)


class FlatNetwork(nnx.Module):
    """The network with what it returns in one array, in PyTorch's order.

    Args:
      net: The network.
      shapes: Of its inputs, which are one array.
      count: How many of its outputs; None: all.
    """

    def __init__(self, net: Any, shapes: Shapes, count: int | None = None) -> None:
        self.net, self.shapes, self.count = net, shapes, count

    def __call__(self, x: jax.Array) -> jax.Array:
        found = leaves(self.net(*unpacked_last(x, self.shapes)))
        return in_one_array([one for one in found if one is not None][: self.count])


class FlatModule(torch.nn.Module):
    """The module with what it returns in one tensor.

    Attributes:
      count: How many of its outputs; None: all.
    """

    def __init__(self, net: torch.nn.Module, shapes: Shapes) -> None:
        super().__init__()
        self.net, self.shapes = net, shapes
        self.count: int | None = None

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tensors that it returns."""
        found = leaves(self.net(*unpacked(x, self.shapes)))
        return [one for one in found if isinstance(one, torch.Tensor)][: self.count]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([one.reshape(len(one), -1) for one in self.parts(x)], dim=-1)


class SideBySide:
    """The module and the ported network.

    Args:
      module: In evaluation mode and float32; changed: its weights are moved, unless its output
        is then zero or not finite, its random layers are switched off, and its frozen parameters
        have gradients.
      ported: Its source and table.
    """

    def __init__(self, module: torch.nn.Module, ported: PortedNetwork) -> None:
        self.module, self.ported, self._model = module, ported, ported.create()
        self._programs: dict[tuple[str, bool, Shapes], Program] = {}
        self._models: dict[str, nnx.Module] = {}
        self._tracer = ThreadPoolExecutor(1)
        self._wide: torch.nn.Module | None = None
        self.torch_slots = {name: f"net.{name}" for name in ported.slots}
        self.flax_slots = {name: ("net", *path) for name, path in ported.slots.items()}
        switch_off(module)
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        own = copy.deepcopy(module.state_dict())
        _move_weights(module)
        self.shapes: Shapes = ()
        self.images = self.inputs_of(ported.inputs, ported.image_size)
        output = self._output()
        if not (np.isfinite(output).all() and output.any()):
            module.load_state_dict(own)

    @property
    def few(self) -> np.ndarray:
        """As many of the inputs as evaluation needs: more are for the gradients of batch norm."""
        return self.images[:3]

    def inputs_of(self, shapes: Shapes, size: tuple[int, int]) -> np.ndarray:
        """Random inputs of these shapes, or images of this size; both sides expect them now."""
        self.shapes = shapes
        if shapes:
            small = sum(map(math.prod, shapes)) <= 3 * SMALL
            return random_inputs(shapes, batch=6 if small else 3)
        return images_of(self.ported.channels, size)

    def _output(self) -> np.ndarray:
        """The output in evaluation mode."""
        with torch.no_grad():
            flat = FlatModule(self.module, self.shapes)
            return flat(as_tensor(self.few, PRECISIONS["float32"])).numpy()

    def output_in_training(self) -> tuple[int, ...]:
        """The shape of the output in training mode; whatever the module raises there or in its
        backward pass, this raises.
        """
        flat = FlatModule(copy.deepcopy(self.module).train(), self.shapes)
        with torch.enable_grad(), no_functional_dropout():
            output = flat(as_tensor(self.few, PRECISIONS["float32"]))
            output.sum().backward()
        batch, *sizes = output.shape
        return (batch * len(self.images) // len(self.few), *sizes)

    def torch(self, images: np.ndarray, precision: Precision, **options: Any) -> Trace:
        """What the module computes."""
        flat = FlatModule(self._cast(precision), self.shapes)
        with no_functional_dropout(), torch.enable_grad(), Bounded(20 * MOST_CALLS):
            return trace_torch(flat, images, self.torch_slots, precision=precision, **options)

    def torch_moved(
        self, images: np.ndarray, precision: Precision, seed: int, **options: Any
    ) -> Trace:
        """What the module computes where the images and what every operator computes move by a unit
        in the last place, as they may by rounding.
        """
        moved = nudged(images, precision.epsilon, np.random.default_rng(seed))
        with Rounded(seed):
            return self.torch(moved, precision, **options)

    def flax(
        self,
        images: np.ndarray,
        precision: Precision,
        *,
        train: bool = False,
        cotangent: np.ndarray | None = None,
    ) -> Trace:
        """What the ported network computes."""
        return self._program(precision, train)(images, cotangent)

    def begin_to_compile(
        self,
        images: np.ndarray,
        precision: Precision,
        *,
        train: bool = False,
        cotangent: np.ndarray | None = None,
    ) -> None:
        """Lets :meth:`flax` compile while PyTorch computes."""
        self._program(precision, train).compile(images, cotangent)

    def stop(self) -> None:
        """Traces nothing more, and keeps no program."""
        self._tracer.shutdown(wait=False, cancel_futures=True)
        self._programs.clear()

    def _program(self, precision: Precision, train: bool) -> Program:
        """The ported network, compiled once for each of these and the shapes."""
        key = precision.name, train, self.shapes
        if key not in self._programs:
            if precision.name not in self._models:
                with precision.on_jax(None):
                    self._models[precision.name] = self._filled(precision)
            flat = FlatNetwork(self._models[precision.name], self.shapes)
            more: dict[str, Any] = {"train": train, "tracer": self._tracer}
            self._programs[key] = Program(flat, self.flax_slots, precision, **more)
        return self._programs[key]

    def _filled(self, precision: Precision) -> nnx.Module:
        state = state_to_numpy(self._cast(precision).state_dict())
        model = nnx.clone(self._model)
        set_values(model, on_device(self.ported.table.to_flax(state)))
        drop_nothing(model)
        return model

    def _cast(self, precision: Precision) -> torch.nn.Module:
        """The module in this precision, to be left as it is."""
        if precision.name != "float64":
            return self.module
        self._wide = self._wide or copy.deepcopy(self.module).to(torch.float64)
        return self._wide

    def in_float64(self) -> Trace | None:
        """What the module computes in evaluation mode and float64 from :attr:`few`; None if it does
        not compute in float64: a cast in its code may keep it from that."""
        precision = PRECISIONS["float64"]
        self._cast(precision)  # beforehand: it begins with a copy in float32
        try:
            with Dtypes() as made:
                found = self.torch(self.few, precision)
        except Exception:  # whatever the user's code raises
            return None
        return found if made.dtypes == {torch.float64} else None

    def trainable(self, precision: Precision) -> FlatModule:
        """A copy of the module, to train."""
        return FlatModule(copy.deepcopy(self._cast(precision)), self.shapes).train()

    def descend(
        self, images: list[np.ndarray], targets: np.ndarray, precision: Precision, rate: float
    ) -> dict[Path, np.ndarray]:
        """The tensors of the ported network after :meth:`Program.descend`."""
        found = self._program(precision, True).descend(images, targets, rate)
        return {path[1:]: value for path, value in found.items()}


def _move_weights(module: torch.nn.Module) -> None:
    """Moves every weight from where it is, so that none is zero or like its neighbours, which would
    hide what is multiplied by it, and lets norms look trained.

    Weights that have nothing to do with the module's own may amplify rounding without bound."""
    generator = torch.Generator().manual_seed(0)
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            if parameter.is_floating_point():
                spread = 0.3 * float(parameter.data.std()) if parameter.numel() > 1 else 0.0
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(noise, alpha=spread or 0.1)
        mean, var = (getattr(part, name, None) for name in ("running_mean", "running_var"))
        if isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor):
            mean.normal_(0, 0.3, generator=generator)
            var.uniform_(0.5, 2, generator=generator)


def relative_error(value: Any, truth: Any, floor: float = 0.0) -> float:
    """The relative error; infinite where a value is not finite, unless both are the same."""
    if value is truth:
        return 0.0
    if not np.isfinite(value).all() and not np.array_equal(value, truth, equal_nan=True):
        return float("inf")
    return relative_l2(value, truth, floor)
