"""Where the time of a repetition goes: the kernels of a trace, added up by name."""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LISTED = 25

_GROUPS = (
    (
        "convolutions and products",
        r"conv(?!ert)|gemm|xmma|cutlass|cudnn|fprop|dgrad|wgrad|nvjet|sm\d\d_",
    ),
    ("reductions and norms", r"reduc|norm|welford|softmax"),
    ("copies and transposes", r"memcpy|memset|copy|transpose|nchw|nhwc"),
    ("pooling", r"pool|scatter"),
)


def group_of(kernel: str) -> str:
    """The kind of a kernel, by its name."""
    low = kernel.lower()
    return next((name for name, words in _GROUPS if re.search(words, low)), "elementwise")


def kernels_of_trace(folder: Path) -> list[dict[str, Any]]:
    """The kernels of a trace that ``jax.profiler`` wrote: name, where in the program they come
    from, seconds and number of each.

    On a GPU these are the events of its streams, on a CPU the operations of XLA's threads.
    """
    (file,) = folder.rglob("*.trace.json.gz")
    with gzip.open(file) as stream:
        events = json.load(stream)["traceEvents"]
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event["name"] == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        elif event.get("ph") == "M" and event["name"] == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    complete = [event for event in events if event.get("ph") == "X"]
    on_gpu = [
        event
        for event in complete
        if "GPU" in processes.get(event["pid"], "")
        and "Stream" in threads.get((event["pid"], event["tid"]), "")
    ]
    found = on_gpu or [event for event in complete if "hlo_op" in event.get("args", {})]
    sums: dict[str, list[Any]] = defaultdict(lambda: [0.0, 0, ""])
    for event in found:
        entry, more = sums[event["name"]], event.get("args", {})
        entry[0] += event["dur"] / 1e6
        entry[1] += 1
        entry[2] = str(more.get("tf_op") or more.get("name") or more.get("hlo_op") or "")[-120:]
    return [
        {"name": name, "scope": scope, "seconds": seconds, "count": count}
        for name, (seconds, count, scope) in sums.items()
    ]


def summary(kernels: Iterable[dict[str, Any]], repetitions: int, wall: float) -> dict[str, Any]:
    """What is worth keeping of a profile, in milliseconds of one repetition.

    Args:
      wall: Seconds that as many took without the profiler.
    """
    listed, groups = [], defaultdict(float)
    for kernel in sorted(kernels, key=lambda kernel: -kernel["seconds"]):
        milliseconds = 1e3 * kernel["seconds"] / repetitions
        groups[group_of(kernel["name"])] += milliseconds
        count = kernel["count"] / repetitions
        listed.append({**kernel, "milliseconds": milliseconds, "count": count})
        del listed[-1]["seconds"]
    return {
        "milliseconds": 1e3 * wall / repetitions,
        "busy": sum(groups.values()),
        "kernels_in_all": len(listed),
        "launches": sum(kernel["count"] for kernel in listed),
        "groups": dict(groups),
        "kernels": listed[:LISTED],
    }
