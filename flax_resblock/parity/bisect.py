"""Finds the layer that is wrong where nothing but the output can be captured.

A layer is *silenced* on both sides by setting its kernel or scale to zero: whatever it does wrong
no longer shows. Silencing the first ``k`` layers hides a mistake exactly if it lies among them, so
``log2(n)`` runs find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.config import Path
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, dotted
from flax_resblock.parity.taps import trace_flax, trace_torch


class Silenced(Pair):
    """A pair with some layers silenced on both sides.

    Args:
      pair: The pair.
      slots: Names of the layers: attribute paths with dots.
    """

    def __init__(self, pair: Pair, slots: set[str]) -> None:
        self.pair, self.title, self.entries = pair, pair.title, pair.entries
        self.muted = [
            e
            for e in pair.entries
            if e.flax_path[-1] in ("kernel", "scale") and dotted(e.flax_path[:-1]) in slots
        ]

    @property
    def flax_slots(self) -> Mapping[str, Path]:
        """As they were."""
        return self.pair.flax_slots

    @property
    def torch_slots(self) -> Mapping[str, str]:
        """As they were."""
        return self.pair.torch_slots

    def torch(self, precision: Precision) -> torch.nn.Module:
        """With the silenced layers' kernels and scales zero."""
        module = self.pair.torch(precision)
        tensors = module.state_dict()  # shares memory with the module
        for entry in self.muted:
            tensors[entry.torch_key].zero_()
        return module

    def flax(self, precision: Precision) -> nnx.Module:
        """With the silenced layers' kernels and scales zero."""
        model = self.pair.flax(precision)
        for entry in self.muted:
            variable = variable_at(model, entry.flax_path)
            variable.set_value(jnp.zeros_like(variable[...]))
        return model


def bisect(pair: Pair, images: np.ndarray, side: Literal["flax", "torch"]) -> str | None:
    """The layer at which, or right before which, one side goes wrong in evaluation mode.

    Args:
      pair: With a specification, or PyTorch's side taken as right.
      images: The input, in Flax's layout.
      side: Whose output is wrong.
    Returns:
      Name of the layer; None where the outputs agree, or still differ when every layer is silent.
    """
    spec = pair.specification() or pair
    slots = list(
        dict.fromkeys(
            dotted(e.flax_path[:-1]) for e in pair.entries if e.flax_path[-1] in ("kernel", "scale")
        )
    )
    if _agree(pair, spec, set(), images, side) or not _agree(pair, spec, set(slots), images, side):
        return None
    low, high = 0, len(slots)  # silencing the first `low` does not hide it, the first `high` does
    while high - low > 1:
        middle = (low + high) // 2
        if _agree(pair, spec, set(slots[:middle]), images, side):
            high = middle
        else:
            low = middle
    return slots[high - 1]


def _agree(pair: Pair, spec: Pair, slots: set[str], images: np.ndarray, side: str) -> bool:
    precision = PRECISIONS["float64"]
    truth = trace_torch(
        Silenced(spec, slots).torch(precision), images, {}, precision=precision
    ).output
    if side == "torch":
        output = trace_torch(
            Silenced(pair, slots).torch(precision), images, {}, precision=precision
        ).output
    else:
        with precision.of_jax():
            model = Silenced(pair, slots).flax(precision)
        output = trace_flax(model, images, {}, precision=precision).output
    return relative_l2(output, truth) <= FLOAT64_LIMIT
