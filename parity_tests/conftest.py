"""Settings of every test: the devices that jax shows, threads, and which skips are allowed.

Tests run on the CPU with four simulated devices. ``FLAX_RESBLOCK_ACCELERATOR=1`` leaves jax the
devices that it finds, and ``JAX_PLATFORMS=cuda,cpu`` chooses among them (keep ``cpu``: the float64
truth is computed there).

LLVM optimises the programs at level 2, which halves the time of the suite, as most of that is
compilation. XLA's own passes, which decide what is computed and in which form, are the users'; a
long sum is less exact than at their level, 3. ``XLA_FLAGS=--xla_backend_optimization_level=3``
takes that one. `make test` takes level 0; the gate runs its tests at level 2 among all the others,
and at level 3 on the newest Python.

``FLAX_RESBLOCK_STRICT_SKIPS=1``, which the gate sets, makes the run fail when a test is skipped for
a reason that :data:`ALLOWED_SKIPS` does not list."""

import os

if os.environ.get("FLAX_RESBLOCK_ACCELERATOR", "0") in ("", "0"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["FLAX_RESBLOCK_CACHE"] = "off"  # commands that tests start leave nothing in the home
os.environ["XLA_FLAGS"] = " ".join(
    {
        flag.split("=")[0]: flag
        for flag in (
            "--xla_force_host_platform_device_count=4",
            "--xla_backend_optimization_level=2",
            *os.environ.get("XLA_FLAGS", "").split(),  # they come before ours
        )
    }.values()
)

import signal

import hypothesis
import pytest
import torch

# On a busy machine an example may take any time.
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")

_ON_ACCELERATOR = os.environ.get("FLAX_RESBLOCK_ACCELERATOR", "0") not in ("", "0")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs so
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # small tensors gain nothing from a second, and xdist uses every core

ALLOWED_SKIPS = {
    "needs a GPU or TPU": "the machine has none",
    "torch has no accelerator": "the machine has none",
    "jax has no GPU or TPU": "the machine has none",
    "the package registry cannot be reached": "other programs are downloaded where that is allowed",
    "root": "file permissions do not bind root",
    "the real checkpoints are not at": "the folder with trained checkpoints is optional",
}
"""What a reason for a skip may contain, and why that is fine."""


def pytest_report_header():
    """On a device: every switch of precision and determinism that the comparisons set."""
    if not _ON_ACCELERATOR:
        return None
    from flax_resblock.parity.devices import make_xla_deterministic, settings_sentence

    make_xla_deterministic()
    return settings_sentence()


def pytest_collection_modifyitems(items):
    """Long tests first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # a stable sort


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Under ``FLAX_RESBLOCK_STRICT_SKIPS`` a skip without an allowed reason fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not os.environ.get("FLAX_RESBLOCK_STRICT_SKIPS") or reporter is None:
        return
    reasons = {
        report.nodeid: str(report.longrepr[2])
        for report in reporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    }
    refused = {
        test: reason
        for test, reason in reasons.items()
        if not any(allowed in reason for allowed in ALLOWED_SKIPS)
    }
    for test, reason in refused.items():
        reporter.write_line(f"SKIPPED WITHOUT AN ALLOWED REASON {test}: {reason}", red=True)
    if refused and session.exitstatus == 0:
        session.exitstatus = 1


@pytest.fixture(autouse=True, scope="module")
def _programs_are_dropped():
    """Compiled programs go with their module: a process may map 65,530 pieces of memory, and a
    worker that keeps the programs of two thousand tests comes near that."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(autouse=True)
def _working_directory():
    """A test that leaves the process in another folder fails, instead of one after it."""
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, and a terminal of 160 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture
def accelerator_device():
    """jax's first device that is no CPU; skips where there is none."""
    from flax_resblock.parity.devices import accelerator

    device = accelerator()
    if device is None:
        pytest.skip(
            "jax has no GPU or TPU here"
            if _ON_ACCELERATOR
            else "needs a GPU or TPU: FLAX_RESBLOCK_ACCELERATOR=1 lets jax use the one there is"
        )
    return device
