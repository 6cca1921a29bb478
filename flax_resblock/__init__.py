"""Residual networks in Flax that are PyTorch's, number for number; and the converter and the proofs that say so.

Names are imported on first use, so that ``import flax_resblock`` costs nothing and the command line starts at once. torch is never imported here.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from flax_resblock.architecture import BlockConfig, ResNetConfig, architectures
    from flax_resblock.blocks import BottleneckBlock, ResidualBlock
    from flax_resblock.errors import CheckpointError, InputError
    from flax_resblock.inference import compile_inference
    from flax_resblock.lowering.switch import compiler_options, conv_lowering
    from flax_resblock.norm import BatchNorm
    from flax_resblock.resnet import ResNet, create
    from flax_resblock.transfer import from_torch, load, load_run, save, to_torch

__all__ = [
    "BatchNorm",
    "BlockConfig",
    "BottleneckBlock",
    "CheckpointError",
    "InputError",
    "ResNet",
    "ResNetConfig",
    "ResidualBlock",
    "architectures",
    "compile_inference",
    "compiler_options",
    "conv_lowering",
    "create",
    "from_torch",
    "load",
    "load_run",
    "save",
    "to_torch",
]

_MODULES = {
    "architecture": ("BlockConfig", "ResNetConfig", "architectures"),
    "blocks": ("BottleneckBlock", "ResidualBlock"),
    "errors": ("CheckpointError", "InputError"),
    "inference": ("compile_inference",),
    "lowering.switch": ("compiler_options", "conv_lowering"),
    "norm": ("BatchNorm",),
    "resnet": ("ResNet", "create"),
    "transfer": ("from_torch", "load", "load_run", "save", "to_torch"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flax_resblock' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"flax_resblock.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
