"""Whether traced code takes the forms of :mod:`flax_resblock.cpu`; XLA's options for them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any, cast, get_args

import jax

from flax_resblock.config import Lowering

ENVIRONMENT = "FLAX_RESBLOCK_CONV_LOWERING"
_FUSIONS = ("LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT", "LIBRARY_FUSION_TYPE_REDUCE")
_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": ",".join(_FUSIONS)}


def known(lowering: str) -> Lowering:
    """Returns ``lowering`` if it is one.

    Raises:
      ValueError: There is no such lowering.
    """
    if lowering not in get_args(Lowering):
        raise ValueError(
            f"conv_lowering {lowering!r} is unknown; choose from {', '.join(get_args(Lowering))}."
        )
    return cast(Lowering, lowering)


_DEFAULT: Lowering = known(os.environ.get(ENVIRONMENT) or "auto")
_lowering: ContextVar[Lowering] = ContextVar("conv_lowering", default=_DEFAULT)
_platform: ContextVar[str | None] = ContextVar("platform", default=None)


@contextmanager
def _within(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def conv_lowering(lowering: Lowering) -> AbstractContextManager[None]:
    """Sets how convolutions are lowered in code that is traced in this context.

    The environment variable ``FLAX_RESBLOCK_CONV_LOWERING`` sets the same for a whole process. A
    function that is already compiled does not change. A module with ``conv_lowering="xla"`` stays
    plain within ``conv_lowering("auto")``.

    Args:
      lowering: ``"auto"`` takes the fastest form on a CPU; ``"xla"`` takes XLA's own operations, as
        on every other platform.
    Raises:
      ValueError: There is no such lowering.
    """
    return _within(_lowering, known(lowering))


def traced_for(platform: str) -> AbstractContextManager[None]:
    """Code that is traced in this context takes the forms of another platform than the one that
    this process computes on: ``"cuda"``, ``"tpu"``."""
    return _within(_platform, platform)


def _is_cpu() -> bool:
    return (_platform.get() or jax.default_backend()) == "cpu"


def forms(lowering: Lowering = "auto") -> ModuleType | None:
    """:mod:`flax_resblock.cpu.forms` if code that is traced now is for a CPU and takes its own
    forms there; None if it takes XLA's operations."""
    if lowering != "auto" or _lowering.get() != "auto" or not _is_cpu():
        return None
    return _working_forms()


def on_accelerator(lowering: Lowering = "auto") -> bool:
    """Whether code that is traced now is for a GPU or TPU and may compute what jax derives, such as
    the gradient of a norm, with fewer passes over memory. Arguments as for :func:`forms`."""
    return lowering == _lowering.get() == "auto" and not _is_cpu()


def in_memory(x: jax.Array) -> jax.Array:
    """``x``, which a program for a CPU computes once and keeps, whatever the lowering of
    convolutions. XLA may compute a value again wherever it is used, and round it otherwise."""
    forms = _working_forms() if _is_cpu() else None
    return x if forms is None else forms.materialised(x)


def for_cpu(lowering: Lowering = "auto") -> bool:
    """Whether :func:`forms` returns the forms."""
    return forms(lowering) is not None


@cache
def _working_forms() -> ModuleType | None:
    """The forms, or None after a warning if this JAX lacks something that they need. The trial runs
    in a thread of its own, which knows nothing of the function that is being traced here.
    """
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_tried_forms).result()
    except Exception as error:  # whatever a private interface raises when it has changed
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        warnings.warn(
            f"jax {jax.__version__} lacks what flax-resblock's forms for CPUs need ({reason}). "
            f"Convolutions are computed by XLA's own operations: results are as correct, a "
            f"training step takes about twice as long. Set {ENVIRONMENT}=xla to choose this "
            f"without a warning, or install a jax that docs/performance.md names.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _tried_forms() -> ModuleType:
    from flax_resblock.cpu import forms

    forms.compile_example(_OPTIONS)
    return forms


def compiler_options() -> dict[str, str]:
    """Options for ``jax.jit(..., compiler_options=...)``. On a CPU they turn on XLA's own library
    of kernels for products and sums; elsewhere there are none.

    A network runs 1.2 times as fast with them. The library's kernels for single convolutions stay
    off: they are slower than the forms used here.
    """
    return dict(_OPTIONS) if for_cpu() else {}
