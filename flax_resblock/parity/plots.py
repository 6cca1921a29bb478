"""The plots of the HTML report: small SVG panels with the colours and the font of their page.

Needs matplotlib (the extra ``report``). Nothing here changes matplotlib's global state: no pyplot,
no backend, settings only within a context."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, FLAX, TORCH, FAIL = (f"#01020{i}" for i in range(6))
"""Stand-ins: matplotlib draws in them, and the SVG gets the page's CSS variables instead, which
follow the reader's light or dark mode."""

_NAMES = ("ink", "muted", "grid", "flax", "torch", "fail")
VARIABLES = {f"#01020{i}": f"--{name}" for i, name in enumerate(_NAMES)}

WIDTH, HEIGHT, FONT, LEFT = 470, 262, 13, 0.12
"""In units of the SVG (text on a phone has 9 pixels); ``LEFT`` is a share of the width."""

GROUPS = 9
"""Stages that are named below a plot; where there are more, only the ends are."""
WORDS = 12
"""Slots that are named one by one."""


@contextmanager
def _settings() -> Iterator[None]:
    """The same plot whatever your matplotlibrc says; dollar signs in names are no formulas."""
    from matplotlib import style

    ours = {"font.size": FONT, "text.parse_math": False, "svg.fonttype": "none"}
    with style.context(["default", ours | {"svg.hashsalt": "parity"}]), warnings.catch_warnings():
        # glyphs that matplotlib's font lacks are the business of the reader's font
        warnings.simplefilter("ignore", UserWarning)
        yield


@dataclass(frozen=True)
class Curve:
    """Errors along an axis; all sequences have one length, and values may be infinite or NaN.

    Attributes:
      flax, torch, limit: Relative error of Flax, PyTorch's own, and what Flax had to stay within.
    """

    flax: Sequence[float]
    torch: Sequence[float]
    limit: Sequence[float]
    passed: Sequence[bool]


@_settings()
def depth_plot(
    curve: Curve, slots: Sequence[str], name: str, label: str, notes: Sequence[str]
) -> str:
    """Error against depth.

    Args:
      curve: One value per slot.
      slots: Names, in forward order.
      name: Unique within the page; a CSS identifier.
      label: What the plot shows, for those who cannot see it.
      notes: What a pointer over a Flax point shows.
    Returns:
      An ``<svg>`` element.
    """
    figure, axes = _panel(bottom=0.11 if len(slots) > WORDS else 0.31)
    low, high = _scale(axes, [*curve.flax, *curve.torch, *curve.limit])
    _slot_axis(axes, slots)
    places = range(len(slots))
    axes.step(places, [min(max(v, low), high) for v in curve.limit], where="mid", **LIMIT)
    size = 7 if len(slots) <= WORDS else 5.2 if len(slots) <= 80 else 3.8
    if any(curve.torch):
        style = {"mfc": "none", "mec": TORCH, "mew": 1.1, "ms": size, "clip_on": False}
        axes.plot(places, [_pin(v, low, high) for v in curve.torch], "s", **style)
    shapes = [_shape(value, passed) for value, passed in zip(curve.flax, curve.passed, strict=True)]
    titles = {}
    for shape, style in MARKERS.items():
        chosen = [place for place in places if shapes[place] == shape]
        if chosen:
            heights = [_pin(curve.flax[place], low, high) for place in chosen]
            options = {"ms": size * style["grow"], "gid": shape, "zorder": 3, **style["line"]}
            axes.plot(chosen, heights, ls="none", clip_on=False, **options)
            titles[shape] = [notes[place] for place in chosen]
    return _svg(figure, name, label, titles)


