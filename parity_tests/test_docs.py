"""The examples of the documentation run as printed, and what the text says of them is true."""

import json
import os
import re
import subprocess
import sys

import pytest

from flax_resblock.cli.flags import refuse_unknown
from parity_tests import documents
from parity_tests.support import REPOSITORY
from parity_tests.test_help import HELPS, parse

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
    assert plain["failed"] == ["running statistics", "running statistics after 5 batches"]
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
    from flax_resblock.runs import other_schedules, plateau, schedules

    text = (REPOSITORY / "docs" / "training-runs.md").read_text(encoding="utf-8")
    modules = (schedules, other_schedules, plateau)
    known = [one for module in modules for one in vars(module).values() if isinstance(one, type)]
    carried = {one.__name__ for one in known if issubclass(one, schedules.Schedule)}
    carried -= {"Schedule", "Scaled", "Fixed"}
    assert len(carried) == 15
    assert all(name in text for name in carried)


def test_the_page_of_networks_shows_what_was_measured():
    from parity_tests import zoo

    facts = zoo.read(zoo.FACTS)
    assert zoo.page(facts) == zoo.PAGE.read_text(encoding="utf-8")
    rows = {
        name: row["ported"].split()
        for of in facts.values()
        for name, row in of.items()
        if "ported" in row
    }
    assert len(rows) > 60

    def largest(columns):
        return max(float(one) for one in columns if one != "-")

    # PyTorch's own rounding moves the tensors of these by more
    beyond = {name for name, row in rows.items() if largest(row[2:6]) > 1e-12}
    assert beyond <= {"inception_v3", "inception_v4", "mobileone_s0", "resnet101"}
    assert largest([one for row in rows.values() for one in row[2:]]) <= 1e-10


@pytest.mark.parametrize("page", documents.PAGES, ids=documents.name_of)
def test_every_link_leads_somewhere(page):
    assert not documents.broken(page, page.read_text(encoding="utf-8"))


def test_a_broken_link_or_anchor_is_found():
    page = documents.DOCS / "index.md"
    text = (
        "[a](port.md) [b](prt.md) [c](port.md#train-it) [d](port.md#trein-it) [e](#none) `[f](g)`"
    )
    assert documents.broken(page, text) == ["prt.md", "port.md#trein-it", "#none"]


def test_every_command_line_of_the_documentation_parses():
    """Those in blocks as a whole; of those in sentences the names of the command and its flags."""
    lines, parts = set(), set()
    for page in documents.PAGES:
        text = page.read_text(encoding="utf-8")
        lines |= set(documents.command_lines(text))
        parts |= set(documents.spans(text))
    assert len(lines) > 60
    assert len(parts) > 15
    for line in sorted(lines):
        parse(line)
    for part in parts:
        name, *arguments = part.split()[1:]
        refuse_unknown(HELPS[name], arguments)
    with pytest.raises(AssertionError, match="does not parse"):
        parse("flax-resblock convert only-one")


RUN_PAGES = (
    "explanations/batch-norm.md",
    "explanations/evidence.md",
    "explanations/traps.md",
    "how-to/fine-tune.md",
    "how-to/naming-scheme.md",
)


@pytest.mark.slow
def test_the_programs_of_the_pages_print_what_the_pages_say(tmp_path):
    """Every figure of the traps is measured here."""
    pages = [
        documents.programs((documents.DOCS / page).read_text(encoding="utf-8"))
        for page in RUN_PAGES
    ]
    outputs = documents.printed(pages, tmp_path)
    for page, blocks, printed in zip(RUN_PAGES, pages, outputs, strict=True):
        assert blocks, page
        for block, output in zip(blocks, printed, strict=True):
            said, found = documents.stated(block), output.splitlines()
            assert len(said) == len(found), f"{page}\n{block}\n{output}"
            for one, other in zip(said, found, strict=True):
                assert documents.agrees(one, other), f"{page}: {other} printed, but it says {one}"


def test_a_figure_that_is_wrong_is_noticed():
    for said, found, same in (
        ("1.4e+00, 3.0e-16", "1.5e+00, 1.0e-15", True),
        ("1.4e+00, 3.0e-16", "1.7e+00, 1.0e-16", False),
        ("1.4e+00, 3.0e-16", "1.4e+00, 1.0e-12", False),
        ("1.4e+00", "1.4e+00, 1.4e+00", False),
        ("True", "False", False),
    ):
        assert documents.agrees(said, found) == same


