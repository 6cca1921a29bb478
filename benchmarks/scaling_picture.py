"""The picture of docs/scaling.md: the roofs of each device, and what lies below them."""

from __future__ import annotations

from pathlib import Path

from chips import Figures, devices
from layers import flops
from roofline import total
from scaling_tables import NETWORK, WIDTH, roof, short


def draw(figures: Figures, path: Path) -> None:
    """One panel per device: the roofs, and where the groups of a train step lie below them."""
    import numpy as np
    from matplotlib.figure import Figure

    found = devices(figures)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    for axes, device in zip(figure.subplots(1, len(found)), found.values(), strict=True):
        for arithmetic, peak in device.peaks.items():
            colour = f"C{list(WIDTH).index(arithmetic)}"
            x = np.geomspace(1, 3000, 200)
            label = f"{arithmetic}: {peak / 1e12:.3g} TFLOP/s"
            axes.loglog(x, np.minimum(peak, x * device.bandwidth), colour, label=label)
            for name, part in roof(device, arithmetic, "train-step").items():
                if part.flops:
                    place = part.intensity, min(peak, part.intensity * device.bandwidth)
                    axes.plot(*place, "o", color=colour)
                    style = {"textcoords": "offset points", "fontsize": 7, "color": colour}
                    axes.annotate(name.removeprefix("stage"), place, (3, -11), **style)
            whole = total(roof(device, arithmetic, "train-step"))
            rate = whole.flops / whole.seconds
            axes.plot(whole.intensity, rate, "*", color=colour, markersize=13)
        if device.name == found["cpu"].name:
            seconds = figures["measured"]["steps"]["train-step"]
            batch = figures["measured"]["steps_batch"]
            intensity = total(roof(device, "float32", "train-step")).intensity
            rate = flops(NETWORK, "train-step", batch) / seconds
            axes.plot(intensity, rate, "xC0", label="float32, measured")
        title = f"{device.name}, {short(device.bandwidth / 1e9)} GB/s"
        axes.set(title=title, xlabel="FLOP per byte", ylabel="FLOP/s")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
