"""The parts of a comparison. Each part runs one framework in one precision and yields its tensors
by quantity and slot, in Flax's memory layout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.cpu.compiling import options_for
from flax_resblock.parity.devices import JaxDevice
from flax_resblock.parity.isolation import isolate_flax, isolate_torch
from flax_resblock.parity.oracle import FLOAT64_LIMIT
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, Side
from flax_resblock.parity.taps import (
    CPU,
    Trace,
    arrays_by_path,
    as_tensor,
    split_model,
    trace_flax,
    trace_torch,
)

Key = tuple[str, str]
"""Quantity and slot, ``("train forward", "stage1.0.conv1")``. Where a slot has several tensors, the
name of the tensor follows after a slash."""

Tensors = dict[Key, np.ndarray]

STATISTICS = ("mean", "var", "num_batches_tracked")


@dataclass(frozen=True)
class Devices:
    """The devices on which each framework computes. The float64 truth is always computed on the
    CPU.

    Attributes:
      jax: A device of jax; None: jax's default device.
      torch: A device of PyTorch.
    """

    jax: JaxDevice | None = None
    torch: torch.device = CPU

    def of(self, precision: Precision) -> Devices:
        """These devices, or the CPU for float64."""
        return Devices(jax.devices("cpu")[0]) if precision.name == "float64" else self


class Part(ABC):
    """One part of a comparison.

    Attributes:
      limit64: Largest relative difference that passes in float64.
      title: The part's name in the progress line.
    """

    limit64: float = FLOAT64_LIMIT

    @property
    @abstractmethod
    def title(self) -> str: ...

    @abstractmethod
    def run(
        self, side: Side, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        """Runs one framework and yields its tensors: once, or once per training step."""


def by_entries(
    pair: Pair,
    quantity: str,
    values: dict[Any, np.ndarray],
    *,
    side: Side,
    statistics: bool = False,
) -> Tensors:
    """Parameters, gradients or statistics of one side by slot, in Flax's memory layout.

    Args:
      values: By PyTorch's keys (``side="torch"``) or Flax's paths (``side="flax"``).
      statistics: Selects the running statistics; otherwise everything else is selected.
    """
    found: Tensors = {}
    for entry in pair.entries:
        if (entry.flax_path[-1] in STATISTICS) != statistics:
            continue
        value = values.get(entry.torch_key if side == "torch" else entry.flax_path)
        if value is not None:
            found[quantity, pair.name_of(entry)] = (
                entry.codec.to_flax(value) if side == "torch" else value
            )
    return found


def vanishing(key: Key, truth: Tensors) -> float:
    """What the rounding error of a gradient that is zero is measured by; 0 where it is not zero.

    In training a norm takes the mean off again, so that the bias of the convolution before it has
    no gradient but rounding. Its yardstick is the gradient of the kernel, a sum over as many
    pixels."""
    slot, _, name = key[1].rpartition("/")
    if name != "bias" or (quantity := key[0]) != "parameter gradient":
        return 0.0
    kernel = truth.get((quantity, f"{slot}/kernel"))
    scale = 0.0 if kernel is None else float(np.linalg.norm(kernel))
    return scale if float(np.linalg.norm(truth[key])) <= FLOAT64_LIMIT * scale else 0.0


def named(quantity: str, values: Mapping[str, np.ndarray]) -> Tensors:
    """Keys values by slot under one quantity."""
    return {(quantity, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Weights(Part):
    """The tensors themselves: both sides must hold the same bits."""

    title: str = "tensors"  # pyright: ignore[reportIncompatibleMethodOverride]
    limit64: float = 0.0

    def run(
        self, side: Side, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        state: dict[Any, np.ndarray]
        if side == "torch":
            state = {k: value.numpy() for k, value in pair.torch(precision).state_dict().items()}
        else:
            with precision.of_jax():
                kinds = (nnx.Param, nnx.BatchStat)  # not the keys of random layers
                state = arrays_by_path(nnx.state(pair.flax(precision), kinds))
        tensors = by_entries(pair, "tensors", state, side=side)
        yield tensors | by_entries(pair, "tensors", state, side=side, statistics=True)


@dataclass(frozen=True)
class Forward(Part):
    """One batch through the network: every activation; in training mode also the statistics after
    the batch; and the gradients if a cotangent is given.

    Attributes:
      cotangent: Cotangent of the output, in Flax's memory layout; None: no gradients.
    """

    train: bool
    cotangent: np.ndarray | None = None

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``."""
        return "train" if self.train else "eval"

    @property
    def title(self) -> str:
        return f"{self.mode} mode" + ("" if self.cotangent is None else " and gradients")

    def run(
        self, side: Side, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        options: dict[str, Any] = {"train": self.train, "cotangent": self.cotangent}
        options["precision"] = precision
        if side == "torch":
            module = pair.torch(precision)
            trace = trace_torch(module, images, pair.torch_slots, device=devices.torch, **options)
        else:
            with precision.of_jax():
                model = pair.flax(precision)
            trace = trace_flax(model, images, pair.flax_slots, device=devices.jax, **options)
        tensors = named(f"{self.mode} forward", {**trace.activations, "output": trace.output})
        if self.train:
            quantity = "running statistics"
            tensors |= by_entries(pair, quantity, trace.statistics, side=side, statistics=True)
        tensors |= by_entries(pair, "parameter gradient", trace.gradients, side=side)
        tensors |= named("activation gradient", trace.activation_gradients)
        if trace.input_gradient is not None:
            tensors["activation gradient", "input"] = trace.input_gradient
        yield tensors


@dataclass(frozen=True)
class Statistics(Part):
    """Running statistics after several batches in training mode. Later batches show what the first
    one can hide, such as a wrong weight of the old value."""

    batches: tuple[np.ndarray, ...]

    @property
    def title(self) -> str:
        return f"statistics after {len(self.batches)} batches"

    def run(
        self, side: Side, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        batches, found = (images, *self.batches[1:]), dict[Any, np.ndarray]()
        if side == "torch":
            module = pair.torch(precision).to(devices.torch).train()
            with torch.no_grad(), precision.of_torch(devices.torch):
                for batch in batches:
                    module(as_tensor(batch, precision, devices.torch))
            found |= {key: value.cpu().numpy() for key, value in module.named_buffers()}
        else:
            with precision.on_jax(devices.jax):
                graphdef, statistics, rest = split_model(pair.flax(precision), True, nnx.BatchStat)

                @partial(jax.jit, compiler_options=options_for(devices.jax, light=True))
                def step(statistics: Any, rest: Any, batch: Any) -> Any:
                    module = nnx.merge(graphdef, statistics, rest, copy=True)
                    module(batch)  # pyright: ignore[reportCallIssue]
                    return nnx.state(module, nnx.BatchStat)

                for batch in batches:
                    statistics = step(statistics, rest, jnp.asarray(batch, precision.storage))
                found |= arrays_by_path(statistics)
        quantity = f"running statistics after {len(self.batches)} batches"
        yield by_entries(pair, quantity, found, side=side, statistics=True)


@dataclass(frozen=True)
class Isolated(Part):
    """Every slot by itself, fed what PyTorch's float64 run fed it, so that only its own error
    shows.

    Attributes:
      reference: PyTorch's float64 run with the inputs of every slot.
      gradients: Also each slot's gradients, for a random cotangent of its own.
    """

    train: bool
    reference: Trace
    gradients: bool = False

    @property
    def title(self) -> str:
        return f"each slot by itself, {'train' if self.train else 'eval'} mode"

    def run(
        self, side: Side, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        options: dict[str, Any] = {"train": self.train, "gradients": self.gradients}
        options["reference"] = self.reference
        order = list(self.reference.activations)
        if side == "torch":
            module, slots = pair.torch(precision), pair.torch_slots
            found = isolate_torch(module, images, slots, precision, devices.torch, **options)
        else:
            with precision.of_jax():
                model = pair.flax(precision)
            paths = {name: path for name, path in pair.flax_slots.items() if name in order}
            found = isolate_flax(model, images, paths, precision, devices.jax, **options)
        prefix = "isolated train" if self.train else "isolated"
        tensors: Tensors = {}
        for quantity in ("forward", "connection", "input gradient", "connection gradient"):
            values = found[quantity]
            ordered = {name: values[name] for name in order if name in values}
            tensors |= named(f"{prefix} {quantity}", ordered)
        if "output" in found["connection"]:
            tensors[f"{prefix} connection", "output"] = found["connection"]["output"]
        gradients, statistics = found["parameter gradient"], found["statistics"]
        tensors |= by_entries(pair, f"{prefix} parameter gradient", gradients, side=side)
        if self.train:
            quantity = "isolated running statistics"
            tensors |= by_entries(pair, quantity, statistics, side=side, statistics=True)
        yield tensors


def reference_run(pair: Pair, images: np.ndarray, *, train: bool) -> Trace:
    """PyTorch's float64 run with the inputs of every slot, for :class:`Isolated`."""
    precision, slots = PRECISIONS["float64"], pair.torch_slots
    module = pair.torch(precision)
    return trace_torch(module, images, slots, train=train, precision=precision, inputs=True)
