"""The HTML report: one self-contained document, made from the JSON report.

Names of tensors, paths and the command are whatever a file holds: they reach the page only through
the template's escaping and as text of an SVG."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from flax_resblock.errors import optional, visible
from flax_resblock.parity.plots import Curve, depth_plot, histogram_plot, trajectory_plot

FAMILIES = {"Forward": "forward", "Gradients": "gradient", "Statistics": "running statistics"}
"""Heading of a group of plots, and what the names of its quantities contain."""

OTHERS = "Other tensors"

UNITS = ("bytes", "kB", "MB", "GB", "TB")


class Row(NamedTuple):
    """One measurement, with the fields of the JSON report. Not a dataclass: a template reads
    thousands of them."""

    number: int
    quantity: str
    slot: str
    precision: str
    step: int | None
    error: float
    reference_error: float
    limit: float
    ulp: float
    excess: float
    passed: bool

    @property
    def badness(self) -> tuple[bool, float]:
        """The sort key of the worst row: a failure first, NaN above infinity."""
        return not self.passed, math.inf if math.isnan(self.excess) else self.excess


class RowGroup(NamedTuple):
    """Measurements that belong together."""

    key: str
    rows: list[Row]
    worst: Row
    failed: int


@dataclass(frozen=True)
class Panel:
    """A plot and the words below it."""

    title: str
    worst: Row
    failed: int
    total: int
    exact: int
    infinite: int
    svg: str


def render_page(facts: Mapping[str, Any]) -> str:
    """The HTML report.

    Args:
      facts: The JSON report of ``flax-resblock verify --json-file``, schema 2; numbers that JSON
        lacks are the strings ``"inf"``, ``"-inf"``, ``"nan"``. ``other_calls``, if there are
        any, are the reports of the other ways in which the module was called.
    Returns:
      A document that asks for no other file, is complete without JavaScript, and allows no script
      but its own.
    Raises:
      MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    for name in ("matplotlib", "jinja2"):
        how = "which is not installed: pip install 'flax-resblock[report]'."
        optional(name, f"the HTML report needs {name}, {how}")
    import jinja2

    loader, strict = jinja2.PackageLoader("flax_resblock.parity", ""), jinja2.StrictUndefined
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=strict
    )
    environment.filters |= {"sci": _scientific, "times": _times, "bytes": _bytes, "digest": _digest}
    view, *others = _views(_visible(facts))
    return environment.get_template("page.html.j2").render(**view, others=others)


