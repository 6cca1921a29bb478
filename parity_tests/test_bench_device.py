"""flax-resblock bench --what accelerator: whatever becomes of a contestant, within the time."""

import gzip
import importlib
import json
import sys
import time
from pathlib import Path

import jax
import pytest

from flax_resblock.bench import device_run, jax_device, torch_device
from flax_resblock.bench.cases import BenchCase, Contestant
from flax_resblock.bench.chips import flops, peak_of
from flax_resblock.bench.device_report import content, sentences, table
from flax_resblock.bench.kernels import group_of, kernels_of_trace
from flax_resblock.bench.plan import EAGER, JAX_FLAGS, OURS, BenchPart, parts_of
from flax_resblock.bench.worker import Alone, Task
from parity_tests.support import REPOSITORY

CASE = BenchCase("train-step", "resnet20", 16, 4, 10, "float32")


def measured(monkeypatch, *hows, seconds=60.0, rounds=2):
    """The part in which every contestant is one of :mod:`parity_tests.bench_worker`."""
    monkeypatch.setitem(device_run.MODULES, "jax", "parity_tests.bench_worker")
    part = BenchPart("a", CASE, tuple(Contestant(how, "jax", how) for how in hows))
    options = {"device": "cpu", "rounds": rounds, "seconds": seconds, "profile": True}
    return list(device_run.run_parts([part, part][: 1 if seconds > 20 else 2], **options))


def test_a_contestant_that_fails_differs_or_hangs_is_a_row_of_its_own(monkeypatch):
    monkeypatch.setattr(device_run, "COMPILE_SECONDS", 8.0)
    begun = time.monotonic()
    (found,) = measured(monkeypatch, "right", "wrong", "crash", "tired", "hang")
    right, wrong, crash, tired, hang = found.results
    assert time.monotonic() - begun < 55
    assert "no answer within" in hang.failed
    assert right.values == pytest.approx([0.8**n for n in range(0, 10, 2)], rel=1e-9)
    assert len(right.rounds) == len(right.ratios) == 2
    assert not right.failed
    assert right.rounds[0] >= 0.01
    assert found.different == ["wrong"]
    assert wrong.apart > 0.1
    assert "out of memory, at 3 GB" in crash.failed
    assert "tired" in tired.failed
    said = " ".join(sentences(found))
    assert "wrong did not compute the same as right" in said
    assert "convolutions and products" in said
    assert right.profile["kernels"][0]["name"] == "sm90_xmma_fprop"
    assert right.profile["groups"] == pytest.approx(
        {"convolutions and products": 10, "elementwise": 20 / 3}
    )
    assert found.share_of_peak(right) == pytest.approx(
        flops(CASE) / sorted(right.rounds)[0] / 67e12, rel=1
    )
    (row, *_) = content([found], {}, ["b"])["parts"][0]["results"]
    assert row["images_per_second"] == pytest.approx(4 / sum(right.rounds) * 2)
    assert table(found).row_count == 5


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the machine has a GPU or TPU")
@pytest.mark.parametrize("side", [jax_device, torch_device])
def test_nothing_is_measured_on_a_cpu_that_was_asked_of_a_gpu(side):
    with pytest.raises(RuntimeError, match="has no GPU here"):
        side.program(Task(CASE, "eager", 1, Path("none"), "gpu"), Alone(None))


def test_no_part_begins_without_time(monkeypatch):
    assert measured(monkeypatch, "right", seconds=1.0) == []


def test_flops_and_peaks_are_those_of_the_scaling_page():
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    operations = importlib.import_module("layers")
    from flax_resblock.config import architecture

    layers = operations.layers(architecture("resnet50"), 224)
    for what, ours in (("train-step", "train-step"), ("forward", "inference")):
        case = BenchCase(ours, "resnet50", 224, 2, 1000, "bfloat16")
        assert flops(case) == operations.flops(layers, what, 2)
    assert peak_of("NVIDIA H200", "bfloat16") == 989e12
    assert peak_of("NVIDIA L40S", "bfloat16") is None


def test_the_most_important_comes_first_and_every_part_has_a_name():
    parts = parts_of("resnet50", 224, (64, 256), tuple(JAX_FLAGS))
    assert [part.name for part in parts[:3]] == ["train-bfloat16", "inference-bfloat16", "flags-1"]
    assert parts[0].case.batch == 256
    assert len({part.name for part in parts}) == len(parts)
    assert {part.case.batch for part in parts} == {64, 256}
    assert parts[0].contestants[0] is EAGER
    flags = [c.flags for part in parts if part.name.startswith("flags") for c in part.contestants]
    assert set(JAX_FLAGS.values()) <= set(flags)


def test_kernels_of_a_trace_are_those_of_the_gpus_streams(tmp_path):
    def name(kind, pid, tid, text):
        return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": text}}

    def event(pid, tid, kernel, microseconds):
        return {"ph": "X", "pid": pid, "tid": tid, "name": kernel, "dur": microseconds}

    events = [
        name("process_name", 1, 0, "/device:GPU:0"),
        name("process_name", 2, 0, "/host:CPU"),
        name("thread_name", 1, 5, "Stream #13(Compute)"),
        name("thread_name", 1, 6, "XLA Ops"),
        event(1, 5, "input_reduce_fusion", 30),
        event(1, 5, "input_reduce_fusion", 12),
        event(1, 6, "input_reduce_fusion", 500),
        event(2, 5, "python", 900),
    ]
    with gzip.open(tmp_path / "vm.trace.json.gz", "wt") as stream:
        json.dump({"traceEvents": events}, stream)
    (row,) = kernels_of_trace(tmp_path)
    assert (row["name"], row["count"]) == ("input_reduce_fusion", 2)
    assert row["seconds"] == pytest.approx(42e-6)
    assert group_of("loop_convert_fusion_3") == "elementwise"
    assert group_of("sm90_xmma_wgrad_implicit_gemm_nhwc") == "convolutions and products"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train-step", "inference"])
def test_both_sides_compute_the_same_in_every_precision(what):
    """On the CPU as device; without torch.compile, which takes minutes there."""
    parts = [
        BenchPart(precision, BenchCase(what, "resnet20", 16, 4, 10, precision), (EAGER, OURS))
        for precision in ("float32", "bfloat16")
    ]
    options = {"device": "cpu", "rounds": 1, "seconds": 600.0, "profile": what == "train-step"}
    for found in device_run.run_parts(parts, **options):
        assert [result.failed for result in found.results] == ["", ""]
        assert found.different == []
        assert found.results[1].apart < (1e-4 if found.part.name == "float32" else 1e-2)
        assert all(result.rounds and result.memory for result in found.results)
        if what == "train-step":
            assert found.results[0].values[-1] < found.results[0].values[0]
            assert all(result.profile["kernels"] for result in found.results)
