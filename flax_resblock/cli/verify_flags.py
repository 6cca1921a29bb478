"""The flags of ``flax-resblock verify``."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from flax_resblock.cli.common import Force, refuse_all_existing
from flax_resblock.config import Config
from flax_resblock.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from flax_resblock.parity.comparison import Plan


_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
_LARGE = 1 << 20
"""Bytes of an array whose memory goes back to the system as soon as it is freed."""


def be_frugal() -> None:
    """Prepares a process in which both frameworks compute; call it before torch is imported.

    PyTorch's threads sleep while they wait for work, instead of turning in a loop: on small images,
    and beside XLA's own threads, that loop takes longer than the work. What you have set yourself
    stays. Memory of large arrays is not kept when it is freed: glibc would keep up to 32 MB of each
    for later, which one framework rarely reuses of the other. All threads share one heap, because
    each heap keeps leftovers.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_ARENA_MAX, 1)


@contextmanager
def torch_needed() -> Iterator[None]:
    """Turns a missing torch into an error message, and imports it without looking for cycles of
    references, which takes a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            "this runs the PyTorch side and needs torch: pip install 'flax-resblock[torch]'."
        ) from error
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class InputFlags:
    """The images."""

    batch: int = 3
    """Number of random, asymmetric images."""
    height: int | None = None
    """Height of the images; by default an odd size that suits the stem."""
    width: int | None = None
    """Width of the images; by default an even size that suits the stem."""
    seed: int = 0
    """Seed of the images, and of the weights if they are random."""
    input: Path | None = None
    """A .npy file with images of your own, (N, H, W, C), normalised as the network expects them."""

    def images(self, config: Config) -> np.ndarray:
        """``(N, H, W, C)``, float64."""
        from flax_resblock.parity.inputs import adversarial_images, read_images

        if self.input is not None:
            return read_images(self.input, config)
        return adversarial_images(
            config, batch=self.batch, height=self.height, width=self.width, seed=self.seed
        )

    @property
    def is_default(self) -> bool:
        """Whether the size of the images was left open."""
        return self.height is None and self.width is None and self.input is None

    def check(self) -> None:
        """Raises InputError if a size is not positive."""
        if self.batch < 1 or (self.height or 1) < 1 or (self.width or 1) < 1:
            raise InputError(
                f"--batch {self.batch}, --height {self.height} and --width {self.width} must "
                f"be positive."
            )


@dataclass(frozen=True)
class WhatFlags:
    """What to compare, and how strictly."""

    eval_only: bool = False
    """Compare evaluation mode only."""
    gradients: bool = False
    """Also compare the gradients of every parameter, every activation and the input."""
    isolated: bool = False
    """Also compare every layer by itself, fed with PyTorch's input, so that its own error shows."""
    steps: int = 0
    """Also compare so many training steps with each optimizer, after every step."""
    optimizer: Literal["both", "sgd", "adamw"] = "both"
    """Optimizer of those steps: SGD with Nesterov momentum and weight decay, AdamW, or both."""
    learning_rate: float | None = None
    """Learning rate of those steps; by default one at which the first step changes no tensor by
    more than half a percent."""
    all: bool = False
    """Compare everything: --gradients --isolated --steps 5 --precision all. Without CKPT, for a
    set of networks with random weights."""
    precision: Literal["both", "float64", "float32", "bfloat16", "all"] = "both"
    """Precisions to compare; both is float64, which proves that the algorithms are the same, and
    float32. The truth is always PyTorch's float64."""
    rtol: float | None = None
    """Compare with a relative tolerance of your own, as numpy.allclose does, instead of PyTorch's
    own rounding."""
    atol: float | None = None
    """Absolute part of that tolerance."""
    conv_lowering: Literal["xla", "auto"] = "xla"
    """How Flax computes convolutions: as XLA does on every device, or on a CPU in the faster forms
    that train and predict use there."""

    def plan(self) -> Plan:
        """The plan of the comparison."""
        from flax_resblock.parity.comparison import Plan
        from flax_resblock.parity.oracle import Tolerance
        from flax_resblock.parity.trajectory import RECIPES

        rate = self.learning_rate
        if self.steps < 0 or (rate is not None and not 0 < rate < float("inf")):
            raise InputError(
                f"--steps {self.steps} must not be negative and --learning-rate {rate} must be "
                "positive."
            )
        given = [value for value in (self.rtol, self.atol) if value is not None]
        if not all(0 <= value < float("inf") for value in given):
            raise InputError(
                f"--rtol {self.rtol} and --atol {self.atol} must be numbers that are not negative."
            )
        if self.eval_only and self.steps:
            raise InputError(
                "--steps trains, and --eval-only asks for evaluation mode only; leave one of "
                "them out."
            )
        names = {"both": ("float64", "float32"), "all": ("float64", "float32", "bfloat16")}
        precision = "all" if self.all and self.precision == "both" else self.precision
        return Plan(
            train=not self.eval_only,
            gradients=self.gradients or self.all,
            isolated=self.isolated or self.all,
            steps=self.steps or (5 if self.all and not self.eval_only else 0),
            optimizers=tuple(RECIPES) if self.optimizer == "both" else (self.optimizer,),
            learning_rate=rate,
            precisions=names.get(precision, (precision,)),
            tolerance=Tolerance(self.rtol or 0.0, self.atol or 0.0) if given else None,
            conv_lowering=self.conv_lowering,
        )


@dataclass(frozen=True)
class DeviceFlags:
    """Where each side computes; float64 is always computed on the CPU."""

    device: str | None = None
    """Device of JAX: cpu, gpu or tpu."""
    torch_device: str | None = None
    """Device of PyTorch: cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True)
class ReportFlags:
    """What to report besides the summary."""

    slots: bool = False
    """Print every slot, not only the worst of each kind."""
    json: Annotated[Path | None, tyro.conf.arg(aliases=["--json-file"])] = None
    """Write every measurement to this file; docs/verification.md describes the fields."""
    html: Path | None = None
    """Write a report to this file, one self-contained page."""
    force: Force = False

    def check(self) -> None:
        """Raises InputError for files that exist, or packages that the report needs."""
        refuse_all_existing(self.force, self.json, self.html)
        needed = ("jinja2", "matplotlib") if self.html is not None else ()
        missing = [name for name in needed if find_spec(name) is None]
        if missing:
            raise MissingDependencyError(
                f"--html needs {' and '.join(missing)}: pip install 'flax-resblock[report]'. "
                f"--json writes the same figures without."
            )
