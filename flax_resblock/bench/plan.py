"""What is timed on an accelerator, in order of value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from flax_resblock.bench.cases import (
    COMPILED,
    EAGER,
    OURS,
    PLAIN,
    BenchCase,
    Contestant,
    Precision,
    Workload,
)

TOLERANCES: Mapping[Precision, float] = MappingProxyType(
    {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 2e-2}
)
"""Relative difference of losses or outputs above which two contestants did different work."""

JAX_FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "no-command-buffers": "--xla_gpu_enable_command_buffer=",
        "pdl": "--xla_gpu_enable_pdl=true",
        "wide-command-buffers": "--xla_gpu_enable_command_buffer="
        "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONVOLUTION",
        "conv-fusion": "--xla_gpu_experimental_enable_conv_fusion=true",
        "fusion-autotuner": "--xla_gpu_experimental_enable_fusion_autotuner=true",
        "latency-hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "cudnn-gemm-fusion": "--xla_gpu_cudnn_gemm_fusion_level=3",
        "no-triton-gemm": "--xla_gpu_enable_triton_gemm=false",
        "deterministic": "--xla_gpu_deterministic_ops=true",
    }
)
"""Options of XLA's compiler for GPUs that may change the speed of a step."""

GRAPH = Contestant("PyTorch, CUDA graph", "torch", "graph")
AUTOTUNED = Contestant("torch.compile, max-autotune", "torch", "max-autotune", late=True)


@dataclass(frozen=True)
class BenchPart:
    """A case and who computes it, by a name for ``--parts``. The other contestants are compared
    with the first."""

    name: str
    case: BenchCase
    contestants: tuple[Contestant, ...]


def with_flags(name: str) -> Contestant:
    """Our side with other options of XLA: a key of :data:`JAX_FLAGS`, or the options themselves."""
    return Contestant(f"flax-resblock, {name}", "jax", "auto", flags=JAX_FLAGS.get(name, name))


def parts_of(
    architecture: str, image_size: int, batches: Sequence[int], jax_flags: Sequence[str]
) -> list[BenchPart]:
    """Everything that can be timed, the most important first.

    Args:
      batches: Images per batch: the largest in every part, the others in parts of their own.
    """
    classes = 1000 if image_size > 64 else 10
    large, *others = sorted(batches, reverse=True)

    def case(what: Workload, precision: Precision, batch: int = large) -> BenchCase:
        return BenchCase(what, architecture, image_size, batch, classes, precision)

    usual, captured = (EAGER, COMPILED, OURS), (EAGER, GRAPH, OURS, AUTOTUNED)
    train, infer = case("train-step", "bfloat16"), case("inference", "bfloat16")
    sets = [jax_flags[n : n + _SETS] for n in range(0, len(jax_flags), _SETS)]
    return [
        BenchPart("train-bfloat16", train, (*usual, PLAIN)),
        BenchPart("inference-bfloat16", infer, usual),
        *(
            BenchPart(f"flags-{number}", train, (OURS, *map(with_flags, some)))
            for number, some in enumerate(sets, start=1)
        ),
        BenchPart("train-tf32", case("train-step", "tf32"), usual),
        BenchPart("train-float32", case("train-step", "float32"), usual),
        *(
            BenchPart(f"{name}-batch-{batch}", case(what, "bfloat16", batch), usual)
            for batch in others
            for name, what in _SMALL
        ),
        BenchPart("train-graphs", train, captured),
        BenchPart("inference-graphs", infer, captured),
        BenchPart("inference-tf32", case("inference", "tf32"), usual),
        BenchPart("inference-float32", case("inference", "float32"), usual),
    ]


_SETS = 4
"""Sets of options in one part, whose processes share the device's memory."""
_SMALL: tuple[tuple[str, Workload], ...] = (("train", "train-step"), ("inference", "inference"))
