"""flax-resblock bench: what it says, what it writes, and what it refuses."""

import importlib.util
import json
import subprocess
import sys

import pytest

from flax_resblock.bench.cases import CONTESTANTS, FULL, BenchCase
from flax_resblock.bench.report import disagreement, markdown_table
from flax_resblock.bench.run import Result
from flax_resblock.cli import huge_pages, run
from parity_tests.support import REPOSITORY


def speed():
    spec = importlib.util.spec_from_file_location("speed", REPOSITORY / "benchmarks" / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_both_sides_compute_the_same_and_are_timed(tmp_path, capsys):
    out, png = tmp_path / "bench.json", tmp_path / "bench.png"
    flags = "--architecture block --image-size 8 --batch 4 --rounds 2 --threads 1"
    arguments = ["bench", "--what", "train-step", *flags.split()]
    assert run([*arguments, "--json-file", str(out), "--png", str(png)]) == 0
    text = capsys.readouterr().out
    assert "All computed the same" in text
    (case,) = json.loads(out.read_text())["cases"]
    names = [contestant.name for contestant in CONTESTANTS["train-step"]]
    assert [result["contestant"] for result in case["results"]] == names
    assert all(
        result["failed"] or len(result["rounds"]) == len(result["ratios"]) == 2
        for result in case["results"]
    )
    assert all(name in text for name in names)
    losses = [result["value"] for result in case["results"] if not result["failed"]]
    assert max(losses) / min(losses) - 1 < 1e-5
    assert png.read_bytes().startswith(b"\x89PNG")
    assert run([*arguments, "--json-file", str(out)]) == 2  # it is there already
    assert "--force" in capsys.readouterr().err


def test_a_side_that_computes_something_else_is_seen():
    right = Result("a", value=2.0)
    wrong = Result("b", value=2.1)
    failed = Result("c", failed="no compiler")
    assert disagreement([right, failed]) == 0
    assert disagreement([right, wrong]) == pytest.approx(0.05)


def test_the_document_holds_the_measured_table():
    """docs/performance.md has docs/bench.json with every row, and says where it was measured."""
    found = json.loads((REPOSITORY / "docs" / "bench.json").read_text())
    assert [case["case"] for case in found["cases"]] == [vars(case) for case in FULL]
    text = (REPOSITORY / "docs" / "performance.md").read_text()
    assert text == speed().filled(text, found)
    assert markdown_table(found) in text
    assert all(
        result["ratio_quartiles"][0] > 0
        for case in found["cases"]
        for result in case["results"]
        if not result["failed"]
    )


def test_memory_is_a_workers_own():
    """Not what the process that started it held: 300 MB here."""
    held = bytearray(b"1") * (300 << 20)
    command = [
        sys.executable,
        "-c",
        "from flax_resblock.bench.worker import resident\nprint(resident()); x = "
        "bytearray(b'1') * (200 << 20); print(resident())",
    ]
    before, after = map(
        int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    )
    assert before < len(held) / 2
    assert after - before > 150 << 20


DEVICE = ["--what", "accelerator"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--architecture", "resnet19"], "choose block or one of"),
        (["--rounds", "0"], "must be positive"),
        (["--threads", "4096"], "at most the"),
        (["--what", "conversion", "--architecture", "block"], "choose another --architecture"),
        (["--json-file", "nowhere/at/all.json"], "nowhere"),
        (["--what", "everything"], "everything"),
        ([*DEVICE, "--parts", "everything"], "choose from train-bfloat16"),
        ([*DEVICE, "--minutes", "0"], "--minutes must be positive"),
        ([*DEVICE, "--architecture", "block"], "whole networks"),
        ([*DEVICE, "--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_one_paragraph(flags, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = run(["bench", *flags])
    except SystemExit as error:  # from the parser of flags
        status = error.code
    captured = capsys.readouterr()
    assert status == 2
    assert said in captured.err + captured.out


def test_cases_are_titled_by_what_they_time():
    assert (
        BenchCase("train-step", "resnet18", 32, 128).title == "train-step resnet18 32x32 batch 128"
    )
    assert len({case.title for case in FULL}) == len(FULL)


def test_train_alone_is_started_again_with_huge_pages(monkeypatch):
    started = []
    monkeypatch.setattr(huge_pages.os, "execv", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(huge_pages, "_has_glibc", lambda: True)
    monkeypatch.delenv(huge_pages.VARIABLE, raising=False)
    huge_pages.start_again_with_huge_pages(["convert", "train"])
    assert not started
    huge_pages.start_again_with_huge_pages(["train", "--out", "x"])
    assert started == [(sys.executable, sys.orig_argv)]
    huge_pages.start_again_with_huge_pages(["train"])  # it is set now
    monkeypatch.setenv(huge_pages.VARIABLE, "")  # as is somebody's own choice
    huge_pages.start_again_with_huge_pages(["train"])
    assert len(started) == 1
