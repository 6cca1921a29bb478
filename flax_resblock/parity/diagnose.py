"""Diagnoses a difference: cuts the network into slots, finds the slots that are wrong by
themselves, and tests the known mistakes against their data. If only the output can be captured,
bisection finds the layer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import jax.numpy as jnp
import numpy as np

from flax_resblock.convert.state_map import Entry
from flax_resblock.nn.variables import variable_at
from flax_resblock.parity.anatomy import Anatomy, quantity_of
from flax_resblock.parity.causes import NAMES, Diagnosis, evidence_for, explain_tensor
from flax_resblock.parity.causes.layers import explain_layer
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2, verdict_of
from flax_resblock.parity.pair import PRECISIONS, Pair, Precision, Side, parse_path, suspects
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
      precisions: Where float64 shows nothing: precisions whose arithmetic is suspected to be
        narrower than it says.
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
    for side in suspects(pair.specification()):
        slot = _bisected(pair, images, side)
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
    here, sides = devices.of(precision), dict[Side, Tensors]()
    for side in get_args(Side):
        sides[side] = next(part.run(side, pair, precision, images, here))
    for key, right in anatomy.truth.items():
        there: dict[Side, Any] = {
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
    spec, where = pair.specification(), (PRECISIONS["float64"], images, Devices())
    expected = next(Weights().run("torch", spec or pair, *where))
    paths = {slot: parse_path(slot.replace("/", ".")) for _, slot in expected}
    by_path = {paths[slot]: np.asarray(value, np.float64) for (_, slot), value in expected.items()}
    for side in suspects(spec):
        tensors = next(Weights().run(side, pair, *where))
        for (_, slot), truth in expected.items():
            value = tensors.get(("tensors", slot))
            if value is None or np.array_equal(value, truth, equal_nan=True):
                continue
            cause = explain_tensor(paths[slot], np.asarray(value, np.float64), by_path)
            words = f"{NAMES[side]} {cause.sentence if cause else 'holds other data'}"
            error = relative_l2(value, truth)
            evidence = evidence_for(cause, error, "the tensor that should be there")
            yield Diagnosis(slot, cause.name if cause else "unknown", side, words, evidence)


def _bisected(pair: Pair, images: np.ndarray, side: Side) -> str | None:
    """The layer at which, or right before which, one side goes wrong in evaluation mode; None where
    the outputs agree, or still differ when every layer is silent."""
    spec = pair.specification() or pair
    slots = list(dict.fromkeys(slot for slot, _ in _multiplying(pair)))

    def agree(silent: int) -> bool:
        """Whether the outputs are equal while the first so many layers are silent."""
        truth = _output(spec, "torch", images, set(slots[:silent]))
        found = _output(pair, side, images, set(slots[:silent]))
        return relative_l2(found, truth) <= FLOAT64_LIMIT

    if agree(0) or not agree(len(slots)):
        return None
    numbers = range(1, len(slots) + 1)  # the least for which they agree
    return slots[bisect_left(numbers, True, key=agree)]


def _multiplying(pair: Pair) -> list[tuple[str, Entry]]:
    """Kernels and scales, by the layer that they are in."""
    entries = [e for e in pair.entries if e.flax_path[-1] in ("kernel", "scale")]
    return [(pair.name_of(e).rpartition("/")[0], e) for e in entries]


def _output(pair: Pair, side: Side, images: np.ndarray, silent: set[str]) -> np.ndarray:
    """One side's output with the kernels and scales of the silent layers zero."""
    precision = PRECISIONS["float64"]
    muted = [entry for slot, entry in _multiplying(pair) if slot in silent]
    if side == "torch":
        module = pair.torch(precision)
        tensors = module.state_dict()  # shares memory with the module
        for entry in muted:
            tensors[entry.torch_key].zero_()
        return trace_torch(module, images, {}, precision=precision).output
    with precision.of_jax():
        model = pair.flax(precision)
        for entry in muted:
            variable = variable_at(model, entry.flax_path)
            variable.set_value(jnp.zeros_like(variable[...]))
    return trace_flax(model, images, {}, precision=precision).output
