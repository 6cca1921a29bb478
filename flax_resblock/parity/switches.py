"""Every switch of precision and determinism that the verifier sets, on both sides, by name and
value: so that a report of a device can say so.
"""

from __future__ import annotations

import os
from typing import Any

import jax
import torch

from flax_resblock.parity.precision import WORKSPACE, strict

XLA_FLAG = "--xla_gpu_deterministic_ops=true"
"""Of XLA for GPUs; the other compilers accept and ignore it."""


def make_xla_deterministic() -> None:
    """Adds :data:`XLA_FLAG` to ``XLA_FLAGS``. Works until jax starts its first backend; a person's
    own choice stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if XLA_FLAG.split("=")[0] not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {XLA_FLAG}".strip()


def in_force() -> dict[str, str]:
    """What :func:`flax_resblock.parity.precision.strict` sets, read back within it; and the flag of
    XLA.
    """
    backends: Any = torch.backends
    with strict():
        return {
            "jax default_matmul_precision": str(jax.config.jax_default_matmul_precision),  # pyright: ignore[reportAttributeAccessIssue]
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
            "torch fp32_precision": backends.fp32_precision,
            "torch cudnn.conv": backends.cudnn.conv.fp32_precision,
            "torch cuda.matmul": backends.cuda.matmul.fp32_precision,
            "torch mkldnn.conv": backends.mkldnn.conv.fp32_precision,
            "torch deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
            "torch cudnn.benchmark": str(backends.cudnn.benchmark),
            WORKSPACE: os.environ.get(WORKSPACE, ""),
        }


def sentence() -> str:
    """``"set on both sides: jax default_matmul_precision highest, ..."``."""
    return "set on both sides: " + ", ".join(
        f"{name} {value}" for name, value in in_force().items() if value
    )
