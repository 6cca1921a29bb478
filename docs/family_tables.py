"""Fills the tables of docs/families.md that the converter's own rows say: ``python -m
docs.family_tables``. The rest of the page is written by hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flax_resblock.config import ARCHITECTURES
from flax_resblock.convert.detection.assumption_rules import ASSUMPTION_RULES
from flax_resblock.convert.detection.backbones import BACKBONES
from flax_resblock.convert.namings import NAMINGS

PAGE = Path(__file__).parent / "families.md"


def tables() -> dict[str, Iterable[Iterable[str]]]:
    """The rows of each table, by its head."""
    options = ((rule, *choice) for rule in ASSUMPTION_RULES for choice in rule.choices.items())
    prefixes = {row.name: f"`{row.prefix}*`" if row.prefix else "no prefix" for row in BACKBONES}
    return {
        "| naming scheme | written by | writes a folder for |": (
            (f"`{row.name}`", row.origin, row.hub) for row in NAMINGS.values()
        ),
        "| project | the network | left out |": (
            (row.name, prefixes[row.name], ", ".join(f"`{key}`" for key in row.beside))
            for row in BACKBONES
        ),
        "| flag | value | meaning |": (
            (f"`{rule.flag}`", f"`{value}`", words) for rule, value, words in options
        ),
    }


def filled(page: str) -> str:
    """The page with these tables, and the names of the architectures."""
    for head, rows in tables().items():
        lines = [head, f"|{'---|' * (head.count('|') - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        before, after = page.split(f"{head}\n")
        page = "\n".join([before + lines[0], *lines[1:], "", after.partition("\n\n")[2]])
    names = ", ".join(f"`{name}`" for name in ARCHITECTURES)
    words = f"There are {len(ARCHITECTURES)} named architectures: {names}."
    return re.sub(r"There are \d+ named architectures: [^.]*\.", lambda _: words, page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