@_settings()
def trajectory_plot(
    curves: Mapping[str, tuple[Sequence[int], Curve]], name: str, label: str
) -> str:
    """Error against training step, one line per precision; arguments and result as for
    :func:`depth_plot`.

    Args:
      curves: By precision, which stands at the end of its limit: the steps, and the worst tensor of
        each.
    """
    figure, axes = _panel(bottom=0.19, right=0.845)
    low, high = _scale(axes, [v for _, c in curves.values() for v in (*c.flax, *c.torch, *c.limit)])
    for precision, (steps, curve) in curves.items():
        axes.plot(steps, [min(max(v, low), high) for v in curve.limit], **LIMIT)
        if any(curve.torch):
            style = {"color": TORCH, "lw": 1.0, "marker": "s", "mfc": "none", "ms": 3.6}
            axes.plot(steps, [_pin(v, low, high) for v in curve.torch], clip_on=False, **style)
        heights = [_pin(v, low, high) for v in curve.flax]
        axes.plot(steps, heights, color=FLAX, lw=1.6, marker="o", ms=4.4, clip_on=False, zorder=3)
        wrong = [i for i, passed in enumerate(curve.passed) if not passed]
        x, y = [steps[i] for i in wrong], [heights[i] for i in wrong]
        style = {"ls": "none", "ms": 7.5, "zorder": 4, **MARKERS["failed"]["line"]}
        axes.plot(x, y, clip_on=False, **style)
        end = steps[-1], _pin(curve.limit[-1], low, high)
        words = _short(precision, 10)
        axes.annotate(words, end, (7, -4), textcoords="offset points", color=MUTED)
    last = max(step for steps, _ in curves.values() for step in steps)
    stride = max(1, math.ceil(last / 10))
    axes.set_xticks(range(stride if stride > 1 else 1, last + 1, stride))
    axes.set_xlabel("training step", color=MUTED)
    return _svg(figure, name, label, {})


