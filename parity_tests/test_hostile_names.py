"""Names with control characters or markup are shown escaped; nothing in them runs."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flax_resblock.checkpoint.torch_file import with_tensors
from flax_resblock.cli import run
from flax_resblock.errors import some, visible
from parity_tests.browser import BINARY, browser
from parity_tests.support import healthy

ACTS = re.compile(
    r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What acts on a terminal or reorders text; a line break is looked for apart."""

HOSTILE = {
    "colour": "evil\x1b[31mred",
    "title": "evil\x1b]0;taken over\x07",
    "clears": "evil\x1b[2J\x1b[H",
    "link": "evil\x1b]8;;https://example.org\x1b\\here",
    "c1": "evil\x9b31m",
    "bidi": "evil\u202egpj.exe",
    "line": "evil\nflax-resblock: everything is fine",
    "return": "evil\rgood",
    "surrogate": "evil\udc80",
    "rich markup": "evil[bold red]x[/] [/nothing] [link=https://example.org]y",
    "html": (
        "evil<script>document.title='taken over'</script><img src=x "
        "onerror=\"document.title='taken over'\">"
    ),
}


@given(st.text(st.characters(codec=None)))
def test_visible_text_has_nothing_that_acts_and_loses_nothing(text):
    shown = visible(text)
    assert not ACTS.search(shown)
    assert "\n" not in shown
    assert visible(shown) == shown
    if text.isascii() and text.isprintable():
        assert shown == text
    assert "\n" not in some([text])


@pytest.mark.parametrize("name", ["line", "surrogate", "rich markup"])
def test_a_tensor_with_such_a_name_is_shown_escaped(name, tmp_path, monkeypatch, capsys):
    """In the weights, where it does not fit; in the sight of all commands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    state = with_tensors(healthy())
    torch.save({**state, HOSTILE[name]: torch.rand(3)}, "net.pth")
    for command in (
        ["inspect", "net.pth"],
        ["convert", "net.pth", "out.safetensors"],
        ["inspect", "net.pth", "--ignore", "evil*"],
    ):
        code = run(command)
        output = "".join(capsys.readouterr())
        assert "evil" in output
        assert not ACTS.search(output), ascii(output)
        assert "flax-resblock: everything" not in output.replace("\\nflax-resblock: everything", "")
        assert code == (0 if command[-1] == "evil*" and name == "rich markup" else 2)
        assert "Traceback" not in output


@pytest.mark.parametrize("name", ["title", "rich markup"])
def test_other_entries_of_a_checkpoint_are_shown_escaped(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    state = with_tensors(healthy())
    torch.save({"model": state, HOSTILE[name]: HOSTILE[name], "epoch": 3}, "net.pth")
    assert run(["inspect", "net.pth"]) == 0
    output = "".join(capsys.readouterr())
    assert "evil" in output
    assert not ACTS.search(output), ascii(output)
    assert "\nflax-resblock: everything" not in output


def test_a_file_called_like_markup_or_an_escape_is_shown_as_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    for name in ("net[red].pth", "net\x1b[31m.pth", "[nothing", "сеть ё.v2.pth"):
        torch.save(with_tensors(healthy()), name)
        assert run(["inspect", name]) == 0
        assert visible(name) in capsys.readouterr().out
        assert run(["inspect", name + ".absent"]) == 2
        assert visible(name) in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(
    BINARY is None,
    reason=(
        "needs Chromium: apt-get install chromium, or its path in the environment variable CHROMIUM"
    ),
)
def test_no_script_in_a_name_runs_in_the_report(tmp_path, monkeypatch, capsys):
    """The report of a verification with hostile names of file, ignored tensors and entries."""
    pytest.importorskip("jinja2", reason="needs the extra 'report'")
    monkeypatch.chdir(tmp_path)
    state = with_tensors(healthy())
    file = "net<img src=x onerror=document.title='taken-over'>.pth"
    torch.save({"model": {**state, HOSTILE["html"]: torch.rand(3)}, HOSTILE["html"]: 1}, file)
    assert run(["verify", file, "--eval-only", "--ignore", "evil*", "--html", "report.html"]) == 0
    page = Path("report.html").read_text(encoding="utf-8")
    assert "net&lt;img src=x onerror=" in page
    assert "net<img" not in page
    with browser(tmp_path / "profile") as tab:
        tab.open(tmp_path / "report.html")
        assert tab.complaints() == []
        assert "taken" not in tab.run("document.title").replace(
            "onerror=document.title='taken-over'", ""
        )
        assert tab.run("document.querySelectorAll('img').length") == 0
        assert "onerror" in tab.run("document.body.textContent")
        assert tab.requests() == [(tmp_path / "report.html").as_uri()]
