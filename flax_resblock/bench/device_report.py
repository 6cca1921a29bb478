"""The measurements on an accelerator as tables and JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from flax_resblock.bench.device_run import PartResult
from flax_resblock.bench.report import MEBI, machine, new_table, spread


def table(found: PartResult) -> Table:
    """One row per contestant: milliseconds and ratios as medians with quartiles, images per second,
    the share of the chip's peak, seconds until the first result, memory, and the difference of the
    losses or outputs."""
    columns = ("ms", "images/s", "of peak", "ratio", "first s", "MiB", "differs by")
    shown = new_table(f"{found.part.name}: {found.part.case.title}", columns)
    for result in found.results:
        if not result.rounds:
            shown.add_row(result.contestant, "failed")
            continue
        share = found.share_of_peak(result)
        shown.add_row(
            result.contestant,
            spread(result.rounds, "{:.4g}", 1e3),
            f"{found.part.case.batch / statistics.median(result.rounds):,.0f}",
            "" if share is None else f"{share:.1%}",
            spread(result.ratios, "{:.3f}"),
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
