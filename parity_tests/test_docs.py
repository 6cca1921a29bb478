"""The examples of the documentation run as printed, and what the text says of them is true."""

import json
import os
import re
import subprocess
import sys

import pytest

from parity_tests.support import REPOSITORY

VERIFICATION = REPOSITORY / "docs" / "verification.md"


@pytest.fixture(scope="module")
def printed():
    """What the examples of docs/verification.md print, in a process like a reader's."""
    text = VERIFICATION.read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    facts = """
import json
def facts(found):
    rows = found.comparison.measurements
    failed = sorted({row.quantity for row in rows if not row.verdict.passed})
    last = max(row.step or 0 for row in rows)
    return {"text": str(found), "passed": found.passed, "failed": failed, "last": last}
print(json.dumps([facts(found) for found in (mlp, plain, exact)]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-c", code + facts]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_examples_say_what_the_text_says_of_them(printed):
    """The MLP is told apart by its GELU; the separable block differs in its statistics only, and
    with this project's norm it is equal."""
    mlp, plain, exact = printed
    text = " ".join(VERIFICATION.read_text(encoding="utf-8").split())
    assert not mlp["passed"]
    words = "before it Flax applies GELU (tanh form) after layers.0 instead of GELU"
    assert words in mlp["text"]
    assert words in text
    assert plain["failed"] == ["running statistics", "running statistics after 5"]
    words = "updates with the biased variance and weighs the new batch by 0.01 instead of 0.1"
    assert words in plain["text"]
    assert words in text
    assert exact["passed"], exact["text"]
    assert exact["last"] == 3


@pytest.mark.slow
def test_every_quantity_and_field_of_the_json_is_documented():
    from flax_resblock.parity.comparison import Plan, compare_pair
    from flax_resblock.parity.inputs import adversarial_images
    from flax_resblock.parity.reference import ReferencePair
    from flax_resblock.parity.report import report_json
    from parity_tests.faults import BLOCK

    plan = Plan(gradients=True, isolated=True, steps=1, precisions=("float64",))
    facts = report_json(
        compare_pair(ReferencePair.random(BLOCK), adversarial_images(BLOCK, batch=2), plan), {}
    )
    text = VERIFICATION.read_text(encoding="utf-8")
    assert all(f"`{field}`" in text for field in facts)
    assert all(f"`{field}`" in text for field in facts["measurements"][0])
    stated = {
        m["quantity"].replace("isolated train", "isolated").replace("adamw", "sgd")
        for m in facts["measurements"]
    }
    assert all(
        f"`{quantity}`" in text
        for quantity in stated
        if not ("isolated" in quantity and quantity.split()[-1] in ("gradient", "statistics"))
    )


def test_the_example_of_a_moving_run_does_what_it_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / "docs" / "training-runs.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "training-runs.md", "exec"), {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*\)  # (.*)", code)[1]


def test_every_schedule_that_is_carried_is_documented():
    from flax_resblock.runs import scheduler_state as schedule

    text = (REPOSITORY / "docs" / "training-runs.md").read_text(encoding="utf-8")
    carried = {kind.__name__ for kind in schedule.PLAIN_SCHEDULES} | {
        "MultiStepLR",
        "OneCycleLR",
        "SequentialLR",
    }
    assert all(name in text for name in carried)


def test_the_page_of_networks_shows_what_was_measured():
    from parity_tests import zoo

    facts = zoo.read(zoo.FACTS)
    assert zoo.page(facts) == zoo.PAGE.read_text(encoding="utf-8")
    rows = [one["ported"] for of in facts.values() for one in of.values() if "ported" in one]
    errors = [float(one) for row in rows for one in row.split()[2:6] if one != "-"]
    assert len(rows) > 20
    assert max(errors) <= 1e-12
