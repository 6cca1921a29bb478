"""Whether a computation is traced in the form that is fastest on a CPU, and the options of XLA that
belong to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, cast, get_args

import jax

Lowering = Literal["auto", "xla"]

ENVIRONMENT = "FLAX_RESBLOCK_CONV_LOWERING"


def known(lowering: str) -> Lowering:
    """The argument.

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


@contextmanager
def conv_lowering(lowering: Lowering) -> Iterator[None]:
    """Within it everything that is traced is lowered so: ``"auto"``, or ``"xla"`` for what any
    other backend gets, on a CPU too.

    The environment variable ``FLAX_RESBLOCK_CONV_LOWERING`` sets the same for a whole process. A
    function that was compiled before keeps what it has. A module with ``conv_lowering="xla"`` stays
    plain within ``conv_lowering("auto")``."""
    token = _lowering.set(known(lowering))
    try:
        yield
    finally:
        _lowering.reset(token)


def for_cpu(lowering: Lowering = "auto") -> bool:
    """Whether what is traced now is for a CPU and may take its own form there."""
    return lowering == "auto" and _lowering.get() == "auto" and jax.default_backend() == "cpu"


def compiler_options() -> dict[str, str]:
    """Options for ``jax.jit(..., compiler_options=...)``: on a CPU, products and sums in XLA's own
    library of kernels, elsewhere none.

    With them the same network runs 1.2 times as fast. Its kernels for single convolutions are left
    off, which are slower than the forms used here."""
    if not for_cpu():
        return {}
    return {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    }
