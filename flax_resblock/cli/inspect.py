"""``flax-resblock inspect``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from flax_resblock.cli import common
from flax_resblock.cli.wording import in_flags
from flax_resblock.config import SlotKind, name_of, to_json, walk
from flax_resblock.convert.naming_file import to_toml
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.errors import CheckpointError, MissingDependencyError
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS
from flax_resblock.runs.run_file import run_of
from flax_resblock.runs.scheduler_state import describe_schedule

_NEAR_EPS = 10
"""A running variance below this many eps makes the result depend on eps itself."""


def norm_health(source: OpenedCheckpoint) -> Iterator[dict[str, Any]]:
    """The ranges of scale, mean and variance, and the counter, of every batch norm."""
    keys = {entry.flax_path: entry.torch_key for entry in source.state_map.entries}
    eps = source.norm_options.get("eps") or 1e-5
    for slot in walk(source.config):
        if slot.kind is not SlotKind.NORM:
            continue
        values = {
            name: np.asarray(source.tensors[keys[(*slot.path, name)]], np.float64)
            for name in ("scale", "mean", "var")
        }
        scale, mean, var = values.values()
        found = {"variance near eps": var < _NEAR_EPS * eps, "scale of 0": scale == 0}
        remarks = [
            f"{what} in {np.sum(channels)} of {len(var)} channels"
            for what, channels in found.items()
            if channels.any()
        ]
        if np.all(var == 1) and np.all(mean == 0):
            remarks.append("never trained")
        yield {
            "slot": slot.name,
            "channels": slot.shape[0],
            **{name: (float(one.min()), float(one.max())) for name, one in values.items()},
            "batches": int(source.tensors[keys[(*slot.path, "num_batches_tracked")]]),
            "remark": ", ".join(remarks),
        }


def report(source: OpenedCheckpoint) -> dict[str, Any]:
    """Everything that ``inspect`` finds, for JSON."""
    tensors = source.tensors
    return {
        "source": source.record.source,
        "format": source.record.format,
        "architecture": name_of(source.config),
        "config": json.loads(to_json(source.config)),
        "naming": source.state_map.naming.name,
        "tensors": len(tensors),
        "parameters": source.parameter_count,
        "bytes": sum(value.nbytes for value in tensors.values()),
        "dtypes": dict(Counter(value.dtype.name for value in tensors.values())),
        "notes": list(map(in_flags, source.all_notes)),
        "unhealthy": source.unhealthy,
        "other_entries": {key: _brief(value) for key, value in source.record.extras.items()},
        "run": _run(source),
        "norms": list(norm_health(source)),
    }


def _run(source: OpenedCheckpoint) -> dict[str, str]:
    """Describes the training run in the checkpoint, and whether it can continue; may be empty."""
    if common.optimizer_left_out(source) is None:
        return {}
    try:
        run = run_of(source)
    except CheckpointError as error:
        return {"problem": in_flags(f"its training run cannot go on in JAX: {error}")}
    known, options = OPTIMIZERS[run.optimizer.kind].options, run.optimizer.groups[0].options
    first = ", ".join(f"{name} {value}" for name, value in options.items() if name in known)
    counters = {"step": run.steps, "epoch": run.epochs}
    at = [f"{name} {count}" for name, count in counters.items() if count is not None]
    if run.schedule is not None:
        at.append(describe_schedule(run.schedule))
    facts = {"run": f"{run.optimizer.notes[0]}; of the first: {first}"}
    facts["at"] = ", ".join(at) or "an unknown step"
    facts |= {"assumed": in_flags("; ".join(run.assumed))} if run.assumed else {}
    problem = in_flags(f"no schedule: {run.problem}")
    return facts | ({"problem": problem} if run.problem else {})


def _brief(value: Any) -> str:
    if isinstance(value, bool | int | float | str | None):
        return repr(value)[:80]
    if (
        isinstance(value, Mapping)
        and isinstance(groups := value.get("param_groups"), list)
        and isinstance(state := value.get("state", {}), Mapping)
    ):
        return (
            f"optimizer state, {len(groups)} param group{'s' if len(groups) != 1 else ''}, buffers "
            f"of {len(state)} tensors"
        )
    if isinstance(value, Mapping | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


def inspect(
    checkpoint: common.Checkpoint,
    reading: common.ReadingFlags,
    json_file: Path | None = None,
    force: common.Force = False,
    norms: bool = False,
    show_naming: bool = False,
) -> int:
    """Shows what a checkpoint is: architecture, naming scheme, tensors, the health of its batch
    norms, and anything unusual. Nothing in it is executed.

    For example:

      flax-resblock inspect resnet50.pth

    Args:
      json_file: Also write everything to this file.
      norms: List every batch norm, not only unusual ones.
      show_naming: Print the naming scheme alone, as TOML that --naming FILE.toml takes.
    """
    with common.status.status(f"reading {checkpoint}"):
        try:
            source = reading.open(checkpoint, run=True)
        except MissingDependencyError:
            # the weights can be read without torch, but not the run beside them
            source = reading.open(checkpoint)
        facts = report(source)
    if show_naming:
        print(to_toml(source.state_map.naming), end="")
        return 0
    config, tensors = facts["config"], facts["tensors"]
    common.print_title(facts["architecture"], str(checkpoint))
    rows = {
        "format": facts["format"],
        "naming": f"{facts['naming']} ({source.state_map.naming.origin})",
        "tensors": (
            f"{tensors}, {facts['parameters']:,} parameters, {common.megabytes(facts['bytes'])}, "
            f"{', '.join(f'{n} {d}' for d, n in facts['dtypes'].items())}"
        ),
        "shape": ", ".join(f"{key} {value}" for key, value in config.items() if key != "type"),
    }
    for name, text in rows.items():
        common.say(f"  {name:<9}{text}")
    for name, text in facts["other_entries"].items():
        common.say(f"  also has {name}: {text}")
    common.print_notes(source.all_notes)
    for what, text in facts["run"].items():
        common.say(f"  {what:<9}{text}", "yellow" if what == "problem" else "")
    for problem in source.unhealthy:
        common.say(f"  problem {problem}", "bold red")
    _print_norms([norm for norm in facts["norms"] if norms or norm["remark"]], len(facts["norms"]))
    if json_file is not None:
        common.write_json(json_file, facts, force)
    return 0


def _print_norms(shown: list[dict[str, Any]], total: int) -> None:
    if not shown:
        common.output.print(f"  norms    {total} batch norms, nothing odd (--norms lists them)")
        return
    ranges = ("scale", "running mean", "running variance")
    columns = ("batch norm", "channels", *ranges, "batches", "remark")
    table = Table(*columns, title=f"{len(shown)} of {total} batch norms")
    for norm in shown:
        spans = [norm[name] for name in ("scale", "mean", "var")]
        spans = [f"{low:.3g} .. {high:.3g}" for low, high in spans]
        slot, channels, batches = escape(norm["slot"]), str(norm["channels"]), str(norm["batches"])
        table.add_row(slot, channels, *spans, batches, norm["remark"])
    common.print_table(table)
