"""A slice of the fuzzer, and proofs that it sees what it looks for."""

import os
import re
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.fuzz.jax_files import JAX_MUTATIONS
from parity_tests.fuzz.mutations import MUTATIONS
from parity_tests.fuzz.samples import samples
from parity_tests.support import REPOSITORY

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to measure memory"
)


def fuzz(folder, *arguments):
    """Exit status, and what the command printed."""
    command = [sys.executable, "-m", "parity_tests.fuzz", "--workers", "1", "--seed", "7"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, *arguments], capture_output=True, text=True, cwd=folder, env=environment,
        check=False, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_every_mutated_file_loads_exactly_or_is_refused(tmp_path):
    """A few seconds of `make fuzz`."""
    status, output = fuzz(tmp_path, "200", "--files", "400")
    assert status == 0, output
    refused = dict(re.findall(r"^(\S.*?\S) +[\d,]+ +[\d,]+ +([\d,]+) +0 +0 +0$", output, re.M))
    assert refused.keys() == MUTATIONS.keys() | JAX_MUTATIONS.keys() | {"all"}, output
    # Only few Orbax folders come up, and many bits of one are in no use.
    assert {name for name, count in refused.items() if count == "0"} <= {"orbax"}, output
    assert not list(tmp_path.iterdir())


FOUND = {
    "nothing": r"\nidx +5 +1 +0 +4 +0 +0\n",
    "run": "code: os.system",
    "write": "file outside: open",
    "memory": "memory: 3",
    "wrong": "KeyError: 'unforeseen'",
    "crash": "CRASH: status",
}


@pytest.mark.slow
@pytest.mark.parametrize("found", [FOUND, {"hang": "HANG: status 1"}], ids=["faults", "hang"])
def test_the_fuzzer_sees(found, tmp_path):
    """The negative control: code, a file, memory, a crash and a hang; and a harmless file."""
    canaries = [f"--canary={name}" for name in found]
    status, output = fuzz(tmp_path, "60", f"--files={len(found)}", "--category=idx", *canaries)
    assert status == 1, output
    for name, message in found.items():
        assert re.search(message, output), (name, output)
    kept = list((tmp_path / "fuzz_failures").iterdir())
    assert len(kept) == len(found.keys() - {"nothing"})


@settings(max_examples=2 * len(MUTATIONS))
@given(category=st.sampled_from(list(MUTATIONS)), seed=st.integers(0, 2**32))
def test_a_mutation_is_repeatable(category, seed):
    files = samples()[category]
    first, again = (MUTATIONS[category](files, Random(seed)) for _ in range(2))
    assert first == again


def test_mutations_change_something():
    for category, files in samples().items():
        changed = [MUTATIONS[category](files, Random(seed)) != files for seed in range(30)]
        assert sum(changed) > 20, category