def _views(facts: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What the template shows of a report, and of the other calls in it. Rows are numbered through,
    as names of plots derive from their numbers.
    """
    first = 1
    for one in (facts, *facts.get("other_calls", ())):
        rows = [_row(number, entry) for number, entry in enumerate(one["measurements"], first)]
        first += len(rows)
        quantities, cells = _groups(rows, "quantity"), _groups(rows, "quantity", "precision")
        yield {
            "facts": one,
            "total": len(rows),
            "failed": sum(not row.passed for row in rows),
            "precisions": _groups(rows, "precision"),
            "quantities": quantities,
            "compared": _compared(quantities),
            "matrix": {(g.rows[0].quantity, g.rows[0].precision): g for g in cells},
            "families": _families([row for row in rows if row.step is None]),
            "trajectories": _trajectories([row for row in rows if row.step is not None]),
            "histogram": _histogram(one["histogram"]),
            "table": _table(rows),
        }


def _visible(value: Any) -> Any:
    """Strings as :func:`flax_resblock.errors.visible` shows them."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {_visible(key): _visible(item) for key, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list | tuple) else value


def _row(number: int, entry: Mapping[str, Any]) -> Row:
    figures = ("error", "reference_error", "limit", "ulp", "excess")
    return Row(number, **{**entry, **{name: float(entry[name]) for name in figures}})


def _groups(rows: Iterable[Row], *fields: str) -> list[RowGroup]:
    """By the values of some fields, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, field) for field in fields), []).append(row)
    return [
        RowGroup(
            str(key[0]),
            found,
            max(found, key=lambda row: row.badness),
            sum(not row.passed for row in found),
        )
        for key, found in groups.items()
    ]


def _compared(quantities: Iterable[RowGroup]) -> str:
    """``eval forward; sgd: loss, parameters``."""
    parts: dict[str, list[str]] = {}
    for group in quantities:
        head, _, tail = group.key.partition(": ")
        parts.setdefault(head, []).extend([tail] if tail else [])
    return "; ".join(
        f"{head}: {', '.join(tails)}" if tails else head for head, tails in parts.items()
    )


def _table(rows: Sequence[Row]) -> list[Row]:
    """Every measurement; of training steps the worst tensor of each step and quantity."""
    steps = _groups([row for row in rows if row.step is not None], "quantity", "precision", "step")
    return [*(row for row in rows if row.step is None), *(group.worst for group in steps)]


def _curve(rows: Sequence[Row]) -> Curve:
    values = [(row.error, row.reference_error, row.limit, row.passed) for row in rows]
    return Curve(*zip(*values, strict=True))


def _panel(title: str, group: RowGroup, svg: str) -> Panel:
    exact = sum(row.error == 0 for row in group.rows)
    infinite = sum(not math.isfinite(row.error) for row in group.rows)
    return Panel(title, group.worst, group.failed, len(group.rows), exact, infinite, svg)


def _families(rows: Sequence[Row]) -> list[tuple[str, int, int, list[tuple[str, list[Panel]]]]]:
    """Heading, failures, tensors, and the panels of each quantity, one per precision."""
    families = []
    for title in [*FAMILIES, OTHERS]:
        members = [row for row in rows if _family(row.quantity) == title]
        quantities = []
        for quantity in _groups(members, "quantity"):
            panels = []
            for group in _groups(quantity.rows, "precision"):
                name, slots = f"depth-{group.rows[0].number}", [row.slot for row in group.rows]
                label = _label(f"{quantity.key}, {group.key}", group, "slot")
                notes = [f"{row.slot}: {_scientific(row.error)}" for row in group.rows]
                svg = depth_plot(_curve(group.rows), slots, name, label, notes)
                panels.append(_panel(group.key, group, svg))
            quantities.append((quantity.key, panels))
        if members:
            failed = sum(not row.passed for row in members)
            families.append((title, failed, len(members), quantities))
    return families


def _family(quantity: str) -> str:
    return next((title for title, part in FAMILIES.items() if part in quantity), OTHERS)


def _trajectories(rows: Sequence[Row]) -> list[Panel]:
    """One panel per quantity, with a line per precision through the worst tensor of each step."""
    panels = []
    for group in _groups(rows, "quantity"):
        curves = {}
        for part in _groups(group.rows, "precision"):
            worst = [step.worst for step in _groups(part.rows, "step")]
            curves[part.key] = ([row.step or 0 for row in worst], _curve(worst))
        label = _label(group.key, group, "training step")
        svg = trajectory_plot(curves, f"steps-{group.rows[0].number}", label)
        panels.append(_panel(group.key, group, svg))
    return panels


def _label(what: str, group: RowGroup, axis: str) -> str:
    worst = group.worst
    count = len(group.rows)
    verdict = (
        f"{group.failed} of {count} differ" if group.failed else f"all {count} within the limit"
    )
    return (
        f"{what}: error by {axis}. Worst {worst.slot} with {_scientific(worst.error)}, limit "
        f"{_scientific(worst.limit)}; {verdict}."
    )


def _histogram(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None
    label = (
        f"Histogram of the errors of the elements of {found['slot']}, {found['quantity']}, "
        f"{found['precision']}."
    )
    edges = [float(edge) for edge in found["edges"]]
    return {
        **found,
        "of_torch": any(found["torch"]),
        "svg": histogram_plot(edges, found["flax"], found["torch"], "histogram", label),
    }


def _scientific(value: float) -> str:
    return f"{value:.2e}" if value and math.isfinite(value) else f"{value:g}"


def _times(value: float) -> str:
    """A multiple, to two digits."""
    return f"{value:#.2g}".removesuffix(".") if value else "0"


def _bytes(count: float) -> str:
    power = min(int(math.log(max(count, 1), 1000)), len(UNITS) - 1)
    return f"{count / 1000**power:.3g} {UNITS[power]}"


def _digest(script: str) -> str:
    """The source expression by which a content security policy allows one inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
