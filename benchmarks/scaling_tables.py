"""The tables and the picture of docs/scaling.md, from the figures that scaling.py has gathered."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from chips import CHIPS, NETWORKS, PER_HOST, V5E, Figures, devices
from layers import Layer, What, flops, layers
from roofline import (
    OPTIMIZER,
    Device,
    Fusion,
    Part,
    balanced_batch,
    efficiency,
    group_of,
    moved,
    roofline,
    total,
)

from flax_resblock.aot.outcome import MemoryUse
from flax_resblock.aot.sharding import expected
from flax_resblock.config import architecture

NAME, SIZE, PER_CHIP = "resnet50", 224, 128
NETWORK = layers(architecture(NAME), SIZE)
WHATS: tuple[What, ...] = ("forward", "train-step")
FUSIONS: tuple[Fusion, ...] = ("fused", "alone")
WIDTH = {"float32": 4, "TF32": 4, "bfloat16": 2}
BACKWARD = 2 / 3
"""Share of a train step during which there are gradients to send."""


def _cases(figures: Figures) -> list[tuple[str, Device, str]]:
    return [
        (key, device, arithmetic)
        for key, device in devices(figures).items()
        for arithmetic in WIDTH
        if arithmetic in device.peaks
    ]


def roof(device: Device, arithmetic: str, what: What, fusion: Fusion = "fused") -> dict[str, Part]:
    roofs = {"peak": device.peaks[arithmetic], "bandwidth": device.bandwidth}
    return roofline(NETWORK, what, PER_CHIP, width=WIDTH[arithmetic], fusion=fusion, **roofs)


def _compiled_seconds(
    figures: Figures, key: str, device: Device, arithmetic: str, what: What
) -> float | None:
    """The least time with the bytes of the compiled program: its products at the lower roof,
    everything else at that of memory."""
    program = figures["programs"].get(f"{key} {what} {arithmetic}")
    if program is None:
        return None
    computing = flops(NETWORK, what, PER_CHIP) / device.peaks[arithmetic]
    products = max(computing, program["traffic"]["products"] / device.bandwidth)
    return products + program["traffic"]["others"] / device.bandwidth


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    first, *rest = head
    lines = [[first, *rest], ["---", *["---:"] * len(rest)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def work(figures: Figures) -> str:
    """FLOPs, parameters and least traffic by group, for one image; the figures are not needed."""
    del figures
    columns: tuple[tuple[What, Fusion], ...] = (
        ("forward", "fused"),
        ("train-step", "fused"),
        ("train-step", "alone"),
    )

    def row(name: str, inside: list[Layer]) -> list[str]:
        counts = (flops(inside, what, 1) / 1e9 for what in WHATS)
        bytes_ = (
            sum(moved(layer, what, 1, WIDTH["float32"], fusion)[0] for layer in inside) / 1e6
            for what, fusion in columns
        )
        millions = sum(layer.parameters for layer in inside) / 1e6
        numbers = (f"{count:.2f}" for count in (millions, *counts))
        return [name, *numbers, *(f"{count:.1f}" for count in bytes_)]

    groups: dict[str, list[Layer]] = {name: [] for name in roof(V5E, "float32", "train-step")}
    for layer in NETWORK:
        groups[group_of(layer)].append(layer)
    rows = [row(name, inside) for name, inside in groups.items() if name != OPTIMIZER]
    head = ["per image, float32", "parameters, M", "GFLOP forward", "GFLOP train step"]
    head += ["MB forward", "MB train step", "MB train step, nothing fused"]
    return _table(head, [*rows, row("all", NETWORK)])


def check(figures: Figures) -> str:
    """The analytic figures beside what the compilers say, for every program of one device."""
    rows = []
    for key, device, arithmetic in _cases(figures):
        for what in WHATS:
            program = figures["programs"].get(f"{key} {what} {arithmetic}")
            if program is None:
                continue
            said, memory = program["compiled"], program["memory"]
            exact = flops(NETWORK, what, PER_CHIP, padding=False)
            counts = ["none", "none"]
            if said:
                ratio = said["flops"] / exact
                counts = [f"{said['flops'] / 1e12:.3f} ({ratio:.3f} x)", _giga(said["bytes"])]
            roofs = (roof(device, arithmetic, what, fusion) for fusion in FUSIONS)
            moving = sum(program["traffic"].values())
            row = [f"{device.name}, {what}, {arithmetic}", f"{exact / 1e12:.3f}", *counts]
            row += [*(_giga(total(roof).bytes) for roof in roofs), _giga(moving)]
            row += [f"{program['traffic']['others'] / moving:.0%}"]
            row += [str(round(program["cycles"] / 1e6) or "none"), _giga(MemoryUse(**memory).total)]
            rows.append(row)
    head = ["program", "TFLOP, analytic", "compiler's TFLOP", "compiler's GB", "GB fused"]
    head += ["GB nothing fused", "GB of its operations", "of it without a product"]
    return _table([*head, "compiler's Mcycles", "GB needed"], rows)


def _giga(number: float) -> str:
    return f"{number / 1e9:.1f}"


def roofs(figures: Figures) -> str:
    """The roofs of every device."""
    rows = []
    for _, device, arithmetic in _cases(figures):
        peak, bandwidth = device.peaks[arithmetic], device.bandwidth
        numbers = peak / 1e12, bandwidth / 1e9, peak / bandwidth, device.memory / 1e9
        rows.append([f"{device.name}, {arithmetic}", *map(short, numbers), device.source])
    return _table(
        ["device", "TFLOP/s", "GB/s", "FLOP per byte where they meet", "memory, GB", "source"], rows
    )


def bounds(figures: Figures) -> str:
    """The least time of each program, and what it waits for."""
    rows = []
    for key, device, arithmetic in _cases(figures):
        for what in WHATS:
            part = total(roof(device, arithmetic, what))
            alone = total(roof(device, arithmetic, what, "alone"))
            compiled = _compiled_seconds(figures, key, device, arithmetic, what)
            times = (
                "-" if one is None else f"{short(1e3 * one)} ms, {short(PER_CHIP / one)}/s"
                for one in (part.seconds, compiled, alone.seconds)
            )
            options: dict[str, Any] = {"width": WIDTH[arithmetic], "bandwidth": device.bandwidth}
            options["peak"] = device.peaks[arithmetic]
            batches = (balanced_batch(NETWORK, what, fusion=one, **options) for one in FUSIONS)
            share = part.waiting / part.seconds
            waiting = f"{'memory' if share > 1 / 2 else 'compute'}, {share:.0%}"
            from_ = " / ".join(str(batch or "never") for batch in batches)
            row = [f"{device.name}, {what}, {arithmetic}", f"{part.intensity:.0f}", waiting]
            rows.append([*row, *times, from_])
    head = ["program", "FLOP per byte", "bound by, time at memory's roof", "fused", "as compiled"]
    return _table([*head, "nothing fused", "compute bound from batch"], rows)


def groups(figures: Figures) -> str:
    """The least time of a train step by groups, each with the roof that it is under."""
    cases = _cases(figures)
    found = [roof(device, arithmetic, "train-step") for _, device, arithmetic in cases]
    rows = []
    for name in found[0]:
        cells = (
            f"{short(1e3 * parts[name].seconds)} "
            f"{'M' if parts[name].waiting > parts[name].seconds / 2 else 'C'}"
            for parts in found
        )
        rows.append([name, f"{found[0][name].intensity:.0f}", *cells])
    whole = (short(1e3 * total(parts).seconds) for parts in found)
    rows.append(["all", f"{total(found[0]).intensity:.0f}", *whole])
    names = (f"{device.name}, {arithmetic}" for _, device, arithmetic in cases)
    return _table(["ms, train step", "FLOP per byte, float32", *names], rows)


def scaling(figures: Figures) -> str:
    """All-reduce against the least time of a step, for growing numbers of devices with the same
    batch each."""
    config = architecture(NAME)
    replica, everything = expected(config, "replica"), expected(config, "global")
    reduces, gradients = everything.fewest - 1, 4 * replica.elements
    statistics = 4 * (everything.elements - replica.elements)
    rows = []
    for key, names, joined in NETWORKS:
        device = devices(figures)[key]
        for arithmetic in names:
            step = total(roof(device, arithmetic, "train-step")).seconds
            for chips in CHIPS:
                sent = joined.seconds(gradients, chips)
                waited = reduces * joined.seconds(statistics / reduces, chips)
                shares = [
                    efficiency(step, sent, 0, overlap=0),
                    efficiency(step, sent, 0, overlap=BACKWARD),
                    efficiency(step, sent, waited, overlap=BACKWARD),
                ]
                row = [f"{device.name}, {arithmetic}, {joined.name}", str(chips)]
                row += [short(1e3 * step), f"{1e3 * sent:.2f}", f"{1e3 * waited:.2f}"]
                rows.append([*row, *(f"{share:.1%}" for share in shares)])
    head = ["devices and network", "how many", "step, ms", "gradients, ms", "global statistics, ms"]
    return _table([*head, "replica, no overlap", "replica, overlap", "global, overlap"], rows)


def collectives(figures: Figures) -> str:
    """The all-reduces of the compiled programs beside those that the description of the network
    demands, with every value in float32."""
    rows = []
    for name, program in figures["programs"].items():
        if " x" in name:
            should, sizes = expected(architecture(NAME), name.split()[-1]), program["all_reduces"]
            found = f"{len(sizes)}, {sum(sizes) / 1e6:.2f} MB"
            wanted = f"{should.fewest}, {4 * should.elements / 1e6:.2f} MB"
            rows.append([name, found, wanted, ", ".join(program["others"]) or "none"])
    head = ["train step", "all-reduces compiled", "expected, all in float32", "other collectives"]
    return _table(head, rows)


def supply(figures: Figures) -> str:
    """What a host must deliver for its chips not to wait."""
    decode = figures["measured"]["decode"]
    rows = []
    for key, count in PER_HOST.items():
        device = devices(figures)[key]
        for arithmetic in device.peaks:
            images = count * PER_CHIP / total(roof(device, arithmetic, "train-step")).seconds
            row = [f"{count} x {device.name}, {arithmetic}", f"{images:,.0f}"]
            row += [_giga(images * 110e3), _giga(images * SIZE**2 * 3), f"{images / decode:,.0f}"]
            rows.append(row)
    head = ["host", "images/s", "GB/s of JPEG read", "GB/s of uint8 pixels to the devices"]
    return _table([*head, "cores that decode"], rows)


def machine(figures: Figures) -> str:
    """What was measured here, in a list."""
    here, measured, cpu = figures["machine"], figures["measured"], devices(figures)["cpu"]
    size, picture = measured["size"], f"a JPEG of {measured['jpeg'] / 1e3:.0f} kB, 500 x 375 pixels"
    lines = [
        f"- {here['name']}, {here['cores']} cores, {here['memory'] / 2**30:.0f} GiB; "
        f"{here['versions']}."
    ]
    for name in sorted(measured["by"], key=list(WIDTH).index):
        lines.append(
            f"- Product of two {size} x {size} matrices, {name}: "
            f"{measured['products'][name] / 1e9:.0f} GFLOP/s, by {measured['by'][name]}."
        )
    lines.append(f"- Copy, read and write counted: {measured['copy'] / 1e9:.1f} GB/s.")
    lines.append(
        f"- Decoding {picture}, and scaling it to {SIZE} x {SIZE}: {measured['decode']:.0f} "
        f"images/s on one thread."
    )
    for what in WHATS:
        seconds, batch = measured["steps"][what], measured["steps_batch"]
        peaks = {"peak": cpu.peaks["float32"], "bandwidth": cpu.bandwidth}
        least = total(roofline(NETWORK, what, batch, width=4, fusion="fused", **peaks)).seconds
        rate = f"{seconds:.2f} s, {flops(NETWORK, what, batch) / seconds / 1e9:.0f} GFLOP/s"
        lines.append(
            f"- {NAME}, {what}, float32, batch {batch}, XLA's own convolutions: {rate}. The "
            f"roofs allow {least:.2f} s: {least / seconds:.0%} of the roof."
        )
    return "\n".join(lines)


TABLES: Mapping[str, Callable[[Figures], str]] = {
    table.__name__: table
    for table in (machine, work, check, roofs, bounds, groups, collectives, scaling, supply)
}
"""By the name that the document has them under."""


def fill(text: str, figures: Figures) -> str:
    """The document with every table between ``<!-- table NAME -->`` and ``<!-- end -->`` written
    anew.

    Raises:
      KeyError: A name that there is no table for.
    """
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}\n{TABLES[found[2]](figures)}\n\n{found[3]}",
        text,
        flags=re.DOTALL,
    )
