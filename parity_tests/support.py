"""What several tests share."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx

from flax_resblock import ResNetConfig
from flax_resblock.config import Config
from flax_resblock.convert import NAMINGS, StateMap
from flax_resblock.parity.oracle import relative_l2

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


def fast_only(fast: Iterable[Any], every: Iterable[Any]) -> list[Any]:
    """All parameters of a test, those that are not in ``fast`` marked as slow."""
    chosen = list(fast)
    return [one if one in chosen else pytest.param(one, marks=pytest.mark.slow) for one in every]


def fewest(features: Mapping[Any, set[Any]]) -> list[Any]:
    """Few of the items that together have every feature of all of them: the greedy cover."""
    missing: set[Any] = set().union(*features.values())
    chosen = []
    while missing:
        best = max(features, key=lambda item: len(features[item] & missing))
        chosen.append(best)
        missing -= features[best]
    return chosen


SMALL = ResNetConfig(depths=(1, 1), widths=(6, 10), stem="cifar", stem_width=4, num_classes=3)


def healthy(config: Config = SMALL, naming: str = "torchvision") -> dict[str, np.ndarray]:
    """A state dict of finite positive weights."""
    rng = np.random.default_rng(0)
    return {
        key: value if value.dtype == np.int64 else rng.random(value.shape, np.float32)
        for key, value in random_bits(config, np.float32, naming=naming).items()
    }


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values have the same types and bits all the way down."""
    if isinstance(ours, argparse.Namespace) and isinstance(theirs, argparse.Namespace):
        return same(vars(ours), vars(theirs))
    if type(ours) is not type(theirs):
        return False
    if isinstance(ours, np.ndarray):
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and ours.tobytes() == theirs.tobytes()
        )
    if isinstance(ours, dict):
        return (
            list(ours) == list(theirs)
            and [type(key) for key in ours] == [type(key) for key in theirs]
            and all(same(ours[key], theirs[key]) for key in ours)
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs or repr(ours) == repr(theirs)  # of NaN


def with_trained_norms(module: torch.nn.Module) -> torch.nn.Module:
    """The module, with norms as training leaves them."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 0.2, 3)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, 0, 0.4)
    return module


@nnx.jit
def _output(model: Any, images: jax.Array) -> jax.Array:
    return model(images)


def output(model: nnx.Module, images: Any) -> np.ndarray:
    """What a network gives, as one program, which equal networks share."""
    return np.asarray(_output(model, jax.numpy.asarray(images)))


def torch_output(module: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """What a PyTorch network gives in evaluation mode for images ``(N, H, W, C)``."""
    with torch.no_grad():
        return module.eval()(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()


def worst(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest relative difference (L2) of a floating tensor; the keys must be the same."""
    assert ours.keys() == theirs.keys()
    return max(relative_l2(ours[key], value) for key, value in theirs.items())


def spoil(monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    """From here on, networks are ported with one piece of their source in place of another."""
    from flax_resblock.port import porting

    genuine = porting.source_of
    monkeypatch.setattr(
        porting, "source_of", lambda *a, **k: genuine(*a, **k).replace(right, wrong)
    )


def flip(path: Path | str, bit: int) -> None:
    """Changes one bit of a file; a negative number counts from its end."""
    content = bytearray(Path(path).read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    Path(path).write_bytes(content)


def json_lines(path: Path | str) -> list[Any]:
    """The values of a file with one JSON value a line."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter; ``options`` are those of :func:`subprocess.run`."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, **{"capture_output": True, "text": True, **options})


def installed_apart(folder, packages):
    """Installs packages, without what they need, into a folder for a process of their own; a skip
    where no registry can be reached."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *packages], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"the package registry cannot be reached: {done.stderr[-300:]}")
    return folder


@contextmanager
def mounted(place, options):
    """A file system in memory; a skip where nothing may be mounted."""
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
