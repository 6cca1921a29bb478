"""What a first use costs against plain XLA, in fresh processes; the measurement can fail."""

import importlib.util
import sys
from dataclasses import replace

import pytest

from parity_tests.support import REPOSITORY


def first_use():
    place = REPOSITORY / "benchmarks" / "first_use.py"
    spec = importlib.util.spec_from_file_location("first_use", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_first_use_takes_no_longer_than_a_few_times_plain_xla(tmp_path):
    benchmark = first_use()
    benchmark.prepared(tmp_path, ["resnet20"])
    rows = [row for case in benchmark.quick_cases() for row in benchmark.rows_of(case, tmp_path, 1)]
    for case, row in zip(benchmark.quick_cases(), rows, strict=True):
        assert 0 < row["ratio"] < case.bound, row
    # a process that sleeps while it is timed is beyond the bound
    case, plain = benchmark.quick_cases()[0], rows[0]["other"]
    asleep = replace(case, own=case.other)
    found = benchmark.measured(
        asleep, asleep.own, benchmark.ROOT, tmp_path, delay=case.bound * plain
    )
    assert found["s"] / plain > case.bound
    assert found["processor s"] < found["s"]


def test_a_row_that_another_revision_cannot_run_leaves_its_cell_empty(tmp_path):
    benchmark = first_use()
    own = benchmark.Side("", 'assert "elsewhere" not in os.environ["PYTHONPATH"]')
    case = benchmark.Case("a", own, "", None, units=("s", "MB"))
    elapsed, memory = benchmark.rows_of(case, tmp_path, 1, tmp_path / "elsewhere", "processor s")
    assert "before" not in elapsed
    assert (elapsed["unit"], memory["unit"]) == ("processor s", "MB")
    assert 0 <= elapsed["now"] < 60
    assert 5 < memory["now"] < 500
    assert "before" in benchmark.rows_of(case, tmp_path, 1, tmp_path / "there")[0]
    with pytest.raises(RuntimeError, match=r"(?s)a failed: .*AssertionError"):
        benchmark.measured(case, own, tmp_path / "elsewhere", tmp_path)


def test_the_table_goes_between_its_marks_and_shows_every_row():
    benchmark = first_use()
    rows = [
        {"what": "a", "unit": "s", "yardstick": "XLA", "now": 3.0, "other": 2.0, "ratio": 1.5},
        {"what": "b", "unit": "MB", "yardstick": "", "now": 700.0, "before": 1400.0},
    ]
    document = f"above\n{benchmark.BEGIN}\nold\n{benchmark.END}\nbelow"
    text = benchmark.filled(document, rows)
    assert text.startswith("above")
    assert text.endswith("below")
    assert "old" not in text
    assert "| a |  | 3 s | 2 s, XLA | 1.50 |" in text
    assert "| b | 1400 MB | 700 MB |  |  |" in text
