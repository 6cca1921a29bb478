"""What several tests share."""

from __future__ import annotations

import functools
import importlib
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from flax_resblock.config import Config
from flax_resblock.convert import NAMINGS, StateMap

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared" / "checkpoints"
"""Real checkpoints and images, where this machine has them."""

needs_real_checkpoints = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"the real checkpoints are not at {SHARED}"
)

DTYPES = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_LIBRARIES: list[torch.library.Library] = []
"""The operators defined here last as long as these objects."""


@functools.cache
def import_torchvision():
    """The real torchvision, or a skip with the reason.

    With the CPU build of torch, torchvision's wheel cannot load its operators and then refuses to
    be imported because PyTorch does not know them. They are defined then, without an
    implementation: the networks need none."""
    try:
        return importlib.import_module("torchvision")
    except ImportError:
        pytest.skip("needs torchvision: pip install --no-deps torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
    _LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
    try:
        for operator in _OPERATORS:
            if not hasattr(torch.ops.torchvision, operator.split("(")[0]):
                _LIBRARIES[-1].define(operator)
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")


def random_bits(
    config: Config,
    dtype: np.dtype | type,
    *,
    naming: str = "torchvision",
    seed: int = 0,
    counter: int = 7,
) -> dict[str, np.ndarray]:
    """A state dict whose floating tensors are random bit patterns: NaN with payloads, infinities,
    denormals and negative zeros among them."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    state = {}
    for entry in StateMap(config, NAMINGS[naming]).entries:
        shape = entry.torch_shape
        if entry.role == "counter":
            state[entry.torch_key] = np.array(counter, np.int64)
        else:
            state[entry.torch_key] = np.frombuffer(
                rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype
            ).reshape(shape)
    return state


def assert_same_bits(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Same keys in the same order, dtypes, shapes and bits."""
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
        assert ours[key].tobytes() == value.tobytes(), key
