"""A verification as tables and sentences for the terminal, and as JSON."""

from __future__ import annotations

import hashlib
import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from rich.table import Table

from flax_resblock.checkpoint.record import digest, digests
from flax_resblock.config import name_of
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.parity.certificate import REFERENCE, versions
from flax_resblock.parity.devices import device_name
from flax_resblock.parity.diagnose import Diagnosis
from flax_resblock.parity.oracle import Comparison, Measurement
from flax_resblock.parity.parts import Devices

if TYPE_CHECKING:
    from flax_resblock.parity.user_module import ExaminedModule

SCHEMA = 2
"""Version of the JSON; it changes when a field changes its meaning or goes away."""

CRITERION = (
    "float64: relative L2 difference at most 1e-12 per tensor (training steps 1e-10). "
    "float32 and bfloat16: error against PyTorch's float64 at most four times "
    "PyTorch's own error in that precision, or 8 ulp."
)


@dataclass(frozen=True)
class Divergence:
    """One quantity that differs in one precision.

    Attributes:
      quantity, precision: Which.
      step: First training step at which it differs, None outside trajectories.
      order: ``"forward"``, or ``"backward"`` for gradients of activations.
      slot: The first in that order.
      excess: Its error in units of the limit.
      failed, of: Tensors that differ, and all.
    """

    quantity: str
    precision: str
    step: int | None
    order: str
    slot: str
    excess: float
    failed: int
    of: int

    def __str__(self) -> str:
        when = f" at step {self.step}" if self.step is not None else ""
        order = ", going backwards from the output," if self.order == "backward" else ""
        size = ""
        if math.isfinite(self.excess) and self.quantity != "tensors":
            size = f" ({self.excess:.1e} x the limit)"
        return (
            f"{self.quantity}, {self.precision}: {self.failed} of {self.of} differ, "
            f"first{order}{when} at {self.slot}{size}"
        )


def divergences(comparison: Comparison) -> Iterator[Divergence]:
    """Every quantity that differs."""
    for precision, quantity, rows in comparison.groups():
        first = comparison.first_divergence(quantity, precision)
        if first is not None:
            failed = sum(not m.verdict.passed for m in rows)
            order = "backward" if quantity == "activation gradient" else "forward"
            place = quantity, precision, first.step, order, first.slot
            yield Divergence(*place, first.verdict.excess, failed, len(rows))


def criterion_of(comparison: Comparison) -> str:
    """What counts as equal, in words."""
    tolerance = comparison.tolerance
    if tolerance is None:
        return CRITERION
    return (
        f"every element within {tolerance.atol:g} + {tolerance.rtol:g} x |PyTorch|, as "
        f"requested; errors are in units of that tolerance"
    )


def summary_table(comparison: Comparison) -> Table:
    """One row per precision and quantity: how many tensors, the worst one and its error against the
    limit."""
    columns = ("precision", "quantity", "tensors", "worst slot", *NUMBERS, "verdict")
    table = Table(*columns, title="Flax against PyTorch")
    for precision, quantity, rows in comparison.groups():
        worst = max(rows, key=lambda m: m.verdict.excess)
        failed = sum(not m.verdict.passed for m in rows)
        verdict = "[green]equal[/]" if not failed else f"[bold red]{failed} differ[/]"
        place = worst.slot if worst.step is None else f"{worst.slot}, step {worst.step}"
        table.add_row(precision, quantity, str(len(rows)), place, *_numbers(worst), verdict)
    return table


def slot_table(rows: list[Measurement], title: str) -> Table:
    """Every tensor of one quantity, in forward order."""
    table = Table("slot", *NUMBERS, "verdict", title=title)
    for row in rows:
        verdict = "[green]equal[/]" if row.verdict.passed else "[bold red]differs[/]"
        place = row.slot if row.step is None else f"{row.slot}, step {row.step}"
        table.add_row(place, *_numbers(row), verdict)
    return table


NUMBERS = ("error", "ulp", "PyTorch's own", "limit")


