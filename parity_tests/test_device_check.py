"""The command that checks a GPU or TPU, tried with the CPU as the device."""

import importlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from flax_resblock import BlockConfig
from flax_resblock.parity import oracle
from parity_tests.support import REPOSITORY

sys.path.append(str(REPOSITORY / "benchmarks"))
check, parts, parity = (
    importlib.import_module(f"device_{name}") for name in ("check", "parts", "parity")
)


SUBJECT = "block 8 to 16, stride 2, 1x1 skip"
"""The case of ``--quick``."""


def _failed(fault, folder):
    """Quantities of the block that a fault makes fail."""
    result = folder / "block.json"
    parts.run_part("block", parity.Setting("cpu", quick=True, fault=fault), result)
    found = json.loads(result.read_text())
    assert found["finished"]
    assert len(found["rows"]) == 7
    return {row["check"] for row in found["rows"] if row["passed"] is False}


def test_each_fault_is_found_in_a_block_whose_other_quantities_pass(tmp_path):
    assert {"eval forward", "train forward"} <= _failed("precision", tmp_path)
    assert _failed("statistics", tmp_path) == {
        "running statistics",
        "running statistics after 5 batches",
    }


def test_an_error_in_one_case_leaves_the_other_cases(tmp_path, monkeypatch):
    def fails(pair, *_, **__):
        if pair.config.out_channels == 8:
            raise NotImplementedError("no such kernel")
        return oracle.Comparison((oracle.Measurement("q", "s", "float32", verdict),))

    verdict = oracle.verdict_of(0.0, 0.0, 1e-7)
    configs = {str(n): BlockConfig(in_channels=4, out_channels=n) for n in (8, 16)}
    monkeypatch.setattr(parity, "compare_pair", fails)
    monkeypatch.setattr(parity, "BATTERY", configs)
    monkeypatch.setattr(parity, "CHUNKS", 1)
    with pytest.raises(RuntimeError, match="no such kernel"):
        parts.run_part("battery-1", parity.Setting("cpu"), tmp_path / "result.json")
    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["passed"] for row in found["rows"]] == [False, True]
    assert not found["finished"]


@dataclass(frozen=True)
class Scripted(check.Launch):
    """Runs a line of Python in place of each part."""

    scripts: dict[str, str] = field(default_factory=dict)

    def start(self, name):
        script = f"result = {str(self.result(name))!r}; {self.scripts[name]}"
        with self.log(name).open("wb") as log:
            return subprocess.Popen(
                [sys.executable, "-c", script], stderr=log, start_new_session=True
            )


def _finished(passed):
    content = {"rows": [["a", "b", "c", passed, {}]], "finished": True}
    content["rows"] = [dict(zip(parity.Row._fields, row, strict=True)) for row in content["rows"]]
    return f"open(result, 'w').write({json.dumps(content)!r})"


def test_a_part_that_crashes_or_hangs_does_not_end_the_others(tmp_path):
    scripts = {
        "block": "raise MemoryError('no more of it')",
        "conversion": "import time; time.sleep(60)",
        "training-float32": _finished(True),
    }
    launch = Scripted("cpu", False, None, 2, tmp_path, scripts=scripts)
    results = check.Check(tmp_path, {"device": "cpu", "quick": False, "fault": None})
    check.run_all(launch, results, list(scripts), time.monotonic() + 60, 2)
    states = {name: part["status"] for name, part in results.parts.items()}
    assert states["block"] == "ended with exit status 1"
    assert "no more of it" in results.parts["block"]["error"]
    assert states["conversion"].startswith("stopped after its limit")
    assert states["training-float32"] == "passed"
    assert results.exit_status(list(scripts)) == 3
    assert "no more of it" in (tmp_path / "device_check.md").read_text()
    check.run_all(launch, results, ["precision"], time.monotonic() - 1, None)
    assert results.parts["precision"]["status"].startswith("not run")
    launch.scripts["block"] = _finished(False)
    check.run_all(launch, results, ["block"], time.monotonic() + 60, 2)
    assert results.exit_status(list(scripts)) == 1


@pytest.mark.slow
def test_what_failed_is_repeated_with_other_options_of_xla(tmp_path):
    launch = check.Launch("cpu", True, "precision", 1, tmp_path)
    results = check.Check(tmp_path, {"device": "cpu", "quick": True, "fault": "precision"})
    failed, passed = (
        parity.Row(f"{subject}, float32", "eval forward", "", ok, {"worst": {}})._asdict()
        for subject, ok in ((SUBJECT, False), ("another", True))
    )
    results.put("block", check.record("failed", rows=[failed, passed]))
    results.put("conversion", check.record("passed", rows=[passed]))
    check.follow_up(launch, results, ["block", "conversion"], time.monotonic() + 100, None)
    assert "again" not in results.parts["conversion"]
    again = results.parts["block"]["again"]["not optimised"]
    assert again["status"] == "failed"  # as the fault is in the network
    assert "--xla_backend_optimization_level=0" in again["xla_flags"].split()
    assert all(row["subject"].startswith(SUBJECT) for row in again["rows"])
    assert "| not optimised | block 8 to 16" in (tmp_path / "device_check.md").read_text()
    setting = parity.Setting("cpu", quick=True, subjects=("no such case",))
    assert list(parity.block(setting)) == []


def test_results_are_kept_for_the_same_machine_alone(tmp_path):
    def call(fault, source):
        results = check.Check(tmp_path, {"device": "cpu", "quick": False, "fault": fault})
        row = parity.Row("machine", "source", source)._asdict()
        results.put("machine", check.record("passed", rows=[row]))
        return results

    states = {"block": "failed", "conversion": "passed", "memory": "stopped", "tests": "skipped"}
    first = call(None, "abc")
    for name, status in states.items():
        first.put(name, check.record(status))
    written = (tmp_path / "device_check.json").read_text()
    assert set(call(None, "abc").parts) == {"machine", "block", "conversion"}
    for changed in ((None, "abd"), ("precision", "abc")):
        (tmp_path / "device_check.json").write_text(written)
        assert set(call(*changed).parts) == {"machine"}


@pytest.mark.slow
def test_the_command_passes_and_a_second_call_runs_what_is_missing(tmp_path):
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "device_check.py"), "--quick"]
    command += ["--out", str(tmp_path), "--parts"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def run(names):
        done = subprocess.run(
            [*command, names], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("conversion,tests")
    found = json.loads((tmp_path / "device_check.json").read_text())["parts"]
    states = {name: part["status"] for name, part in found.items()}
    assert states == {"machine": "passed", "conversion": "passed", "tests": "skipped: not on a CPU"}
    output = run("block,conversion")
    assert "kept      conversion" in output
    assert "passed    block" in output
    page = (tmp_path / "device_check.md").read_text()
    assert "Failed: nothing." in page
    assert "block 8 to 16, stride 2, 1x1 skip, float32 | running statistics" in page
