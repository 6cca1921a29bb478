"""The measurements as tables, JSON and a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from flax_resblock.bench.cases import BenchCase
from flax_resblock.bench.run import Result, quartiles
from flax_resblock.errors import optional
from flax_resblock.training.curves import NEEDED

MEBI = 1 << 20


def machine() -> dict[str, Any]:
    """Name, cores, memory and versions, without which a time means nothing."""
    lines = []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    packages = ("jax", "jaxlib", "flax", "torch", "numpy")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def machine_line(found: dict[str, Any]) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cpu']}, {found['cores']} cores, {found['memory_bytes'] / (1 << 30):.0f} GiB; "
        f"Python {found['python']}, {versions}"
    )


def table(case: BenchCase, results: Sequence[Result]) -> Table:
    """One row per contestant: medians with quartiles; seconds until the first result, and of a
    process that finds it compiled; memory."""
    found = new_table(case.title, ("ms", "ratio", "first s", "cached s", "peak MiB"))
    for result in results:
        if result.failed:
            found.add_row(result.contestant, "failed")
            continue
        times = spread(result.rounds, "{:.4g}", 1e3), spread(result.ratios, "{:.2f}")
        starts = f"{result.first:.1f}", "" if result.cached is None else f"{result.cached:.1f}"
        found.add_row(result.contestant, *times, *starts, f"{result.peak / MEBI:.0f}")
    return found


def new_table(title: str, columns: Sequence[str]) -> Table:
    """A table of contestants, whose names are its first column."""
    found = Table(title=title, title_justify="left")
    found.add_column("", no_wrap=True)
    for column in columns:
        found.add_column(column, justify="right", no_wrap=True)
    return found


def spread(values: Sequence[float], form: str, unit: float = 1.0) -> str:
    """``"0.83 (0.80-0.85)"``: median and quartiles."""
    low, middle, high = (form.format(unit * value) for value in quartiles(values))
    return f"{middle} ({low}-{high})"


def disagreement(results: Sequence[Result]) -> float:
    """The largest relative difference between a contestant's value and the first one's."""
    values = [result.value for result in results if not result.failed]
    return max(abs(value - values[0]) for value in values) / abs(values[0])


def content(
    cases: Sequence[tuple[BenchCase, Sequence[Result]]], settings: dict[str, Any]
) -> dict[str, Any]:
    """All measurements with the machine and the settings, for JSON."""
    entries = []
    for case, results in cases:
        found = [result.content() for result in results]
        entries.append({"case": vars(case), "title": case.title, "results": found})
    return {"machine": machine(), "settings": settings, "cases": entries}


def markdown_table(found: dict[str, Any]) -> str:
    """The table for a document, from :func:`content`: PyTorch eager's milliseconds, ratios of the
    others to it with quartiles, of our peak memory to its."""
    lines = [
        "| | PyTorch eager | torch.compile | flax-resblock | plain XLA | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in found["cases"]:
        base, *others = case["results"]
        if case["case"]["what"] == "conversion" or base["failed"]:
            continue
        cells = [f"{1e3 * base['seconds_quartiles'][1]:.4g} ms"]
        for result in others:
            if result["failed"]:
                cells.append("failed")
                continue
            low, middle, high = result["ratio_quartiles"]
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        ours = next(result for result in others if result["contestant"] == "flax-resblock")
        cells.append("" if ours["failed"] else f"{ours['peak'] / base['peak']:.2f}")
        lines.append(f"| {case['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(cases: Sequence[tuple[BenchCase, Sequence[Result]]], path: Path) -> None:
    """Ratios with their quartiles, a group of bars per case, as PNG.

    Raises:
      MissingDependencyError: matplotlib is not installed.
    """
    figures = optional("matplotlib.figure", NEEDED)
    colours = {"PyTorch": "#ee8866", "torch.compile": "#ffcc88"}
    colours |= {"flax-resblock": "#4477aa", "plain": "#99bbdd"}
    groups = [
        (case.title, [r for r in results if not r.failed])
        for case, results in cases
        if case.what != "conversion" or len(cases) == 1
    ]
    rows = sum(len(good) + 1 for _, good in groups)
    figure = figures.Figure(figsize=(8, 0.14 * rows + 0.9), layout="constrained")
    axes = figure.add_subplot()
    position, ticks, seen = 0, [], set()
    for title, good in groups:
        ticks.append((position + (len(good) - 1) / 2, title))
        for result in good:
            low, middle, high = quartiles(result.ratios)
            key = next((key for key in colours if result.contestant.startswith(key)), "")
            label, colour = None if key in seen else result.contestant, colours.get(key, "#bbbbbb")
            axes.barh(position, middle, 0.9, color=colour, label=label)
            axes.plot([low, high], [position, position], color="black", linewidth=0.8)
            axes.text(max(high, middle) + 0.02, position, f"{middle:.2f}", va="center", fontsize=6)
            seen.add(key)
            position += 1
        position += 1
    axes.set_yticks([tick for tick, _ in ticks], [title for _, title in ticks], fontsize=7)
    axes.set_ylim(position - 0.5, -1)
    axes.axvline(1, color="grey", linewidth=0.8)
    words = "time / time of PyTorch eager: median and quartiles of interleaved rounds"
    axes.set_xlabel(f"{words}; lower is faster", fontsize=8)
    figure.legend(fontsize=7, loc="outside upper right", ncols=4, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=150, format="png")
