"""The page of the device check, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

VERDICTS = {True: "passed", False: "**failed**", None: ""}


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def _table(heads: list[str], rows: list[list[object]]) -> list[str]:
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines] + [""]


def page(content: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    """The results as a page: the verdict on every part, then the rows of each.

    Args:
      content: What the JSON file holds.
      parts: Every part that there is, by name.
    """
    found, identity = content["parts"], content["identity"]
    failed = [
        name for name, part in found.items() if any(r["passed"] is False for r in part["rows"])
    ]
    open_parts = [
        name
        for name in parts
        if name not in found or found[name]["status"] not in ("passed", "failed")
    ]
    lines = [f"# Device check: {identity['device']}", ""]
    if identity["fault"]:
        lines += [f"A fault was put into the Flax side on purpose: {identity['fault']}.", ""]
    lines += [f"Failed: {', '.join(failed) or 'nothing'}."]
    lines += [f"Not finished or not run: {', '.join(open_parts) or 'nothing'}.", ""]
    rows = [
        [name, parts[name].what, found[name]["status"], found[name]["seconds"]]
        for name in parts
        if name in found
    ]
    lines += _table(["part", "what it shows", "outcome", "seconds"], rows)
    lines += [
        "Errors are relative L2 errors of a whole tensor against PyTorch's float64 on the CPU."
    ]
    lines += ["PyTorch's own error is that in the same precision on the same device.", ""]
    for name in found:
        part = found[name]
        lines += [f"## {name}: {parts[name].what}", ""]
        rows = [
            [r["subject"], r["check"], r["figure"], VERDICTS[r["passed"]]] for r in part["rows"]
        ]
        lines += _table(["subject", "check", "figure", "verdict"], rows) if rows else []
        wrong = {(r["subject"], r["check"]) for r in part["rows"] if r["passed"] is False}
        rows = [
            [label, r["subject"], r["check"], r["figure"], VERDICTS[r["passed"]]]
            for label, again in part.get("again", {}).items()
            for r in again["rows"]
            if (r["subject"], r["check"]) in wrong
        ]
        if rows:
            lines += ["What failed, repeated with other options of XLA:", ""]
            lines += _table(["options", "subject", "check", "figure", "verdict"], rows)
        if part.get("error"):
            tail = part["error"].strip().splitlines()[-40:]
            lines += [f"{part['status']}. The end of its output:", "", "```", *tail, "```", ""]
    return "\n".join(lines)
