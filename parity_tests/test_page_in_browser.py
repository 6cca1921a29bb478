"""The HTML report in a browser: no request, sorting and filtering, phones, dark mode."""

from __future__ import annotations

import pytest

from parity_tests.browser import BINARY, browser
from parity_tests.test_page import DEPTH, EPSILON, HOSTILE, SLOTS, report

pytest.importorskip("jinja2", reason="needs the extra 'report'")
pytest.importorskip("matplotlib", reason="needs the extra 'report'")

from flax_resblock.parity.page import render_page

pytestmark = pytest.mark.skipif(
    BINARY is None,
    reason=(
        "needs Chromium: apt-get install chromium, or its path in the environment variable CHROMIUM"
    ),
)

COLUMN = (
    "[...document.querySelectorAll('#measurements tbody tr')].filter((row) => "
    "!row.hidden).map((row) => row.cells[{}].textContent)"
)
HEADER = "document.querySelector('#measurements [data-column={}]')"
SMALLEST = """Math.min(...[...document.querySelectorAll('.plot text')]
    .filter((text) => text.checkVisibility({contentVisibilityAuto: true}))
    .map((text) => parseFloat(getComputedStyle(text).fontSize)
        * Math.hypot(text.getScreenCTM().a, text.getScreenCTM().b)))"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    facts = {
        "passing": report(SLOTS, steps=3),
        "failing": report(SLOTS, worst=50.0),
        "hostile": report([*HOSTILE, "long" * 80], worst=2.0, steps=2),
    }
    facts["hostile"]["criterion"] = facts["hostile"]["provenance"]["subject"] = facts["hostile"][
        "provenance"
    ]["command"] = "long" * 80
    for name, content in facts.items():
        (folder / f"{name}.html").write_text(render_page(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", ["passing", "failing", "hostile"])
def test_page_loads_without_complaint_or_request(name, tab, pages):
    tab.open(pages / f"{name}.html")
    assert tab.complaints() == []
    assert tab.requests() == [(pages / f"{name}.html").as_uri()]
    assert tab.run("document.querySelectorAll('th button').length") >= 10


@pytest.mark.parametrize(
    "injected",
    [
        "<script>document.title = 'taken over'</script>",
        "<img src=x onerror=\"document.title = 'taken over'\">",
    ],
)
def test_code_that_got_in_would_not_run_and_would_be_seen(injected, tab, pages):
    page = (pages / "passing.html").read_text(encoding="utf-8")
    (pages / "injected.html").write_text(
        page.replace("</main>", f"{injected}</main>"), encoding="utf-8"
    )
    tab.open(pages / "injected.html")
    assert any("Content Security Policy" in complaint for complaint in tab.complaints())
    assert tab.run("document.title") == "Equal: resnet20 in Flax and PyTorch"


def test_the_browser_reports_errors_and_requests(tab, tmp_path):
    page = tmp_path / "noisy.html"
    page.write_text(
        "<!doctype html><link rel=icon href=data:,><img "
        "src=missing.png><script>console.error('heard'); throw new Error('thrown')</script>"
    )
    tab.open(page)
    complaints = "".join(tab.complaints())
    assert "heard" in complaints
    assert "thrown" in complaints
    assert len(tab.requests()) == 2


def test_headings_sort_by_click_and_by_keyboard(tab, pages):
    tab.open(pages / "failing.html")
    before = [float(text) for text in tab.run(COLUMN.format(8))]
    tab.run(f"{HEADER.format('excess')}.querySelector('button').click()")
    assert tab.run(f"{HEADER.format('excess')}.ariaSort") == "descending"
    assert (
        [float(text) for text in tab.run(COLUMN.format(8))]
        == sorted(before, reverse=True)
        != before
    )
    tab.run(f"{HEADER.format('excess')}.querySelector('button').focus()")
    tab.press("Enter", 13)
    assert tab.run(f"{HEADER.format('excess')}.ariaSort") == "ascending"
    assert [float(text) for text in tab.run(COLUMN.format(8))] == sorted(before)
    tab.press("Tab", 9)  # on to the next heading
    tab.press("Enter", 13)
    assert tab.run(
        "[...document.querySelectorAll('[aria-sort]')].map((header) => header.dataset.column + "
        "' ' + header.ariaSort)"
    ) == ["ulp descending"]
    tab.run(f"{HEADER.format('number')}.querySelector('button').click()")
    assert [float(text) for text in tab.run(COLUMN.format(8))] == before


def test_infinity_and_nan_sort_above_every_number(tab, tmp_path):
    facts = report(SLOTS, quantities=("eval forward",))
    for row, value in zip(facts["measurements"], ("nan", "3", "inf"), strict=False):
        row["excess"] = value
    (tmp_path / "page.html").write_text(render_page(facts), encoding="utf-8")
    tab.open(tmp_path / "page.html")
    tab.run(f"{HEADER.format('excess')}.querySelector('button').click()")
    assert tab.run(COLUMN.format(8))[:3] == ["nan", "inf", "3.0"]


def test_filters_combine(tab, pages):
    tab.open(pages / "failing.html")
    choose = (
        "(() => {{ const it = document.getElementById('filter-{}'); it.{} = {}; "
        "it.dispatchEvent(new Event('input')); }})()"
    )
    assert len(tab.run(COLUMN.format(0))) == len(DEPTH) * len(EPSILON) * len(SLOTS)
    tab.run(choose.format("text", "value", "'STAGE2 conv'"))
    tab.run(choose.format("precision", "value", "'float32'"))
    tab.run(choose.format("quantity", "value", "'train forward'"))
    assert tab.run(COLUMN.format(2)) == [
        slot for slot in SLOTS if "stage2" in slot and "conv" in slot
    ]
    tab.run(choose.format("failed", "checked", "true"))
    assert set(tab.run(COLUMN.format(1))) <= {"✕ differs"}
    found = tab.run("document.getElementById('shown').textContent")
    assert found == f"{len(tab.run(COLUMN.format(0)))} of 324 rows"


@pytest.mark.parametrize(
    ("name", "width"), [("failing", 320), ("passing", 390), ("hostile", 320), ("hostile", 1280)]
)
def test_nothing_is_wider_than_the_window(name, width, tab, pages):
    tab.open(pages / f"{name}.html", width=width)
    tab.run("document.querySelectorAll('details').forEach((it) => { it.open = true; })")
    assert tab.run("document.documentElement.scrollWidth") <= width == tab.run("innerWidth")
    if width >= 390:
        assert tab.run(SMALLEST) >= 9
    tab.run(
        "document.querySelector('main').append(Object.assign(document.createElement('pre'), { "
        "textContent: 'wide '.repeat(400) }))"
    )
    assert tab.run("document.documentElement.scrollWidth") > width  # which the check sees


def test_plots_follow_dark_mode(tab, pages):
    colours = """['body', '.plot text', '.plot use']
                 .map((it) => getComputedStyle(document.querySelector(it)))
                 .map((style) => style.backgroundColor + style.fill + style.stroke)"""
    tab.open(pages / "passing.html")
    light = tab.run(colours)
    tab.open(pages / "passing.html", dark=True)
    assert not set(light) & set(tab.run(colours))
    fixed = (
        "[...document.querySelectorAll('.plot *')].filter((it) => "
        "/#[0-9a-f]{6}/.test(it.getAttribute('style') ?? '')).length"
    )
    assert tab.run(fixed) == 0


def test_page_is_complete_without_javascript(tab, pages):
    tab.open(pages / "failing.html", script=False)
    assert tab.run("document.querySelectorAll('th button').length") == 0
    assert len(tab.run(COLUMN.format(0))) == 324
    assert (
        tab.run(
            "[...document.querySelectorAll('[data-script]')].some((it) => it.checkVisibility())"
        )
        is False
    )
    assert tab.run("document.querySelectorAll('svg.plot').length") == len(DEPTH) * len(EPSILON) + 1
