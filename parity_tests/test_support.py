"""The tests' own machinery: torchvision's import, and skips, which need an allowed reason."""

import os

import pytest

from parity_tests.support import REPOSITORY, python

COMPLETE = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.impl("nms", lambda dets, scores, iou_threshold: scores, "CPU")
"""
WITHOUT_OPERATORS = """
import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: scores)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: scores)
"""
BROKEN = "raise RuntimeError('built for another torch')"
ABSENT = "raise ModuleNotFoundError('No module named torchvision')"

CASES = {
    "complete": (COMPLETE, "__init__.py", "True"),
    "without operators": (WITHOUT_OPERATORS, "__init__.py", "False"),
    "broken": (BROKEN, "Skipped torchvision cannot be imported: built for another torch", "False"),
    "absent": (ABSENT, "Skipped needs torchvision", "unknown"),
}
"""What torchvision's ``__init__.py`` is, what its import comes to, and whether an operator has an
implementation then."""

PROGRAM = """
import os, sys
import torch
from parity_tests.support import import_torchvision
for folder in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    sys.path.insert(0, folder)
    try:
        found = import_torchvision().__file__
    except BaseException as error:
        found = f"{type(error).__name__} {error}"
    try:
        known = torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU")
    except RuntimeError:
        known = "unknown"
    print(known, found, flush=True)
    os._exit(0)
"""


def test_torchvision_is_imported_as_it_is_or_skipped(tmp_path):
    for name, (source, *_) in CASES.items():
        (tmp_path / name / "torchvision").mkdir(parents=True)
        (tmp_path / name / "torchvision" / "__init__.py").write_text(source)
    done = python("-c", PROGRAM, *(tmp_path / name for name in CASES), cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line, (_, words, implemented) in zip(lines, CASES.values(), strict=True):
        assert line.startswith(f"{implemented} ")
        assert words in line


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
