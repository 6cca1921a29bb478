"""The tests' own import of torchvision: a complete one is left alone, a broken one is a skip."""

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

PROGRAM = """
import torch
from parity_tests.support import import_torchvision
try:
    print(import_torchvision().__file__)
except BaseException as error:
    print(type(error).__name__, error)
print(torch._C._dispatch_has_kernel_for_dispatch_key("torchvision::nms", "CPU"))
"""


@pytest.mark.parametrize(
    ("source", "words", "implemented"),
    [
        (COMPLETE, "__init__.py", True),
        (WITHOUT_OPERATORS, "__init__.py", False),
        (BROKEN, "Skipped torchvision cannot be imported: built for another torch", False),
        (ABSENT, "Skipped needs torchvision", None),
    ],
    ids=["complete", "without operators", "broken", "absent"],
)
def test_torchvision_is_imported_as_it_is_or_skipped(source, words, implemented, tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    program = PROGRAM if implemented is not None else PROGRAM.rpartition("print(")[0]
    done = python(
        "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}", cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert words in first
    assert rest == ([] if implemented is None else [str(implemented)])
