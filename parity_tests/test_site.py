"""The site as Sphinx builds it, and the newcomers who copy from it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import pytest

from parity_tests.newcomers import NEWCOMERS, copied, walk
from parity_tests.support import REPOSITORY, python

NO_TORCH = """
import sys


class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        return None if name == "torch" else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)
"""
"""A process in which PyTorch is not installed."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site():
    """The built site. `make docs` builds it in the same place, so that little is left to do."""
    built = REPOSITORY / "docs" / "_build" / "html"
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "docs", str(built)]
    environment = {**os.environ, "PATH": programs}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


class _Links(HTMLParser):
    """The targets of the links of a page's own text, without those of its sidebars."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside |= tag == "article"
        if self._inside and tag == "a":
            self.found.append(dict(attrs).get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "article"


def links(site: Path, page: str) -> set[str]:
    """The pages of the site that the text of a page links to."""
    reader = _Links()
    reader.feed((site / page).read_text(encoding="utf-8"))
    return {urljoin(page, link.partition("#")[0]) for link in reader.found if "://" not in link}


def test_every_newcomer_reaches_their_page_from_the_start_page_in_two_clicks(site):
    once = links(site, "index.html")
    twice = once | {two for one in once if (site / one).is_file() for two in links(site, one)}
    for name, newcomer in NEWCOMERS.items():
        assert f"{newcomer.page}.html" in twice, name
        assert copied(newcomer), name
    assert "explanations/traps.html" in twice
    assert "measured/h200.html" not in once  # the control: what is no link is not found


def test_the_notebooks_show_what_they_computed(site):
    """Their cells were executed, with plots, and what they are sure of came out true."""
    pages = {page.stem: page.read_text(encoding="utf-8") for page in site.glob("notebooks/*.html")}
    assert len(pages) == 4
    for name, text in pages.items():
        outputs = re.findall(r'cell_output docutils container">(.*?)</div>', text, re.DOTALL)
        shown = " ".join(re.sub(r"<[^>]+>", "", one) for one in outputs)
        assert "<img" in text, name
        assert "Traceback" not in shown, name
        assert "True" in shown, name
        assert not re.search(r"^False$", shown, re.MULTILINE), name
    bug = " ".join(re.sub(r"<[^>]+>", "", pages["find-the-bug"]).split())
    for fault in (
        "overwrites the main path",
        "takes in_channels",
        "first convolution ignores stride",
    ):
        assert fault in bug
    assert bug.count("equals its Flax network") == 3


@pytest.mark.parametrize("name", [name for name, one in NEWCOMERS.items() if one.has_torch])
def test_a_newcomer_reaches_the_end_by_copying(name, folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    NEWCOMERS[name].has(folder)
    modules = set(sys.modules)
    try:
        assert walk(name) >= 1
    finally:
        for module in {"net", "out", "out.net"} - modules:
            sys.modules.pop(module, None)


def test_a_newcomer_without_pytorch_reaches_the_end_by_copying(folder):
    (name,) = (name for name, one in NEWCOMERS.items() if not one.has_torch)
    NEWCOMERS[name].has(folder)
    lines = [line.split()[1:] for _, line in copied(NEWCOMERS[name])]
    code = "from flax_resblock.cli import run\n"
    code += f"for line in {lines}:\n    assert run(line) == 0, line"
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    done = python("-c", NO_TORCH + code, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "PyTorch" in done.stdout  # that it was not compared is said
    assert Path("tuned.safetensors").is_file()
