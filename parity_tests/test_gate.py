"""The gate is honest: a skip without an allowed reason fails the run."""

import os

import pytest

from parity_tests.support import REPOSITORY, python

ALLOWED = "needs a GPU or TPU: FLAX_RESBLOCK_ACCELERATOR=1 lets jax use the one there is"
REFUSED = "needs torchvision: pip install torchvision"


def run(folder, *reasons, strict):
    """Exit status and output of a test run whose tests skip for these reasons."""
    folder.mkdir()
    conftest = (REPOSITORY / "parity_tests" / "conftest.py").read_text(encoding="utf-8")
    (folder / "conftest.py").write_text(conftest, encoding="utf-8")
    tests = [f"def test_{i}():\n    pytest.skip({why!r})\n" for i, why in enumerate(reasons)]
    (folder / "test_it.py").write_text("\n\n".join(["import pytest\n", *tests]))
    done = python(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-n",
        "1",
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "FLAX_RESBLOCK_STRICT_SKIPS": strict},
    )
    return done.returncode, done.stdout


@pytest.mark.slow
def test_a_skip_fails_the_strict_run_unless_its_reason_is_listed(tmp_path):
    status, text = run(tmp_path / "mixed", ALLOWED, REFUSED, strict="1")
    assert status == 1, text
    assert text.count("SKIPPED WITHOUT AN ALLOWED REASON") == 1
    assert REFUSED in text.split("SKIPPED WITHOUT AN ALLOWED REASON")[1]
    # the control; that an allowed skip fails no strict run is what every run of the gate shows
    assert run(tmp_path / "lenient", ALLOWED, REFUSED, strict="")[0] == 0