def test_every_trap_has_a_figure_and_a_tool_that_exists():
    text = (documents.DOCS / "explanations" / "traps.md").read_text(encoding="utf-8")
    known = set(re.findall(r"\| `([\w-]+)` \|$", VERIFICATION.read_text(encoding="utf-8"), re.M))
    traps = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert len(traps) >= 20
    for trap in traps:
        assert documents.stated(trap), trap[:60]
        (tool,) = re.findall(r"^\*Found by\*(.*?)(?:^#|\Z)", trap, re.MULTILINE | re.DOTALL)
        assert set(re.findall(r": `([\w-]+)`\.", tool)) <= known, tool


@pytest.mark.slow
def test_the_five_minutes_can_be_copied_from_beginning_to_end(tmp_path):
    """Every block of the page, Python and shell, in its order."""
    text = (documents.DOCS / "getting-started" / "five-minutes.md").read_text(encoding="utf-8")
    steps = re.findall(r"```(python|bash)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in steps].count("bash") == 3
    blocks = [
        f"import subprocess\nsubprocess.run(['bash', '-ec', {block!r}], check=True)"
        if kind == "bash"
        else block
        for kind, block in steps
    ]
    (outputs,) = documents.printed([blocks], tmp_path)
    for (_, block), output in zip(steps, outputs, strict=True):
        assert "Traceback" not in output, output
        assert output.splitlines()[: len(documents.stated(block))] == documents.stated(block)
    assert (tmp_path / "back.pth").is_file()


NOTEBOOKS = sorted((documents.DOCS / "notebooks").glob("*.md"))


def test_the_notebooks_for_colab_are_those_of_the_documentation():
    from docs.notebook_files import notebook

    assert len(NOTEBOOKS) == 4
    for page in NOTEBOOKS:
        text = page.read_text(encoding="utf-8")
        assert page.with_suffix(".ipynb").read_text(encoding="utf-8") == notebook(text), (
            "python -m docs.notebook_files writes it anew"
        )
        assert f"/blob/main/docs/notebooks/{page.stem}.ipynb)" in text


def test_the_project_files_agree_about_version_and_address():
    import tomllib

    import yaml

    from flax_resblock import __version__

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"\n## [{__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    address = project["urls"]["Repository"]
    assert citation["repository-code"] == address
    assert f"git clone {address}" in (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for page in NOTEBOOKS:
        assert address.removeprefix("https://github.com/") in page.read_text(encoding="utf-8")
    github = REPOSITORY / ".github"
    jobs = yaml.safe_load((github / "workflows" / "ci.yml").read_text())["jobs"]
    rows = jobs["test"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows} == {"3.11", "3.12", "3.13"}
    assert all((REPOSITORY / row["constraints"]).is_file() for row in rows)
    oldest = re.findall(r"jax==(\S+)", (REPOSITORY / "constraints.txt").read_text())
    newest = re.findall(r"jax==(\S+)", (REPOSITORY / "constraints-newest.txt").read_text())
    (floor,) = (one for one in project["dependencies"] if one.startswith("jax>="))
    assert oldest[0].startswith(floor.removeprefix("jax>="))
    assert newest != oldest
    assert {row["constraints"] for row in rows} == {"constraints.txt", "constraints-newest.txt"}
    publish = yaml.safe_load((github / "workflows" / "publish.yml").read_text())
    trusted = publish["jobs"]["publish"]  # PyPI trusts this workflow: it keeps no password
    assert trusted["permissions"] == {"id-token": "write"}
    assert (trusted["needs"], trusted["environment"]) == ("build", "pypi")
    assert publish["permissions"] == {"contents": "read"}
    assert "permissions" not in publish["jobs"]["build"]
    assert not any("password" in step.get("with", {}) for step in trusted["steps"])
    for job in (*jobs.values(), *publish["jobs"].values()):
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+@(v\d+|release/v1)", one) for one in used)
    for form in (github / "ISSUE_TEMPLATE").glob("*.yml"):
        yaml.safe_load(form.read_text())
    assert "flax-resblock doctor" in (github / "ISSUE_TEMPLATE" / "bug.yml").read_text()
