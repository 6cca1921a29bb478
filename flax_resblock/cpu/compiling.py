"""Options of XLA for programs that are compiled, run a few times and thrown away."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from typing import Any

import jax

from flax_resblock.cpu.switch import compiler_options, for_cpu

LEVEL = "xla_backend_optimization_level"
_IN_ORDER = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
_QUICKLY: dict[str, Any] = {
    LEVEL: 1,
    "xla_cpu_use_fusion_emitters": False,
    **_IN_ORDER,  # or all weights would be widened before the first is used
}


def _known(options: dict[str, Any]) -> Mapping[str, Any]:
    """Those of the options that this XLA knows."""

    def are_known(options: dict[str, Any]) -> bool:
        try:
            jax.jit(lambda x: x + 1, compiler_options=options).lower(0.0).compile()
        except jax.errors.JaxRuntimeError:
            return False
        return True

    if are_known(options):
        return options
    return {name: value for name, value in options.items() if are_known({name: value})}


@cache
def quick_options() -> Mapping[str, Any]:
    """Options of the compiler for programs that run a few times and compute little, as far as this
    XLA knows them. At level 0 a convolution in float64 runs ten times as long.
    """
    return _known(_QUICKLY)


@cache
def piece_options() -> Mapping[str, Any]:
    """:func:`quick_options` for programs that are small, of which two are compiled at a time."""
    return {**quick_options(), **_known({"xla_cpu_parallel_codegen_split_count": 1})}


@cache
def inference_options() -> Mapping[str, Any]:
    """Options of the compiler for inference on a CPU: those of training, and operations in the
    order that needs the least memory, which is as fast."""
    return {**compiler_options(), **_known(_IN_ORDER)}


def options_for(device: Any, *, light: bool = False) -> dict[str, Any]:
    """Options of the compiler for a program of a comparison, or of a few predictions.

    Args:
      device: Of jax that it runs on; None: the default device.
      light: A forward pass that runs once, which takes longer to optimise than to run.
    Returns:
      Those of training and inference where convolutions take their forms on a CPU; else
      :func:`quick_options` on a CPU, and none elsewhere.
    """
    platform = jax.default_backend() if device is None else device.platform
    if platform != "cpu":
        return {}
    if for_cpu():
        return compiler_options()
    options = dict(quick_options())
    return options | {name: 0 for name in options if light and name == LEVEL}


def give_memory_back() -> None:
    """Returns what was freed to the system, where the allocator is one that keeps it: a compiler
    frees tens of megabytes."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
