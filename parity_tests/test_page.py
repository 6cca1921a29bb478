"""The HTML report says what the JSON says, runs nothing, needs nothing else, and can be used."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import math
import random
import re
import sys
from html.parser import HTMLParser

import pytest

from flax_resblock.errors import MissingDependencyError

pytest.importorskip("jinja2", reason="needs the extra 'report'")
pytest.importorskip("matplotlib", reason="needs the extra 'report'")

from flax_resblock.parity.page import render_page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"onmouseover='alert(1)'",
    "</title></text></svg><script>alert(2)</script>",
    "]]><!--",
    "{{ 7 * 7 }}{% raw %}",
    "$\\frac{$",
    "&lt;b&gt;&#0;",
    "url(https://example.org/x)",
    "卷积.层/核",
]
INVISIBLE = {
    "a\0b": r"a\x00b",
    "\x1b[31mred": r"\x1b[31mred",
    "x\u202ey": r"x\u202ey",
    "\udc80": r"\udc80",
    "two\nlines": r"two\nlines",
    "\ufffe": r"\ufffe",
}
DEPTH = (
    "eval forward",
    "train forward",
    "parameter gradient",
    "activation gradient",
    "running statistics",
    "tensors",
)
EPSILON = {"float64": 2.2e-16, "float32": 1.2e-7, "bfloat16": 7.8e-3}


def measurement(quantity, slot, precision, excess=0.5, step=None, error=None):
    limit = 1e-12 if precision == "float64" else 8 * EPSILON[precision]
    error = excess * limit if error is None else error
    own = 0.0 if precision == "float64" else limit / 4
    row = {
        "quantity": quantity,
        "slot": slot,
        "precision": precision,
        "step": step,
        "reference_error": own,
        "limit": limit,
        "error": error,
        "ulp": error / EPSILON[precision],
        "excess": error / limit,
        "passed": error <= limit,
    }
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def report(slots, *, worst=0.9, steps=0, quantities=DEPTH, seed=0):
    """A report like those of ``verify``; it fails where ``worst`` is above 1."""
    rng = random.Random(seed)
    rows = [
        measurement(q, s, p, worst * rng.random() ** 3)
        for q in quantities
        for p in EPSILON
        for s in slots
    ]
    runs = ["sgd: loss", "sgd: parameters", "adamw: eval logits"] if steps else []
    rows += [
        measurement(q, s, p, worst * rng.random(), step)
        for q in runs
        for p in EPSILON
        for step in range(1, steps + 1)
        for s in slots
    ]
    provenance = {
        "subject": "resnet20",
        "checkpoint": "model.pth",
        "checkpoint_sha256": "ab" * 32,
        "architecture": "resnet20",
        "naming": "akamaster",
        "sha256": dict.fromkeys(slots, "cd" * 32),
        "command": "flax-resblock verify model.pth",
        "created": "2024-05-06T07:08:09Z",
        "seconds": 31.2,
        "versions": {"jax": "0.10.2"},
        "devices": {"jax": "cpu"},
        "input": {"batch": 2, "seed": 0},
        "peak_memory_bytes": 4.1e9,
    }
    return {
        "schema": 2,
        "passed": all(row["passed"] for row in rows),
        "criterion": "float64 within 1e-12",
        "provenance": provenance,
        "precision_found": [
            {
                "side": "flax",
                "device": "gpu",
                "dtype": "float32",
                "operation": "convolution",
                "mantissa_bits": 10,
                "expected_bits": 23,
            }
        ],
        "measurements": rows,
        "notes": [],
        "divergences": [],
        "diagnosis": [],
        "histogram": {
            "quantity": "eval forward",
            "slot": slots[0],
            "precision": "float32",
            "step": None,
            "exact": 3,
            "edges": [-9 + i / 5 for i in range(21)],
            "flax": [rng.randrange(50) for _ in range(20)],
            "torch": [rng.randrange(50) for _ in range(20)],
        },
    }


class Page(HTMLParser):
    """What a browser would see: elements, the cells of the big table, the text, the script."""

    def __init__(self, source):
        super().__init__()
        self.elements, self.rows, self.script, self.text, self._path = [], [], "", "", []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "br"):
            self._path.append((tag, dict(attrs).get("id")))
        if ("table", "measurements") in self._path and ("tbody", None) in self._path:
            if tag == "tr":
                self.rows.append([])
            elif tag in ("td", "th"):
                self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._path.pop()[0] == tag, f"</{tag}> does not fit"

    def handle_data(self, data):
        tags = [tag for tag, _ in self._path]
        if "script" in tags:
            self.script += data
        elif "style" not in tags:
            self.text += data
            if (
                ("table", "measurements") in self._path
                and {"td", "th"} & set(tags)
                and "tbody" in tags
            ):
                self.rows[-1][-1] += data


def dangers(source):
    """Elements, handlers and addresses that the template itself does not have."""
    try:
        elements = Page(source).elements
    except AssertionError as error:
        return [str(error)]
    allowed = {"viewport", "color-scheme", None}
    found = [
        tag
        for tag, a in elements
        if tag in ("img", "iframe", "object", "form", "base")
        or (tag == "meta" and a.get("name") not in allowed)
    ]
    found += [tag for tag, _ in elements if tag == "script"][1:]
    for _, attributes in elements:
        found += [
            name
            for name in attributes
            if name.startswith("on") or name in ("src", "action", "srcdoc")
        ]
        addresses = [
            attributes.get("href"),
            *re.findall(r"url\(([^)]*)", attributes.get("style") or ""),
        ]
        found += [
            address
            for address in addresses
            if address is not None and address != "data:," and not address.startswith("#")
        ]
    return found


SLOTS = [
    f"stage{s}.{b}.{layer}" for s in (1, 2, 3) for b in (0, 1, 2) for layer in ("conv1", "norm1")
]


def test_every_call_of_a_module_is_shown_with_its_own_verdict():
    first, *others = (
        report(SLOTS, worst=worst, quantities=DEPTH[:1], seed=seed)
        for seed, worst in enumerate((50.0, 0.5, 20.0))
    )
    for number, one in enumerate((first, *others)):
        one["provenance"] = {**one["provenance"], "subject": f"Block(stride={number})"}
        one["diagnosis"] = [
            {
                "slot": "block",
                "cause": "raises",
                "side": "torch",
                "sentence": f"finding {number}",
                "evidence": "seen",
                "others": [],
            }
        ]
    page = render_page(first | {"other_calls": others})
    assert all(f"Block(stride={i})" in page and f"finding {i}" in page for i in range(3))
    assert page.count('<details class="call"') == 2
    assert len(re.findall(r'<details class="call" open>', page)) == 1  # the one that differs
    names = re.findall(r'\bid="([^"]+)"', page)
    assert len(names) == len(set(names))
    rows = sum(len(one["measurements"]) for one in (first, *others))
    assert len(re.findall(r"<tr[^>]*><td class=\"number\">\d+</td><td>", page)) == rows
    assert 'id="calls"' not in render_page(first)


@pytest.mark.parametrize("worst", [0.9, 40.0])
def test_the_page_says_what_the_json_says(worst):
    facts = report(SLOTS, worst=worst)
    page = Page(render_page(facts))
    failed = [row for row in facts["measurements"] if not row["passed"]]
    assert ("✓ Equal" if worst < 1 else "✕ Differs") in page.text
    assert (
        f"{len(failed)} of 324 tensors of resnet20 are beyond"
        if failed
        else "All 324 tensors of resnet20 are within"
    ) in page.text
    assert [cells[2:5] for cells in page.rows] == [
        [row["slot"], row["quantity"], row["precision"]] for row in facts["measurements"]
    ]
    assert [cells[1] for cells in page.rows] == [
        "equal" if row["passed"] else "✕ differs" for row in facts["measurements"]
    ]
    for cells, row in zip(page.rows, facts["measurements"], strict=True):
        numbers = [row["error"], row["reference_error"], row["limit"], row["excess"], row["ulp"]]
        assert [float(cell) for cell in cells[5:]] == pytest.approx(numbers, rel=0.06)
    assert "✕ narrower than it says" in page.text
    assert "4.1 GB" in page.text


def test_the_diagnosis_comes_right_after_the_verdict():
    facts = report(SLOTS, worst=9.0)
    facts["diagnosis"] = [
        {
            "slot": "stem",
            "cause": "same-padding",
            "side": "flax",
            "sentence": "Flax pads as SAME.",
            "evidence": "agrees to 3e-16",
            "others": ["stage2.0"],
        }
    ]
    facts["divergences"] = [{"sentence": f"divergence {i}"} for i in range(11)]
    text = Page(render_page(facts)).text
    first = ("✕ Differs", "Flax pads as SAME.", "agrees to 3e-16")
    places = [text.index(w) for w in (*first, "divergence 0", "divergence 10", "Key figures")]
    assert places == sorted(places)


def test_a_difference_that_no_tensor_shows_is_not_called_equal():
    facts = report(SLOTS) | {"passed": False, "notes": ["the head was left out"]}
    text = Page(render_page(facts)).text
    assert "✕ Differs" in text
    assert "within the criterion; the diagnosis says what differs" in text
    assert "the head was left out" in text


def test_of_training_steps_the_worst_tensor_is_kept():
    facts = report(SLOTS, steps=5, quantities=())
    page = Page(render_page(facts))
    assert len(page.rows) == 3 * 3 * 5
    largest = max(
        (row for row in facts["measurements"] if row["step"] == 2), key=lambda row: row["excess"]
    )
    assert [largest["slot"], largest["quantity"], largest["precision"], "2"] in [
        cells[2:6] for cells in page.rows
    ]
    assert "all 810 tensors" in page.text


@pytest.mark.parametrize("few", [True, False])
def test_hostile_names_stay_text(few):
    slots = HOSTILE if few else [f"{name}{i}" for name in HOSTILE for i in range(3)]
    facts = report(slots, steps=2)
    facts["criterion"] = facts["provenance"]["command"] = facts["provenance"]["subject"] = "".join(
        HOSTILE
    )
    facts["measurements"] += [measurement(name, name, "float32") for name in HOSTILE]
    facts["diagnosis"] = [
        dict.fromkeys(("slot", "cause", "side", "sentence", "evidence"), "".join(HOSTILE))
        | {"others": HOSTILE}
    ]
    facts["notes"] = HOSTILE
    source = render_page(facts)
    page = Page(source)
    assert dangers(source) == []
    assert {cells[2] for cells in page.rows} == set(slots) | set(HOSTILE)
    assert all(page.text.count(name) > 6 for name in HOSTILE)
    for name in HOSTILE[:2]:
        assert dangers(source.replace(html.escape(name), name)), (
            "the same page with the name unescaped is not seen as dangerous"
        )


def test_characters_that_hide_are_shown_as_escapes():
    page = Page(render_page(report(list(INVISIBLE), steps=1)))
    assert {cells[2] for cells in page.rows} == set(INVISIBLE.values())
    assert not set("\0\x1b\u202e\udc80\ufffe") & set(page.text)
    page.text.encode()


def test_infinite_errors_and_exact_tensors_are_drawn_and_said():
    facts = report(SLOTS, quantities=("eval forward",))
    for place, error in enumerate((0.0, math.inf, math.nan)):
        facts["measurements"][place] = measurement(
            "eval forward", SLOTS[place], "float64", error=error
        )
    facts["passed"] = False
    page = Page(render_page(facts))
    assert [cells[1] for cells in page.rows[:4]] == ["equal", "✕ differs", "✕ differs", "equal"]
    assert [cells[5] for cells in page.rows[:3]] == ["0", "inf", "nan"]
    assert (
        "1 without any error, drawn on the bottom edge; 2 not finite, drawn on the top edge"
        in page.text
    )


@pytest.mark.parametrize("error", [0.0, math.inf])
def test_a_page_of_one_extreme_only(error):
    facts = report(["conv"], quantities=())
    facts["measurements"] = [
        measurement(q, "conv", p, error=error, step=s)
        for q, s in (("eval forward", None), ("sgd: loss", 1))
        for p in EPSILON
    ]
    facts["passed"] = error == 0
    assert len(Page(render_page(facts)).rows) == 6


def test_a_page_without_measurements():
    facts = report(["conv"], quantities=()) | {"histogram": None, "precision_found": []}
    facts["provenance"] = {
        key: value for key, value in facts["provenance"].items() if not key.startswith("checkpoint")
    } | {"sha256": {}, "naming": None}
    page = Page(render_page(facts))
    assert "Nothing was compared" in page.text
    assert "None" not in page.text


def test_the_policy_allows_this_script_only_and_references_resolve():
    source = render_page(report(SLOTS, worst=3.0, steps=3))
    page = Page(source)
    policy = next(
        a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        f"script-src "
        f"'sha256-{base64.b64encode(hashlib.sha256(page.script.encode()).digest()).decode()}'"
        in policy
    )
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids)) > 40
    used = {
        a.get("aria-labelledby", a.get("href", "data:,").lstrip("#")) for _, a in page.elements
    } - {"data:,"}
    assert used <= set(ids)
    assert "#01020" not in source  # every stand-in for a colour was replaced


def test_same_report_same_page():
    facts = report(SLOTS, steps=2)
    before = copy.deepcopy(facts)
    assert render_page(facts) == render_page(facts)
    assert facts == before


def test_a_large_report_stays_small():
    slots = [
        f"stage{s}.{b}.conv{c}/kernel" for s in range(1, 5) for b in range(14) for c in range(3)
    ]
    facts = report(slots, steps=8)
    assert len(facts["measurements"]) > 15_000
    assert len(render_page(facts).encode()) < 3e6


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_absence_of_a_package_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        MissingDependencyError, match=rf"needs {name}.*pip install 'flax-resblock\[report\]'"
    ):
        render_page(report(SLOTS))