@_settings()
def histogram_plot(
    edges: Sequence[float], flax: Sequence[int], torch: Sequence[int], name: str, label: str
) -> str:
    """Elements per bin; arguments as in the JSON report (``edges`` are logarithms to base 10),
    ``name``, ``label`` and result as for :func:`depth_plot`."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _panel(bottom=0.2)
    axes.stairs(flax, edges, fill=True, color=FLAX, alpha=0.28, lw=0)
    axes.stairs(flax, edges, color=FLAX, lw=1.8)
    if any(torch):
        axes.stairs(torch, edges, color=TORCH, lw=1.5, ls=(0, (1.5, 1.2)))
    axes.set_ylim(0, max(*flax, *torch, 1) * 1.08)
    margin = 0.02 * (edges[-1] - edges[0])
    axes.set_xlim(edges[0] - margin, edges[-1] + margin)
    decades = range(math.ceil(edges[0]), math.floor(edges[-1]) + 1)
    if len(decades) > 1:
        decades = decades[:: math.ceil(len(decades) / 8)]
        axes.set_xticks(decades, [_power(exponent) for exponent in decades])
    else:
        ends = edges[0], edges[-1]
        axes.set_xticks(ends, [f"{10**end:.1e}" for end in ends])
    axes.tick_params(axis="x", pad=8)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_xlabel("error of an element, relative to the tensor's root mean square", color=MUTED)
    return _svg(figure, name, label, {})


LIMIT: dict[str, Any] = {"color": MUTED, "lw": 1.3, "ls": (0, (4, 2.5))}

MARKERS: dict[str, dict[str, Any]] = {
    "within": {"grow": 1.0, "line": {"marker": "o", "mfc": FLAX, "mec": FLAX, "mew": 0}},
    "exact": {"grow": 1.15, "line": {"marker": "v", "mfc": "none", "mec": FLAX, "mew": 1.2}},
    "failed": {"grow": 1.5, "line": {"marker": "x", "mec": FAIL, "mew": 2.1}},
}
"""Shape before colour: a dot, a hollow triangle on the bottom edge for no error at all, a cross for
a failure."""


def _shape(value: float, passed: bool) -> str:
    return "failed" if not passed else "within" if value else "exact"


def _panel(bottom: float, right: float = 0.985) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    FigureCanvasSVG(figure)
    axes = figure.add_axes((LEFT, bottom, right - LEFT, 0.955 - bottom))
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=MUTED, pad=5)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(MUTED)
    return figure, axes


def _power(exponent: float) -> str:
    return "10" + f"{exponent:.0f}".translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _scale(axes: Axes, values: Iterable[float]) -> tuple[float, float]:
    """A logarithmic axis for what is positive and finite, with a margin; returns its two ends."""
    logs = [math.log10(v) for v in values if math.isfinite(v) and v > 0] or [-16.0]
    low, high = min(logs), max(logs)
    margin = max(2.2 - (high - low), 0.3)
    low, high = low - margin / 2, high + margin / 2
    stride = max(1, math.ceil((high - low) / 7))
    exponents = [e for e in range(math.ceil(low), math.floor(high) + 1) if e % stride == 0]
    axes.set_yscale("log")
    axes.set_ylim(10**low, 10**high)
    axes.set_yticks([10.0**e for e in exponents], [_power(e) for e in exponents])
    axes.minorticks_off()
    return 10**low, 10**high


def _pin(value: float, low: float, high: float) -> float:
    """No error at all goes to the bottom edge, infinity and NaN to the top."""
    return high if math.isnan(value) else min(max(value, low), high)


def _slot_axis(axes: Axes, slots: Sequence[str]) -> None:
    """Few slots by name; many by stage, which is what comes before the first dot or slash."""
    axes.set_xlim(-0.7, len(slots) - 0.3)
    if len(slots) <= WORDS:
        style = {"rotation": 32, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(slots)), [_short(slot, 15) for slot in slots], **style)
        return
    stages = [re.split(r"[./]", slot)[0] for slot in slots]
    starts = [i for i, stage in enumerate(stages) if i == 0 or stage != stages[i - 1]]
    if len(starts) > GROUPS:
        axes.set_xticks([0, len(slots) - 1], ["first slot", "last slot"])
        return
    for start in starts[1:]:
        axes.axvline(start - 0.5, color=GRID, lw=0.8)
    letters = (0.985 - LEFT) * WIDTH / (0.56 * FONT) / len(slots)  # above one slot, on average
    free, ticks, labels = -0.7, [], []
    for start, end in zip(starts, [*starts[1:], len(slots)], strict=True):
        text = _short(stages[start], 12)
        half = len(text) / letters / 2
        middle = min(max((start + end - 1) / 2, half - 0.7), len(slots) - 0.3 - half)
        if middle - half >= free:
            ticks, labels, free = [*ticks, middle], [*labels, text], middle + half
    axes.set_xticks(ticks, labels)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _svg(figure: Figure, name: str, label: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The figure as an element of a page: its colours are variables, its identifiers begin with
    ``name``, it names no other document."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for shape, texts in titles.items():
        group = next(element for element in root.iter("g") if element.get("id") == shape)
        for use, text in zip(group.iter("use"), texts, strict=True):
            ElementTree.SubElement(use, "title").text = text
    for element in root.iter():
        element.attrib = _attributes(element.attrib, name)
    for group in root.iter("g"):
        styles = {child.get("style") for child in group}
        if len(group) > 1 and len(styles) == 1 and all(child.tag == "use" for child in group):
            group.set("style", str(styles.pop()))
            for use in group:
                del use.attrib["style"]
    root.attrib = {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "class": "plot", "role": "img"}
    root.set("aria-label", label)
    for element in root.iter():
        element.tail = None
        element.text = element.text if (element.text or "").strip() else None
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: Mapping[str, str], name: str) -> dict[str, str]:
    """What a page needs of them: no fonts, no clipping (nothing lies outside the axes), no
    identifiers that nothing uses; numbers to a tenth."""
    to_a_tenth = lambda number: f"{float(number[0]):.1f}".removesuffix(".0")  # noqa: E731
    kept = {}
    for key, value in attributes.items():
        key = key.rpartition("}")[2]
        if key == "href":
            kept[key] = f"#{name}-{value[1:]}"
        elif key == "id" and re.fullmatch(r"m[0-9a-f]{6,}", value):
            kept[key] = f"{name}-{value}"
        elif key in ("d", "x", "y") or (key == "transform" and "rotate(-0 " not in value):
            kept[key] = " ".join(re.sub(r"-?\d+\.\d+", to_a_tenth, value).split())
        elif key == "style":
            value = re.sub(r"font: (?:\w+ )*?([\d.]+px) [^;]*", r"font-size: \1", value)
            value = re.sub(r"font-family:[^;]*;?", "", value)
            value = re.sub(r"#01020\d", lambda colour: f"var({VARIABLES[colour[0]]})", value)
            kept[key] = value.replace("; ", ";").replace(": ", ":")
    return kept
