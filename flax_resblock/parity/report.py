"""A comparison for people (a terminal table) and for programs (JSON)."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from flax_resblock.parity.compare import Comparison, Measurement

SCHEMA = 1
"""Version of the JSON; it changes when a field changes its meaning or goes away."""


def summary_table(comparison: Comparison) -> Table:
    """One row per precision and quantity: how many tensors, the worst one and its error against the limit."""
    table = Table("precision", "quantity", "tensors", "worst slot", "error", "PyTorch's own", "limit", "verdict", title="Flax against PyTorch")
    for precision, quantity, rows in comparison.groups():
        worst = max(rows, key=lambda m: m.judgement.excess)
        failed = sum(not m.judgement.passed for m in rows)
        verdict = "[green]equal[/]" if not failed else f"[bold red]{failed} differ[/]"
        judgement = worst.judgement
        own = "truth" if precision == "float64" else f"{judgement.reference_error:.1e}"
        table.add_row(precision, quantity, str(len(rows)), worst.slot, f"{judgement.error:.1e}", own, f"{judgement.limit:.1e}", verdict)
    return table


def slot_table(rows: list[Measurement], title: str) -> Table:
    """Every tensor of one quantity, in forward order."""
    table = Table("slot", "error", "ulp", "PyTorch's own", "limit", "verdict", title=title)
    for row in rows:
        judgement = row.judgement
        verdict = "[green]equal[/]" if judgement.passed else "[bold red]differs[/]"
        table.add_row(row.slot, f"{judgement.error:.2e}", f"{judgement.ulp:.1f}", f"{judgement.reference_error:.2e}", f"{judgement.limit:.2e}", verdict)
    return table


def verdict_lines(comparison: Comparison) -> list[str]:
    """The outcome in words; where something differs, the first slot in forward order that does."""
    if comparison.passed:
        return [f"equal: all {len(comparison.measurements)} tensors are within the criterion"]
    lines = []
    for precision, quantity, rows in comparison.groups():
        first = comparison.first_divergence(quantity, precision)
        if first is not None:
            failed = sum(not m.judgement.passed for m in rows)
            lines.append(f"{quantity}, {precision}: {failed} of {len(rows)} differ, first at {first.slot} ({first.judgement.excess:.1e} x the limit)")
    return lines


def to_json(comparison: Comparison, provenance: dict[str, Any]) -> dict[str, Any]:
    """The comparison as a JSON object: ``schema``, ``passed``, ``provenance``, ``measurements``."""
    return {
        "schema": SCHEMA,
        "passed": comparison.passed,
        "provenance": provenance,
        "measurements": [
            {
                "quantity": m.quantity,
                "slot": m.slot,
                "precision": m.precision,
                "error": m.judgement.error,
                "reference_error": m.judgement.reference_error,
                "limit": m.judgement.limit,
                "ulp": m.judgement.ulp,
                "passed": m.judgement.passed,
            }
            for m in comparison.measurements
        ],
    }
