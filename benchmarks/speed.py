"""Writes the table of a benchmark into docs/performance.md, between the marks there, and draws its
picture beside the file.

flax-resblock bench --what full --json-file docs/bench.json --png docs/bench.png --force
python benchmarks/speed.py docs/bench.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from flax_resblock.bench.cases import BenchCase
from flax_resblock.bench.report import machine_line, markdown_table, picture
from flax_resblock.bench.run import Result

BEGIN, END = "<!-- table bench -->", "<!-- end bench -->"
DOCUMENT = Path("docs/performance.md")


def filled(document: str, found: dict) -> str:
    """The document with the table of these figures."""
    before, rest = document.split(BEGIN)
    _, after = rest.split(END)
    settings = found["settings"]
    machine = (
        f"{machine_line(found['machine'])}; {settings['threads']} threads, {settings['rounds']} "
        f"rounds, malloc: {settings['malloc']}."
    )
    return f"{before}{BEGIN}\n\n{markdown_table(found)}\n\n{machine}\n\n{END}{after}"


def main() -> None:
    """Rewrites the document and the picture."""
    figures = Path(sys.argv[1])
    found = json.loads(figures.read_text(encoding="utf-8"))
    fields = Result.__dataclass_fields__
    cases = []
    for case in found["cases"]:
        rows = [{k: value for k, value in row.items() if k in fields} for row in case["results"]]
        cases.append((BenchCase(**case["case"]), [Result(**row) for row in rows]))
    picture(cases, figures.with_suffix(".png"))
    DOCUMENT.write_text(filled(DOCUMENT.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
