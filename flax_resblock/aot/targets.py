"""The chips that can be compiled for, and their names: ``tpu:v5e:2x2``, ``tpu:v4``,
``cuda:h100:8``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from flax_resblock.errors import InputError

ProductKind = Literal["convolution", "product"]


@dataclass(frozen=True)
class Tpu:
    """A generation of TPU.

    Attributes:
      compiler_name: As libtpu spells it.
      topology: One host's chips, which is the default.
      memory: Bytes that a program may use on each device, according to the compiler. A chip of v4
        and of 7x is two devices.
    """

    compiler_name: str
    topology: str
    memory: int


_KIB, _MIB, _GIB = 2**10, 2**20, 2**30

TPUS: Mapping[str, Tpu] = MappingProxyType(
    {
        "v4": Tpu("v4", "2x2x1", int(15.25 * _GIB)),
        "v5e": Tpu("v5e", "2x2", int(15.75 * _GIB)),
        "v5p": Tpu("v5p", "2x2x1", int(95.74 * _GIB)),
        "v6e": Tpu("v6e", "2x2", int(31.25 * _GIB)),
        "7x": Tpu("tpu7x", "2x2x1", int(94.75 * _GIB)),
    }
)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, from its data sheet and the CUDA programming guide's table of compute
    capabilities.

    Attributes:
      fp32_lanes: float32 units per multiprocessor.
      threads: Resident per multiprocessor.
      shared_memory: Bytes per multiprocessor.
      l2_cache, memory: Bytes.
      bandwidth: Bytes per second.
      clock: Of the boost, GHz.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    fp32_lanes: int
    threads: int
    shared_memory: int
    l2_cache: int
    memory: int
    bandwidth: float
    clock: float

    def description(self) -> str:
        """A ``GpuTargetConfigProto`` in text form, for XLA's CUDA compiler."""
        major, minor = self.capability
        reserved = 1024  # of shared memory per block, by the driver
        fields = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 48 * 1024,
            "shared_memory_per_block_optin": self.shared_memory - reserved,
            "shared_memory_per_core": self.shared_memory,
            "threads_per_core_limit": self.threads,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.fp32_lanes,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "memory_bandwidth": int(self.bandwidth),
            "l2_cache_size": self.l2_cache,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
        }
        lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
        capability = f"  cuda_compute_capability {{ major: {major} minor: {minor} }}"
        cudnn = "dnn_version_info { major: 9 minor: 8 patch: 0 }"
        return (
            f"gpu_device_info {{\n{lines}\n{capability}\n}}\nplatform_name: "
            f'"CUDA"\n{cudnn}\ndevice_description_str: "{self.name}"\n'
        )


_A100_CORES, _L4_CORES = ((8, 0), 108, 64, 2048), ((8, 9), 58, 128, 1536)
_H100_CORES = (9, 0), 132, 128, 2048
_A100 = Gpu("NVIDIA A100 SXM 80GB", *_A100_CORES, 164 * _KIB, 40 * _MIB, 80 * _GIB, 2.039e12, 1.41)
_L4 = Gpu("NVIDIA L4", *_L4_CORES, 100 * _KIB, 48 * _MIB, 24 * _GIB, 0.3e12, 2.04)
_H100 = Gpu("NVIDIA H100 SXM", *_H100_CORES, 228 * _KIB, 50 * _MIB, 80 * _GIB, 3.35e12, 1.98)
_H200 = replace(_H100, name="NVIDIA H200 SXM", memory=141 * _GIB, bandwidth=4.8e12)

GPUS: Mapping[str, Gpu] = MappingProxyType({"a100": _A100, "l4": _L4, "h100": _H100, "h200": _H200})
CHIPS: Mapping[str, Mapping[str, Tpu | Gpu]] = MappingProxyType({"tpu": TPUS, "cuda": GPUS})
"""By platform and name."""

_OF_A_TPU = {"default": "bfloat16", "high": "three bfloat16 passes", "highest": "float32"}

ARITHMETIC: Mapping[tuple[str, ProductKind], Mapping[str, str]] = MappingProxyType(
    {
        ("tpu", "convolution"): _OF_A_TPU,
        ("tpu", "product"): _OF_A_TPU,
        ("cuda", "convolution"): {"default": "TF32", "high": "TF32", "highest": "float32"},
        ("cuda", "product"): {"default": "TF32", "high": "float32", "highest": "float32"},
    }
)
"""The arithmetic for float32 operands, by platform and kind, for each precision."""


@dataclass(frozen=True)
class Target:
    """What to compile for.

    Attributes:
      platform: ``"tpu"`` or ``"cuda"``.
      chip: Key of :data:`TPUS` or :data:`GPUS`.
      topology: Of a TPU slice, ``"2x2"``; of GPUs how many there are, ``"8"``.
    """

    platform: Literal["tpu", "cuda"]
    chip: str
    topology: str

    def __str__(self) -> str:
        return f"{self.platform}:{self.chip}:{self.topology}"


def parse_target(name: str) -> Target:
    """The target of a name such as ``tpu:v5e:2x2`` or ``cuda:a100``. Without a topology it is one
    TPU host or one GPU.

    Raises:
      InputError: There is no such platform, chip or topology.
    """
    platform, chip, topology, *more = [*name.lower().split(":"), "", ""]
    if platform == "tpu" and chip in TPUS and not any(more):
        usual = TPUS[chip].topology
        topology, more_axes = topology or usual, usual.count("x")
        if re.fullmatch(rf"[1-9]\d*(x[1-9]\d*){{{more_axes}}}", topology):
            return Target("tpu", chip, topology)
        raise InputError(
            f"target {name!r}: {topology!r} is no topology of a TPU {chip}, which has "
            f"{more_axes + 1} dimensions. Write tpu:{chip}:{usual}."
        )
    if platform == "cuda" and chip in GPUS and not any(more):
        topology = topology or "1"
        if re.fullmatch(r"[1-9]\d{0,3}", topology):
            return Target("cuda", chip, topology)
        raise InputError(
            f"target {name!r}: {topology!r} is no number of GPUs. Write cuda:{chip}:8."
        )
    known = [f"tpu:{chip}" for chip in TPUS] + [f"cuda:{chip}" for chip in GPUS]
    raise InputError(
        f"target {name!r} is unknown. Known: {', '.join(known)}; with a topology tpu:v5e:2x2, "
        f"with a number of GPUs cuda:h100:8."
    )
