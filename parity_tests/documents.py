"""Reads the documentation: its pages, links, command lines and programs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from flax_resblock.cli import COMMANDS
from parity_tests.support import REPOSITORY, python

DOCS = REPOSITORY / "docs"
PAGES = sorted(
    page
    for folder in (REPOSITORY, DOCS, REPOSITORY / "train", REPOSITORY / "torch_ref")
    for page in (folder.rglob("*.md") if folder == DOCS else folder.glob("*.md"))
    if not {"_build", "commands"} & set(page.parts)
)
"""Every page but those that a build of the documentation writes."""


def name_of(page: Path) -> str:
    """Of a page, for the name of a test."""
    return page.relative_to(REPOSITORY).as_posix()


def links(text: str) -> Iterator[str]:
    """The targets of links and pictures that lead nowhere outside, without those in code."""
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    prose = re.sub(r"^ {4}.*$", "", prose, flags=re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not re.match(r"\w+:", target):
            yield target


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub and MyST make them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere."""
    found = []
    for link in links(text):
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        inside = file.is_relative_to(REPOSITORY) and file.exists()
        if inside and anchor:
            inside = file.suffix == ".md" and anchor in anchors(file.read_text(encoding="utf-8"))
        if not inside and "reference/commands/" not in target:
            found.append(link)
    return found


def command_lines(text: str) -> list[str]:
    """The lines of code blocks that start a command of this library, without what explains them."""
    found = []
    for line in text.splitlines():
        line = line.removeprefix("    ").removeprefix("$ ").removeprefix("!")
        line = re.split(r" {2,}| && | > | \| ", line)[0]
        if re.match(rf"flax-resblock ({'|'.join(COMMANDS)})\b(?! `)", line) and "`" not in line:
            found.append(line)
    return found


def spans(text: str) -> list[str]:
    """The command lines within sentences and tables."""
    return re.findall(rf"`(flax-resblock (?:{'|'.join(COMMANDS)})\b[^`]*)`", text)


def programs(text: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"```(?:python|\{code-cell\} ipython3)\n(.*?)```", text, flags=re.DOTALL)


RUN = """
import contextlib, io, json, sys, traceback
printed = []
for blocks in json.load(sys.stdin):
    names, page = {"__name__": "__main__"}, []
    for block in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                exec(compile(block, "<page>", "exec"), names)
            except Exception:
                print(traceback.format_exc())
        page.append(output.getvalue())
    printed.append(page)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_enable_x64", False)
print(json.dumps(printed))
"""


def printed(pages: list[list[str]], folder: Path) -> list[list[str]]:
    """What the blocks of pages print, run one after the other in a process of their own. An
    exception is printed too.
    """
    done = python(
        "-W", "ignore", "-c", RUN, cwd=folder, input=json.dumps(pages), env=_environment()
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    flags = "--xla_backend_optimization_level=2"  # one device, and the level of the other tests
    own = {"PYTHONPATH": path, "PATH": programs, "MPLBACKEND": "Agg", "XLA_FLAGS": flags}
    return {**os.environ, **own}


def stated(block: str) -> list[str]:
    """What a block says that it prints, in comments behind ``print`` and ``show``."""
    return re.findall(r"^ *(?:print|show)\(.*\)  # (.*)$", block, flags=re.MULTILINE)


def agrees(said: str, found: str) -> bool:
    """Whether a line that was printed is the one that was stated.

    Numbers with an exponent were measured: from 1e-6 on they have to agree to a tenth, or to the
    last digit that is shown; those below, which are rounding, to a factor of ten above it.
    """
    if said == found:
        return True
    ours, theirs = said.split(", "), found.split(", ")
    try:
        pairs = [(float(one), float(other)) for one, other in zip(ours, theirs, strict=True)]
    except ValueError:
        return False
    return all(
        abs(one - other) <= 0.11 * abs(one) if one >= 1e-6 else abs(other) <= max(10 * one, 1e-15)
        for one, other in pairs
    )
