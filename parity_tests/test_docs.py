"""The examples of the documentation run as printed, and what the text says of them is true."""

import re

import pytest

from parity_tests.support import REPOSITORY

VERIFICATION = REPOSITORY / "docs" / "verification.md"


@pytest.fixture(scope="module")
def printed():
    """The names that the examples of docs/verification.md leave behind."""
    names: dict = {}
    for code in re.findall(
        r"```python\n(.*?)```", VERIFICATION.read_text(encoding="utf-8"), re.DOTALL
    ):
        exec(compile(code, str(VERIFICATION), "exec"), names)
    return names


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_mlp_is_told_apart_by_its_gelu(printed):
    mlp = printed["mlp"]
    assert not mlp.passed
    assert "before it Flax applies GELU (tanh form) after layers.0 instead of GELU" in str(mlp)
    expected = VERIFICATION.read_text(encoding="utf-8")
    assert "before it Flax applies GELU (tanh form) after layers.0 instead of GELU" in expected


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_separable_block_differs_in_its_statistics_only(printed):
    plain = printed["plain"]
    expected = {"running statistics", "running statistics after 5"}
    assert {m.quantity for m in plain.comparison.measurements if not m.verdict.passed} == expected
    words = "updates with the biased variance and weighs the new batch by 0.01 instead of 0.1"
    assert words in str(plain)
    assert words in " ".join(VERIFICATION.read_text(encoding="utf-8").split())


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
def test_the_separable_block_with_this_projects_norm_is_equal(printed):
    exact = printed["exact"]
    assert exact.passed, str(exact)
    assert max(m.step or 0 for m in exact.comparison.measurements) == 3


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