def _numbers(row: Measurement) -> tuple[str, str, str, str]:
    verdict = row.verdict
    own = "truth" if row.precision == "float64" else f"{verdict.reference_error:.1e}"
    return f"{verdict.error:.1e}", f"{verdict.ulp:.2g}", own, f"{verdict.limit:.1e}"


def verdict_lines(comparison: Comparison, compared_with: str = "") -> list[str]:
    """The outcome in words.

    Where something differs, the first slot that does, in forward order or, for gradients, in
    backward order.

    Args:
      compared_with: The PyTorch side, in words.
    """
    if comparison.passed:
        against = f", compared with {compared_with}" if compared_with else ""
        number = len(comparison.measurements)
        return [f"equal: all {number} tensors are within the criterion{against}"]
    return [str(divergence) for divergence in divergences(comparison)]


def report_json(
    comparison: Comparison | None,
    provenance: dict[str, Any],
    diagnosis: Sequence[Diagnosis] = (),
    precision_found: Sequence[Any] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The verification as a JSON object; docs/verification.md describes every field.

    Args:
      comparison: The measurements; None if the module does not run at all.
      precision_found: Rows of the precision guard (dataclasses).
    """
    ran = comparison is not None
    comparison = comparison or Comparison(())
    histogram = None
    if comparison.histogram is not None:
        histogram = {**_row(comparison.histogram.row), **asdict(comparison.histogram)}
        del histogram["row"]
    facts = {
        "schema": SCHEMA,
        "passed": ran and comparison.passed and not diagnosis,
        "criterion": criterion_of(comparison),
        "provenance": provenance,
        "precision_found": [asdict(row) for row in precision_found],
        "diagnosis": [asdict(row) for row in diagnosis],
        "notes": list(notes),
        "divergences": [{**asdict(row), "sentence": str(row)} for row in divergences(comparison)],
        "histogram": histogram,
        "measurements": [_row(m) for m in comparison.measurements],
    }
    return _plain(facts)


def _row(m: Measurement) -> dict[str, Any]:
    place = {"quantity": m.quantity, "slot": m.slot, "precision": m.precision, "step": m.step}
    return place | asdict(m.verdict) | {"excess": m.verdict.excess, "passed": m.verdict.passed}


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


PACKAGES = ("jax", "jaxlib", "flax", "torch", "numpy")


def checkpoint_facts(source: OpenedCheckpoint) -> dict[str, Any]:
    """The provenance of a checkpoint."""
    name = name_of(source.config)
    tensors = digests(source.tensors)
    return {
        "subject": name,
        "compared_with": REFERENCE,
        "checkpoint": source.record.source,
        "checkpoint_sha256": _combined(tensors),
        "sha256": tensors,
        "architecture": name,
        "naming": source.state_map.naming.name,
    }


def examined_facts(case: ExaminedModule) -> dict[str, Any]:
    """The provenance of a user's own module."""
    return {
        "subject": case.title,
        "compared_with": f"your module {case.title}",
        "architecture": name_of(case.config),
        "naming": case.naming,
        "sha256": {k: digest(v) for k, v in case.state.items()},
    }


def _combined(tensors: Mapping[str, str]) -> str:
    """One digest over the names and digests of all tensors."""
    lines = (f"{name}\0{value}\n" for name, value in sorted(tensors.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


class Clock:
    """Measures a verification; create it before the verification starts."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def facts(self, images: np.ndarray, seed: int, devices: Devices) -> dict[str, Any]:
        """Input, devices, versions, time and memory; the peak is that of the whole process so
        far."""
        batch, *shape = images.shape
        size: dict[str, Any] = {"shape": shape}
        if len(shape) == 3:
            size = dict(zip(("height", "width", "channels"), shape, strict=True))
        unit = 1 if sys.platform == "darwin" else 1024
        on_jax = device_name(devices.jax or jax.devices()[0])
        return {
            "command": " ".join(["flax-resblock", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(PACKAGES),
            "devices": {"jax": on_jax, "torch": str(devices.torch), "oracle": "cpu"},
            "input": {"batch": batch, **size, "seed": seed},
            "seconds": round(time.perf_counter() - self.start, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }
