"""A slice of the fuzzer, and proofs that it sees what it looks for."""

import json
import os
import subprocess
import sys

import pytest

from parity_tests.fuzz import pickles
from parity_tests.fuzz.__main__ import fuzz
from parity_tests.fuzz.mutations import MUTATIONS, mutated
from parity_tests.fuzz.samples import samples
from parity_tests.support import REPOSITORY

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc to measure memory"
)


@pytest.mark.slow
@pytest.mark.xdist_group("fuzz")
def test_no_mutated_file_gets_what_none_may_get(tmp_path, monkeypatch):
    """A few seconds of `make fuzz`; .ci/run has half a minute."""
    monkeypatch.chdir(tmp_path)
    tally = fuzz(float(os.environ.get("FLAX_RESBLOCK_FUZZ_SECONDS", "12")), list(MUTATIONS), seed=7)
    assert not tally.failures, tally.failures[:5]
    assert set(tally.outcomes) == set(MUTATIONS)
    assert tally.total > 200
    for category, counts in tally.outcomes.items():
        assert counts["refused"], category


def test_every_mutation_is_repeatable_and_changes_something():
    for category, files in samples().items():
        changed = [mutated(category, files, seed) for seed in range(30)]
        assert changed == [mutated(category, files, seed) for seed in range(30)]
        assert sum(new != files for new in changed) > 20, category


CANARY = """
import json, os, pickle, sys, tempfile, time
from pathlib import Path
from parity_tests.fuzz import targets, worker
os.chdir(sandbox := tempfile.mkdtemp())
work = worker.Worker(Path(sandbox))
def opener(how, folder):
    if how == "run":
        pickle.loads((folder / "net.pth").read_bytes())
    elif how == "write":
        Path(tempfile.gettempdir(), "flax_resblock_outside").write_text("x")
    elif how == "memory":
        bytearray(330_000_000)
    elif how == "wrong":
        raise KeyError("unforeseen")
hows = json.loads(sys.argv[1])
targets._OPENERS.update(dict.fromkeys(hows, opener))
print(json.dumps({how: work.open(how, {"net.pth": bytes.fromhex(sys.argv[2])}) for how in hows}))
"""
SEES = {
    "run": "code: os.system",
    "write": "file outside: open",
    "memory": "memory: 3",
    "wrong": "KeyError: 'unforeseen'",
    "nothing": None,
}


@pytest.mark.slow
def test_the_guard_sees():
    """The canary: a pickle that is really run, a file that is really written, memory that is really
    taken; and a file that does nothing.
    """
    payload = b"\x80\x02" + pickles.PIECES["system"] + b"."
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", CANARY, json.dumps(list(SEES)), payload.hex()]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    answers = json.loads(result.stdout.splitlines()[-1])
    assert answers.pop("nothing") | {"seconds": 0, "memory": 0} == {
        "outcome": "exact",
        "found": [],
        "seconds": 0,
        "memory": 0,
    }
    for how, answer in answers.items():
        assert answer["outcome"] == "VIOLATION", how
        assert any(found.startswith(str(SEES[how])) for found in answer["found"]), answer
