"""Compares a PyTorch module with what it was ported to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from flax_resblock.errors import InputError, raised, some
from flax_resblock.parity.comparison import SPREAD
from flax_resblock.parity.oracle import TORCH_FACTOR, TRAJECTORY_LIMIT, verdict_of
from flax_resblock.parity.pair import PRECISIONS, Precision
from flax_resblock.parity.taps import Trace
from flax_resblock.port.inputs import grown
from flax_resblock.port.network import PortedNetwork
from flax_resblock.port.side_by_side import FLOOR, SideBySide, relative_error
from flax_resblock.port.steps import STEPS, errors_after_steps

HOPELESS = {"float64": 1e-10, "float32": 1e-2}
"""Where PyTorch's own result is less certain than this, nothing is proved."""


@dataclass(frozen=True)
class Proof:
    """What was measured.

    Attributes:
      figures: The largest error and its place, by precision and quantity.
      fixed_size: Why the network is right for one size of images only; empty if it is for others.
      notes: What was not compared.
    """

    figures: dict[str, Any] = field(default_factory=dict)
    fixed_size: str = ""
    notes: list[str] = field(default_factory=list)


def prove(
    module: torch.nn.Module,
    ported: PortedNetwork,
    *,
    exact: bool,
    guessed: bool = False,
    bound: str = "",
) -> Proof:
    """Compares a module with what it was ported to, with weights near its own.

    A weight of zero hides everything that is multiplied by it, so the weights of the user's own
    are not enough. Random layers are switched off.

    Args:
      module: In evaluation mode and float32; changed.
      ported: Its source and table.
      exact: Train both for some steps as well.
      guessed: Heights and widths in the source are guessed.
      bound: Why the network is right for one size only, if that is known.
    Raises:
      InputError: They differ.
    """
    both = _Comparison(module, ported)
    wide, narrow = PRECISIONS["float64"], PRECISIONS["float32"]
    try:
        both.begin_to_compile(both.few, wide)  # while PyTorch computes everything else
        shape = both.trained_shape()
        cotangent = np.random.default_rng(1).standard_normal(shape or ())
        if shape is not None:
            both.begin_to_compile(both.images, wide, train=True, cotangent=cotangent)
        both.begin_in_float32(bound)
        truth = both.in_float64()
        precision = narrow if truth is None else wide
        if truth is None:
            why = "your module does not compute in float64; it was compared in float32"
            both.notes.append(why)
        both.compare(both.few, precision, theirs=truth)
        if shape is not None:
            both.compare(both.images, precision, cotangent)
            if exact:
                both.compare_steps(precision, shape)
        return Proof(both.figures, both.compare_in_float32(guessed, bound), both.notes)
    finally:
        both.stop()


class _Comparison(SideBySide):
    """Collects figures and notes, and raises InputError at the first difference."""

    def __init__(self, module: torch.nn.Module, ported: PortedNetwork) -> None:
        super().__init__(module, ported)
        self.figures: dict[str, Any] = {}
        self.notes: list[str] = []

    def compare(
        self,
        images: np.ndarray,
        precision: Precision,
        cotangent: np.ndarray | None = None,
        theirs: Trace | None = None,
    ) -> None:
        """Compares outputs and activations; with a cotangent of the output in training mode, and
        statistics and gradients too.

        Args:
          theirs: What the module computes in this precision, if that is known.
        """
        train = cotangent is not None
        options: dict[str, Any] = {"train": train, "cotangent": cotangent}
        self.begin_to_compile(images, precision, **options)
        wide = precision.name == "float64"
        truth = theirs if wide and theirs else self.torch(images, PRECISIONS["float64"], **options)
        theirs = truth if wide else theirs or self.torch(images, precision, **options)
        ours = self.flax(images, precision, **options)
        mode = "training" if train else "evaluation"
        spread: dict[tuple[str, str], float] | None = None
        uncertain: dict[str, float] = {}
        for quantity, rows in self._rows(truth, theirs, ours, train).items():
            floor = _floor(quantity, rows)
            figure = {"error": 0.0, "place": "", "tensors": len(rows)}
            for name, true, torch_value, value in rows:
                error, own = (
                    relative_error(value, true, floor),
                    relative_error(torch_value, true, floor),
                )
                limit = verdict_of(error, own, precision.epsilon).limit
                if not error <= limit:
                    spread = spread or self._spread(images, precision, truth, ours, options)
                    own = spread[quantity, name]
                    if not error <= min(TORCH_FACTOR * own, HOPELESS[precision.name]):
                        raise InputError(self._difference(mode, quantity, name, error, limit))
                    uncertain[_named(quantity, name)] = own
                if error >= figure["error"]:
                    figure |= {"error": error, "place": name}
            self.figures[f"{precision.name} {mode} {quantity}"] = figure
        if uncertain:
            self.notes.append(
                f"{mode} mode, {precision.name}: {some(list(uncertain))} differ by more than the "
                f"usual limit, but by no more than {TORCH_FACTOR:g} times what PyTorch's own move "
                f"by where the results of its operators change in their last bit "
                f"({max(uncertain.values()):.1e})"
            )

    def _spread(
        self, images: np.ndarray, precision: Precision, truth: Trace, ours: Trace, options: Any
    ) -> dict[tuple[str, str], float]:
        """PyTorch's own largest errors where its numbers move by a unit in the last place, by
        quantity and tensor.
        """
        largest: dict[tuple[str, str], float] = {}
        for seed in range(SPREAD):
            again = self.torch_moved(images, precision, seed, **options)
            for quantity, rows in self._rows(truth, again, ours, options["train"]).items():
                floor = _floor(quantity, rows)
                for name, true, value, _ in rows:
                    key = quantity, name
                    largest[key] = max(largest.get(key, 0.0), relative_error(value, true, floor))
        return largest

    def _rows(self, truth: Trace, theirs: Trace, ours: Trace, train: bool) -> dict[str, list[Any]]:
        shared = [name for name in truth.activations if name in ours.activations]
        rows: dict[str, list[Any]] = {
            "output": [("output", truth.output, theirs.output, ours.output)],
            "activations": [
                (name, truth.activations[name], theirs.activations[name], ours.activations[name])
                for name in shared
            ],
        }
        rows |= {"running statistics": [], "gradients": []}
        for one in self.ported.table.entries:
            key, path = f"net.{one.torch_key}", ("net", *one.flax_path)
            of_both = (
                ("running statistics", truth.statistics, theirs.statistics, ours.statistics),
                ("gradients", truth.gradients, theirs.gradients, ours.gradients),
            )
            for quantity, true, torch_values, values in of_both:
                if key in true and path in values and true[key].dtype.kind == "f":
                    value = one.codec.to_torch(values[path])
                    rows[quantity].append((one.torch_key, true[key], torch_values[key], value))
        if not train:
            del rows["running statistics"]
        if truth.input_gradient is not None:
            values = truth.input_gradient, theirs.input_gradient, ours.input_gradient
            rows["gradient of the input"] = [("images", *values)]
        return {quantity: one for quantity, one in rows.items() if one}

    def trained_shape(self) -> tuple[int, ...] | None:
        """The shape of the output in training mode; None where the module does not run in it."""
        try:
            return self.output_in_training()
        except Exception as error:  # whatever the user's code raises
            self.notes.append(
                f"training mode was not compared: your module raises there ({raised(error)})"
            )
            return None

    def _difference(self, mode: str, quantity: str, name: str, error: float, limit: float) -> str:
        verb = "differ" if quantity.endswith("s") else "differs"
        unseen = ", unless that has a hook of gradients, which a trace does not show"
        return (
            f"{self.ported.origin} cannot be ported: in {mode} mode {_named(quantity, name)} "
            f"{verb} by {error:.1e} (relative), the limit is {limit:.1e}. Please report it with "
            f"the module's code{unseen if 'gradient' in quantity else ''}; nothing was written."
        )

    def begin_in_float32(self, bound: str) -> None:
        """Lets the first comparison of :meth:`compare_in_float32` compile."""
        sizes = self._other_sizes(bound)
        images = self._inputs_at(sizes[0]) if sizes else self.few
        self.begin_to_compile(images, PRECISIONS["float32"])
        self.shapes = self.ported.inputs

    def _other_sizes(self, bound: str) -> list[tuple[int, int]]:
        """By how much those are larger; none if it is right for one size only, or takes vectors,
        which have no size."""
        shapes = self.ported.inputs
        vectors = shapes and grown(shapes, (1, 1)) == shapes
        return [] if bound or vectors else larger_by(self.ported.image_size)

    def _inputs_at(self, more: tuple[int, int]) -> np.ndarray:
        height, width = self.ported.image_size
        return self.inputs_of(grown(self.ported.inputs, more), (height + more[0], width + more[1]))

    def compare_in_float32(self, thoroughly: bool, bound: str) -> str:
        """Compares in evaluation mode and float32, with images of another size if there is one
        that the module takes.

        Args:
          thoroughly: With all other sizes that it takes, instead of one.
          bound: Why it is right for images of one size, if that is known; no other is tried.
        Returns:
          Why the network is right for images of one size only; empty if it is for others.
        """
        shapes, sizes = self.ported.inputs, self._other_sizes(bound)
        if not sizes and not bound:
            self.compare(self.few, PRECISIONS["float32"])
            return ""
        why, agreed = bound or "the module takes no other size that was tried", False
        for more in sizes:
            others = self._inputs_at(more)
            shown = f"inputs larger by {more}" if shapes else str(others.shape[1:3])
            try:
                theirs = self.torch(others, PRECISIONS["float32"])
            except Exception:  # the module does not take this size
                continue
            try:
                self.compare(others, PRECISIONS["float32"], theirs=theirs)
                agreed = True
            except InputError:
                why = f"its code has numbers that follow from the size, and differs at {shown}"
                agreed = False
                break
            except Exception as error:  # of jax: shapes that do not fit
                why = f"the written code raises {type(error).__name__} at {shown}"
                thoroughly = True
            if agreed and not thoroughly:
                break
        if agreed:
            if "raises" in why:
                self.notes.append(f"{why}, which your module takes; it agrees at other sizes")
            return ""
        self.shapes = shapes
        self.compare(self.few, PRECISIONS["float32"])
        return why

    def compare_steps(self, precision: Precision, shape: tuple[int, ...]) -> None:
        """Compares weights and statistics after some steps of SGD with momentum."""
        limit = TRAJECTORY_LIMIT if precision.name == "float64" else 1e-2
        errors = errors_after_steps(self, precision, shape, limit)
        place = max(errors, key=lambda name: errors[name])
        quantity = f"weights after {STEPS} steps"
        if not errors[place] <= limit:
            raise InputError(self._difference("training", quantity, place, errors[place], limit))
        self.figures[f"{precision.name} {quantity} of SGD"] = {
            "error": errors[place], "place": place, "tensors": len(errors),
        }  # fmt: skip


def larger_by(size: tuple[int, int]) -> list[tuple[int, int]]:
    """By how much the other sizes are larger that are tried, in their order.

    The first is nearly twice as large: a window that covers the map leaves most of such a map
    out."""
    larger = max(min(*size, 64) - 3, 1)
    return [(larger, max(larger - 2, 1)), (33, 32), (32, 64)]


def _named(quantity: str, name: str) -> str:
    return f"the {quantity}" if name in ("output", "images") else f"{quantity} of {name}"


def _floor(quantity: str, rows: list[Any]) -> float:
    """The norm to which an error is relative at least."""
    if quantity != "gradients":
        return 0.0
    return FLOOR * max(float(np.linalg.norm(true)) for _, true, *_ in rows)
