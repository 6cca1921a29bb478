"""Writes each notebook of docs/notebooks/, which is Markdown, as an .ipynb beside it, for Colab:
``python -m docs.notebook_files``."""

from __future__ import annotations

import json
import re
from pathlib import Path

FOLDER = Path(__file__).parent / "notebooks"
INSTALL = "%pip install -q 'flax-resblock[torch,train]'"


def cells(text: str) -> list[tuple[str, str]]:
    """The cells of a notebook in Markdown, as (kind, text)."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    found = []
    for prose, code in re.findall(
        r"(.*?)(?:```\{code-cell\} ipython3\n(.*?)```|\Z)", body, re.DOTALL
    ):
        found += [("markdown", prose.strip())] if prose.strip() else []
        found += [("code", code.rstrip("\n"))] if code else []
    return found


def notebook(text: str) -> str:
    """The .ipynb, without outputs."""
    made = [_cell("code", INSTALL, 0)]
    made += [_cell(kind, content, number) for number, (kind, content) in enumerate(cells(text), 1)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1) + "\n"


def _cell(kind: str, text: str, number: int) -> dict[str, object]:
    lines = text.splitlines(keepends=True)
    cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": lines}
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


if __name__ == "__main__":
    for page in FOLDER.glob("*.md"):
        page.with_suffix(".ipynb").write_text(notebook(page.read_text(encoding="utf-8")))
