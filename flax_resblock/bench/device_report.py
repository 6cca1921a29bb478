"""The measurements on an accelerator as tables and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from flax_resblock.bench.device_run import PartResult
from flax_resblock.bench.report import machine
from flax_resblock.bench.run import quartiles

MEBI = 1 << 20


def table(found: PartResult) -> Table:
    """One row per contestant: milliseconds and ratios as medians with quartiles, images per second,
    the share of the chip's peak, seconds until the first result, memory, and the difference of the
    losses or outputs."""
    title = f"{found.part.name}: {found.part.case.title}"
    shown = Table(title=title, title_justify="left")
    shown.add_column("", no_wrap=True)
    for column in ("ms", "images/s", "of peak", "ratio", "first s", "MiB", "differs by"):
        shown.add_column(column, justify="right", no_wrap=True)
    for result in found.results:
        if not result.rounds:
            shown.add_row(result.contestant, "failed")
            continue
        low, middle, high = (1e3 * value for value in quartiles(result.rounds))
        ratio, share = quartiles(result.ratios), found.share_of_peak(result)
        shown.add_row(
            result.contestant,
            f"{middle:.4g} ({low:.4g}-{high:.4g})",
            f"{1e3 * found.part.case.batch / middle:,.0f}",
            "" if share is None else f"{share:.1%}",
            f"{ratio[1]:.3f} ({ratio[0]:.3f}-{ratio[2]:.3f})",
            f"{result.first:.1f}",
            f"{result.memory / MEBI:,.0f}",
            f"{result.apart:.1g}",
        )
    return shown


def sentences(found: PartResult) -> list[str]:
    """What failed, what differs, and where the time goes."""
    said = [f"{one.contestant}: {one.failed}" for one in found.results if one.failed]
    for name in found.different:
        said.append(f"{name} did not compute the same as {found.results[0].contestant}")
    for result in found.results:
        if result.profile:
            groups = sorted(result.profile["groups"].items(), key=lambda pair: -pair[1])
            parts = ", ".join(f"{name} {milliseconds:.2f} ms" for name, milliseconds in groups)
            said.append(f"{result.contestant}, kernels: {parts}")
    return said


def content(
    found: Sequence[PartResult], settings: dict[str, Any], left_out: Sequence[str]
) -> dict[str, Any]:
    """All measurements with the machine and the settings, for JSON."""
    devices = {result.device for part in found for result in part.results if result.device}
    return {
        "schema": 1,
        "machine": machine() | {"devices": sorted(devices)},
        "settings": settings,
        "parts": [part.content() for part in found],
        "left_out": list(left_out),
    }
