"""What is measured, one part at a time: each part runs one side in one precision and yields its
tensors by quantity and slot, in Flax's layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.cpu.switch import compiler_options
from flax_resblock.parity.devices import JaxDevice
from flax_resblock.parity.isolation import isolate_flax, isolate_torch
from flax_resblock.parity.oracle import FLOAT64_LIMIT
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, dotted
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
"""Quantity and slot, ``("train forward", "stage1.0.conv1")``; a tensor's name stands behind a
slash.
"""

Tensors = dict[Key, np.ndarray]

STATISTICS = ("mean", "var", "num_batches_tracked")


@dataclass(frozen=True)
class Devices:
    """Where each side computes; the float64 truth is always computed on the CPU.

    Attributes:
      jax: None: jax's default.
      torch: The CPU unless said otherwise.
    """

    jax: JaxDevice | None = None
    torch: torch.device = CPU

    def of(self, precision: Precision) -> Devices:
        """These devices, or the CPU for float64."""
        return Devices(jax.devices("cpu")[0]) if precision.name == "float64" else self


class Part(ABC):
    """One thing to compare.

    Attributes:
      title: For the progress line.
      limit64: Largest relative difference in float64.
    """

    title: str
    limit64: float = FLOAT64_LIMIT

    @abstractmethod
    def torch(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        """What the PyTorch side computes: once, or once per training step."""

    @abstractmethod
    def flax(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        """The same of the Flax side."""


def by_entries(
    pair: Pair, quantity: str, values: dict[Any, np.ndarray], *, side: str, statistics: bool = False
) -> Tensors:
    """Parameters, gradients or statistics of one side by slot, in Flax's layout.

    Args:
      pair: Whose entries name them.
      quantity: Of the keys.
      values: By PyTorch's keys (``side="torch"``) or Flax's paths (``side="flax"``).
      side: Which.
      statistics: The running statistics; else everything else.
    """
    found: Tensors = {}
    for entry in pair.entries:
        if (entry.flax_path[-1] in STATISTICS) != statistics:
            continue
        value = values.get(entry.torch_key if side == "torch" else entry.flax_path)
        if value is not None:
            name = f"{dotted(entry.flax_path[:-1])}/{entry.flax_path[-1]}".removeprefix("/")
            found[quantity, name] = entry.codec.to_flax(value) if side == "torch" else value
    return found


def named(quantity: str, values: dict[str, np.ndarray]) -> Tensors:
    """Values by slot under one quantity."""
    return {(quantity, name): value for name, value in values.items()}


@dataclass(frozen=True)
class Weights(Part):
    """The tensors themselves: what the Flax side holds is what the PyTorch side holds, bit for
    bit.
    """

    title: str = "tensors"
    limit64: float = 0.0

    def torch(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        state = {key: value.numpy() for key, value in pair.torch(precision).state_dict().items()}
        yield {
            **by_entries(pair, "tensors", state, side="torch"),
            **by_entries(pair, "tensors", state, side="torch", statistics=True),
        }

    def flax(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        with precision.of_jax():
            state = arrays_by_path(nnx.state(pair.flax(precision)))
        yield {
            **by_entries(pair, "tensors", state, side="flax"),
            **by_entries(pair, "tensors", state, side="flax", statistics=True),
        }


@dataclass(frozen=True)
class Forward(Part):
    """One batch through the network: every activation, in training mode the statistics after it,
    and the gradients where a cotangent flows back.

    Attributes:
      train: Training mode.
      cotangent: Of the output, in Flax's layout; None: no gradients.
    """

    train: bool
    cotangent: np.ndarray | None = None

    @property
    def mode(self) -> str:
        """``"train"`` or ``"eval"``."""
        return "train" if self.train else "eval"

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For the progress line."""
        return f"{self.mode} mode" + ("" if self.cotangent is None else " and gradients")

    def torch(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        options: dict[str, Any] = {
            "train": self.train,
            "cotangent": self.cotangent,
            "precision": precision,
            "device": devices.torch,
        }
        yield self._named(
            pair, trace_torch(pair.torch(precision), images, pair.torch_slots, **options), "torch"
        )

    def flax(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        options: dict[str, Any] = {
            "train": self.train,
            "cotangent": self.cotangent,
            "precision": precision,
            "device": devices.jax,
        }
        with precision.of_jax():
            model = pair.flax(precision)
        yield self._named(pair, trace_flax(model, images, pair.flax_slots, **options), "flax")

    def _named(self, pair: Pair, trace: Trace, side: str) -> Tensors:
        tensors = named(f"{self.mode} forward", {**trace.activations, "output": trace.output})
        if self.train:
            tensors |= by_entries(
                pair, "running statistics", trace.statistics, side=side, statistics=True
            )
        tensors |= by_entries(pair, "parameter gradient", trace.gradients, side=side)
        tensors |= named("activation gradient", trace.activation_gradients)
        return (
            tensors
            if trace.input_gradient is None
            else {**tensors, ("activation gradient", "input"): trace.input_gradient}
        )


@dataclass(frozen=True)
class Statistics(Part):
    """Running statistics after several batches in training mode; what the first batch hides (the
    weight of the old value) the others show.
    """

    batches: tuple[np.ndarray, ...]

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For the progress line."""
        return f"statistics after {len(self.batches)} batches"

    @property
    def quantity(self) -> str:
        """Name of the rows."""
        return f"running statistics after {len(self.batches)}"

    def torch(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        module = pair.torch(precision).to(devices.torch).train()
        with torch.no_grad(), precision.of_torch(devices.torch):
            for batch in (images, *self.batches[1:]):
                module(as_tensor(batch, precision, devices.torch))
        yield by_entries(
            pair,
            self.quantity,
            {k: v.cpu().numpy() for k, v in module.named_buffers()},
            side="torch",
            statistics=True,
        )

    def flax(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        with (
            precision.of_jax(),
            jax.default_device(devices.jax),
            jax.default_matmul_precision("highest"),
        ):
            graphdef, statistics, rest = split_model(pair.flax(precision), True, nnx.BatchStat)

            @partial(jax.jit, compiler_options=compiler_options())
            def step(statistics: Any, rest: Any, batch: Any) -> Any:
                module = nnx.merge(graphdef, statistics, rest, copy=True)
                module(batch)  # pyright: ignore[reportCallIssue]
                return nnx.state(module, nnx.BatchStat)

            for batch in (images, *self.batches[1:]):
                statistics = step(statistics, rest, jnp.asarray(batch, precision.storage))
            found = arrays_by_path(statistics)
        yield by_entries(pair, self.quantity, found, side="flax", statistics=True)


@dataclass(frozen=True)
class Isolated(Part):
    """Every slot by itself: fed what PyTorch's float64 run fed it, so that its own error shows and
    nobody else's.

    Attributes:
      train: Training mode.
      reference: PyTorch's float64 run with what every slot was fed.
      gradients: Also each slot's gradients, for a random cotangent of its own.
    """

    train: bool
    reference: Trace
    gradients: bool = False

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """For the progress line."""
        return f"each slot by itself, {'train' if self.train else 'eval'} mode"

    def torch(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        yield self._named(
            pair,
            isolate_torch(
                pair.torch(precision),
                images,
                pair.torch_slots,
                precision,
                devices.torch,
                **self._options(),
            ),
            "torch",
        )

    def flax(
        self, pair: Pair, precision: Precision, images: np.ndarray, devices: Devices
    ) -> Iterator[Tensors]:
        with precision.of_jax():
            model = pair.flax(precision)
        slots = {
            name: path
            for name, path in pair.flax_slots.items()
            if name in self.reference.activations
        }
        yield self._named(
            pair,
            isolate_flax(model, images, slots, precision, devices.jax, **self._options()),
            "flax",
        )

    def _options(self) -> dict[str, Any]:
        return {"reference": self.reference, "train": self.train, "gradients": self.gradients}

    def _named(self, pair: Pair, found: dict[str, dict[Any, np.ndarray]], side: str) -> Tensors:
        tensors: Tensors = {}
        prefix = "isolated train" if self.train else "isolated"
        for quantity in ("forward", "connection", "input gradient", "connection gradient"):
            tensors |= named(
                f"{prefix} {quantity}",
                {
                    name: found[quantity][name]
                    for name in self.reference.activations
                    if name in found[quantity]
                },
            )
        if "output" in found["connection"]:
            tensors[f"{prefix} connection", "output"] = found["connection"]["output"]
        tensors |= by_entries(
            pair, f"{prefix} parameter gradient", found["parameter gradient"], side=side
        )
        return tensors | (
            by_entries(
                pair, "isolated running statistics", found["statistics"], side=side, statistics=True
            )
            if self.train
            else {}
        )


def reference_run(pair: Pair, images: np.ndarray, *, train: bool) -> Trace:
    """PyTorch's float64 run with what every slot was fed, for :class:`Isolated`."""
    precision = PRECISIONS["float64"]
    return trace_torch(
        pair.torch(precision),
        images,
        pair.torch_slots,
        train=train,
        precision=precision,
        inputs=True,
    )
