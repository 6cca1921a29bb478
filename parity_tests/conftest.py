"""Set-up before jax starts: a CPU backend with four simulated devices, unless another platform is
asked for.

Tests marked ``accelerator`` need a GPU or TPU and are skipped where jax has none. To run them,
leave the choice of the platform to jax:

    FLAX_RESBLOCK_ACCELERATOR=1 python -m pytest -m accelerator

``JAX_PLATFORMS`` does the same for one platform: ``JAX_PLATFORMS=cuda,cpu`` (with ``cpu``, on which
the float64 truth is computed).

Tests marked ``slow`` come last. ``FLAX_RESBLOCK_TEST_SECONDS=900`` skips, by name, those that have
not begun 900 s after the start."""

import os
import time

if os.environ.get("FLAX_RESBLOCK_ACCELERATOR", "0") in ("", "0"):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["FLAX_RESBLOCK_CACHE"] = (
    "off"  # the programs that tests start neither use nor leave anything in the user's home
)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()
    )

import pytest
import torch

torch.set_num_threads(
    1
)  # small tensors gain nothing from a second thread, and pytest-xdist already uses every core


_STARTED = time.monotonic()
_ON_ACCELERATOR = os.environ.get("FLAX_RESBLOCK_ACCELERATOR", "0") not in ("", "0")


def pytest_report_header():
    """On a device: every switch of precision and determinism that the comparisons set."""
    if not _ON_ACCELERATOR:
        return None
    from flax_resblock.parity.switches import make_xla_deterministic, sentence

    make_xla_deterministic()
    return sentence()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)  # a stable sort


def pytest_runtest_setup(item):
    seconds = float(os.environ.get("FLAX_RESBLOCK_TEST_SECONDS", "inf"))
    if item.get_closest_marker("slow") is not None and time.monotonic() - _STARTED > seconds:
        pytest.skip(f"no time left: {seconds:g} s are over (FLAX_RESBLOCK_TEST_SECONDS)")


@pytest.fixture(autouse=True)
def _working_directory():
    """A test that leaves the process in another folder fails, instead of one that comes after
    it.
    """
    before = os.getcwd()
    yield
    after = os.getcwd()
    os.chdir(before)
    assert after == before


@pytest.fixture
def accelerator_device():
    """jax's first device that is no CPU; skips where there is none."""
    from flax_resblock.parity.devices import accelerator

    device = accelerator()
    if device is None:
        pytest.skip(
            "jax has no GPU or TPU here"
            if _ON_ACCELERATOR
            else (
                "needs a GPU or TPU: set FLAX_RESBLOCK_ACCELERATOR=1 to let jax use the one there "
                "is"
            )
        )
    return device
