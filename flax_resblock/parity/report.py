"""A verification for people (terminal tables and sentences) and for programs (JSON)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from flax_resblock.parity.comparison import Comparison, Measurement
from flax_resblock.parity.diagnose import Diagnosis

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
        """In words."""
        when = f" at step {self.step}" if self.step is not None else ""
        order = ", going backwards from the output," if self.order == "backward" else ""
        size = (
            f" ({self.excess:.1e} x the limit)"
            if math.isfinite(self.excess) and self.quantity != "tensors"
            else ""
        )
        return (
            f"{self.quantity}, {self.precision}: {self.failed} of {self.of} differ, "
            f"first{order}{when} at {self.slot}{size}"
        )


def divergences(comparison: Comparison) -> Iterator[Divergence]:
    """Every quantity that differs."""
    for precision, quantity, rows in comparison.groups():
        first = comparison.first_divergence(quantity, precision)
        if first is not None:
            failed = sum(not m.judgement.passed for m in rows)
            order = "backward" if quantity == "activation gradient" else "forward"
            yield Divergence(
                quantity,
                precision,
                first.step,
                order,
                first.slot,
                first.judgement.excess,
                failed,
                len(rows),
            )


def criterion_of(comparison: Comparison) -> str:
    """What counts as equal, in words."""
    tolerance = comparison.tolerance
    if tolerance is None:
        return CRITERION
    return (
        f"every element within {tolerance.atol:g} + {tolerance.rtol:g} x |PyTorch|, as asked "
        f"for; errors are given in units of that"
    )


def summary_table(comparison: Comparison) -> Table:
    """One row per precision and quantity: how many tensors, the worst one and its error against the
    limit.
    """
    table = Table(
        "precision",
        "quantity",
        "tensors",
        "worst slot",
        "error",
        "ulp",
        "PyTorch's own",
        "limit",
        "verdict",
        title="Flax against PyTorch",
    )
    for precision, quantity, rows in comparison.groups():
        worst = max(rows, key=lambda m: m.judgement.excess)
        failed = sum(not m.judgement.passed for m in rows)
        verdict = "[green]equal[/]" if not failed else f"[bold red]{failed} differ[/]"
        place = worst.slot if worst.step is None else f"{worst.slot}, step {worst.step}"
        table.add_row(precision, quantity, str(len(rows)), place, *_numbers(worst), verdict)
    return table


def slot_table(rows: list[Measurement], title: str) -> Table:
    """Every tensor of one quantity, in forward order."""
    table = Table("slot", "error", "ulp", "PyTorch's own", "limit", "verdict", title=title)
    for row in rows:
        verdict = "[green]equal[/]" if row.judgement.passed else "[bold red]differs[/]"
        table.add_row(
            row.slot if row.step is None else f"{row.slot}, step {row.step}",
            *_numbers(row),
            verdict,
        )
    return table


def _numbers(row: Measurement) -> tuple[str, str, str, str]:
    judgement = row.judgement
    own = "truth" if row.precision == "float64" else f"{judgement.reference_error:.1e}"
    return f"{judgement.error:.1e}", f"{judgement.ulp:.2g}", own, f"{judgement.limit:.1e}"


def verdict_lines(comparison: Comparison, compared_with: str = "") -> list[str]:
    """The outcome in words.

    Where something differs, the first slot that does, in forward order or, for gradients, in
    backward order.

    Args:
      comparison: What was measured.
      compared_with: The PyTorch side, in words.
    """
    if comparison.passed:
        against = f", compared with {compared_with}" if compared_with else ""
        number = len(comparison.measurements)
        return [f"equal: all {number} tensors are within the criterion{against}"]
    return [str(divergence) for divergence in divergences(comparison)]


def to_json(
    comparison: Comparison | None,
    provenance: dict[str, Any],
    diagnosis: Sequence[Diagnosis] = (),
    precision_found: Sequence[Any] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The verification as a JSON object; docs/verification.md describes every field.

    Args:
      comparison: What was measured; None where the module does not even run.
      provenance: What was compared, where and when.
      diagnosis: What is wrong.
      precision_found: Rows of the precision guard (dataclasses).
      notes: Sentences.
    """
    ran = comparison is not None
    comparison = comparison or Comparison(())
    histogram = comparison.histogram
    facts = {
        "schema": SCHEMA,
        "passed": ran and comparison.passed and not diagnosis,
        "criterion": criterion_of(comparison),
        "provenance": provenance,
        "precision_found": [asdict(row) for row in precision_found],
        "diagnosis": [asdict(row) for row in diagnosis],
        "notes": list(notes),
        "divergences": [{**asdict(row), "sentence": str(row)} for row in divergences(comparison)],
        "histogram": None
        if histogram is None
        else {**_row(histogram.row), **{k: v for k, v in asdict(histogram).items() if k != "row"}},
        "measurements": [_row(m) for m in comparison.measurements],
    }
    return _plain(facts)


def _row(m: Measurement) -> dict[str, Any]:
    judgement = m.judgement
    return {
        "quantity": m.quantity,
        "slot": m.slot,
        "precision": m.precision,
        "step": m.step,
        "error": judgement.error,
        "reference_error": judgement.reference_error,
        "limit": judgement.limit,
        "ulp": judgement.ulp,
        "excess": judgement.excess,
        "passed": judgement.passed,
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become strings."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
