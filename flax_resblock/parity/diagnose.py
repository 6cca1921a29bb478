"""Diagnoses a difference: cuts the network into slots, finds the slots that are wrong by
themselves, and tests the known mistakes against their data. If only the output can be captured,
bisection finds the layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.config import Path
from flax_resblock.convert.state_map import Entry
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity.anatomy import Anatomy, quantity_of
from flax_resblock.parity.causes import NAMES, Diagnosis, evidence_for, explain_tensor
from flax_resblock.parity.causes.layers import explain_layer
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2, verdict_of
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, Side, parse_path
from flax_resblock.parity.parts import Devices, Isolated, Tensors, Weights
from flax_resblock.parity.taps import trace_flax, trace_torch


def diagnose(
    pair: Pair,
    images: np.ndarray,
    *,
    train: bool = True,
    gradients: bool = False,
    precisions: Sequence[str] = (),
    devices: Devices | None = None,
) -> list[Diagnosis]:
    """The mistakes of either side of a pair; empty if every slot by itself is right.

    Args:
      pair: The two modules. Where it has a :meth:`~flax_resblock.parity.pair.Pair.specification`,
        both sides are compared with that.
      images: The input, in Flax's layout, float64.
      train: Also in training mode.
      gradients: Also gradients.
      precisions: Where float64 shows nothing: precisions whose arithmetic is suspected to be
        narrower than it says.
      devices: Where those are computed.
    """
    if not np.isfinite(images).all():
        bad = np.argwhere(~np.isfinite(images))
        words = (
            f"the input holds {len(bad)} values that are not finite, first at index "
            f"{bad[0].tolist()}"
        )
        return [
            Diagnosis("input", "non-finite", "torch", words, "counted before anything was computed")
        ]
    found = list(_tensors(pair, images))
    blamed = {(d.side, d.slot.rpartition("/")[0] or d.slot) for d in found}
    anatomies = []
    for mode in (False, True) if train else (False,):
        anatomies.append(Anatomy(pair, images, mode, gradients))
        for diagnosis in anatomies[-1].findings():
            place = (diagnosis.side, diagnosis.slot.partition("/")[0])
            if place not in blamed:
                found.append(diagnosis)
        blamed |= {(d.side, d.slot.partition("/")[0]) for d in found}
    found = found or list(_by_bisection(pair, images))
    for name in () if found else precisions:
        found += _narrow_arithmetic(anatomies[0], PRECISIONS[name], devices or Devices())
    return list(_grouped(found))


def _by_bisection(pair: Pair, images: np.ndarray) -> Iterator[Diagnosis]:
    """Finds the layer if only the output can be captured."""
    sides: tuple[Side, ...] = ("flax", "torch") if pair.specification() is not None else ("flax",)
    for side in sides:
        slot = bisect(pair, images, side)
        if slot is not None:
            words = (
                f"{NAMES[side]} computes something else here or right before it; its layers could "
                f"not be captured one by one"
            )
            evidence = (
                "found by silencing layers on both sides: the difference is gone as soon as this "
                "one is silent"
            )
            yield Diagnosis(slot, "unknown", side, words, evidence)


def _narrow_arithmetic(
    anatomy: Anatomy, precision: Precision, devices: Devices
) -> Iterator[Diagnosis]:
    """Layers of a pair taken apart in evaluation mode whose error in one precision is larger than
    that precision explains, though float64 is right."""
    pair, images, part = anatomy.pair, anatomy.images, Isolated(False, anatomy.reference)
    sides: dict[Side, Tensors] = {
        "torch": next(part.run("torch", pair, precision, images, devices.of(precision))),
        "flax": next(part.run("flax", pair, precision, images, devices.of(precision))),
    }
    for key, right in anatomy.truth.items():
        there: dict[Side, np.ndarray] = {
            side: tensors[key] for side, tensors in sides.items() if key in tensors
        }
        errors: dict[Side, float] = {side: relative_l2(v, right) for side, v in there.items()}
        for side, error in errors.items():
            other = errors.get("torch" if side == "flax" else "flax", 0.0)
            layer = anatomy.layer(key[1])
            passed = verdict_of(error, other, precision.epsilon).passed
            if layer is None or passed or quantity_of(key) != "forward":
                continue
            value = np.asarray(there[side], np.float64)
            cause = explain_layer(layer, value, limit=max(1e-5, 2 * other))
            words = cause.sentence if cause else "is less exact than the precision explains"
            evidence = (
                f"in {precision.name} its error is {error:.1e}, the other side's {other:.1e}; in "
                f"float64 both are right"
            )
            name = cause.name if cause else "reduced-precision"
            yield Diagnosis(key[1], name, side, f"{NAMES[side]} {words}", evidence)


def _grouped(found: list[Diagnosis]) -> Iterator[Diagnosis]:
    """The same cause in many places becomes one diagnosis, at the first place."""
    groups: dict[tuple[str, str], list[Diagnosis]] = {}
    for diagnosis in found:
        groups.setdefault((diagnosis.side, diagnosis.cause), []).append(diagnosis)
    for first, *rest in groups.values():
        others = dict.fromkeys(d.slot for d in rest if d.slot != first.slot)
        yield replace(first, others=tuple(others))


def _tensors(pair: Pair, images: np.ndarray) -> Iterator[Diagnosis]:
    """Tensors that are not what the specification holds."""
    spec, precision, part = pair.specification(), PRECISIONS["float64"], Weights()
    expected = next(part.run("torch", spec or pair, precision, images, Devices()))
    sides: dict[Side, Tensors] = {}
    sides["flax"] = next(part.run("flax", pair, precision, images, Devices()))
    if spec is not None:
        sides["torch"] = next(part.run("torch", pair, precision, images, Devices()))
    by_path: dict[Path, np.ndarray] = {
        parse_path(slot.replace("/", ".")): np.asarray(value, np.float64)
        for (_, slot), value in expected.items()
    }
    for side, tensors in sides.items():
        for (_, slot), truth in expected.items():
            value = tensors.get(("tensors", slot))
            if value is None or np.array_equal(value, truth, equal_nan=True):
                continue
            path = parse_path(slot.replace("/", "."))
            cause = explain_tensor(path, np.asarray(value, np.float64), by_path)
            words = f"{NAMES[side]} {cause.sentence if cause else 'holds other data'}"
            error = relative_l2(value, truth)
            evidence = evidence_for(cause, error, "the tensor that should be there")
            yield Diagnosis(slot, cause.name if cause else "unknown", side, words, evidence)


def _slot_of(pair: Pair, entry: Entry) -> str:
    return pair.name_of(entry).rpartition("/")[0]


class Silenced(Pair):
    """A pair with some layers silenced on both sides.

    Args:
      pair: The pair.
      slots: Names of the layers.
    """

    def __init__(self, pair: Pair, slots: set[str]) -> None:
        self.pair, self.title, self.entries = pair, pair.title, pair.entries
        self.gradient_floor = pair.gradient_floor
        self.muted = [
            e
            for e in pair.entries
            if e.flax_path[-1] in ("kernel", "scale") and _slot_of(pair, e) in slots
        ]

    @property
    def flax_slots(self) -> Mapping[str, Path]:
        """As they were."""
        return self.pair.flax_slots

    @property
    def torch_slots(self) -> Mapping[str, str]:
        """As they were."""
        return self.pair.torch_slots

    def name_of(self, entry: Entry) -> str:
        """As it was."""
        return self.pair.name_of(entry)

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


def bisect(pair: Pair, images: np.ndarray, side: Side) -> str | None:
    """The layer at which, or right before which, one side goes wrong in evaluation mode.

    Args:
      pair: With a specification, or PyTorch's side taken as right.
      images: The input, in Flax's layout.
      side: Whose output is wrong.
    Returns:
      Name of the layer; None where the outputs agree, or still differ when every layer is silent.
    """
    spec = pair.specification() or pair
    entries = [e for e in pair.entries if e.flax_path[-1] in ("kernel", "scale")]
    slots = list(dict.fromkeys(_slot_of(pair, e) for e in entries))
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
    right, silenced = Silenced(spec, slots), Silenced(pair, slots)
    truth = trace_torch(right.torch(precision), images, {}, precision=precision)
    if side == "torch":
        found = trace_torch(silenced.torch(precision), images, {}, precision=precision)
    else:
        with precision.of_jax():
            model = silenced.flax(precision)
        found = trace_flax(model, images, {}, precision=precision)
    return relative_l2(found.output, truth.output) <= FLOAT64_LIMIT
