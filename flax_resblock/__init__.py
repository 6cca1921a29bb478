"""Residual networks in Flax that compute what their PyTorch originals compute, and a converter that
moves weights and training runs between the two frameworks and proves that nothing changed.

Names are imported on first use, so that ``import flax_resblock`` costs nothing and the command line
starts at once. torch is never imported here."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flax_resblock._lazy import lazily
from flax_resblock._version import __version__

if TYPE_CHECKING:
    from flax_resblock.checkpoint import Limits
    from flax_resblock.config import BlockConfig, ResNetConfig, architectures
    from flax_resblock.convert import NAMINGS, Naming
    from flax_resblock.cpu.switch import compiler_options, conv_lowering
    from flax_resblock.errors import (
        AssumptionWarning,
        CheckpointError,
        InputError,
        PortedWarning,
    )
    from flax_resblock.export.inference import compile_inference
    from flax_resblock.images import preprocess
    from flax_resblock.io import create, from_torch, load, load_run, save, to_torch
    from flax_resblock.nn.blocks import BottleneckBlock, ResidualBlock
    from flax_resblock.nn.norm import BatchNorm
    from flax_resblock.nn.resnet import ResNet
    from flax_resblock.port.folder import load_ported, ported_state_dict
    from flax_resblock.port.network import PortedNetwork
    from flax_resblock.port.porting import port
    from flax_resblock.runs.optimizers import optimizer_of
    from flax_resblock.runs.own import load_run_into
    from flax_resblock.runs.run import Run

__all__ = [
    "NAMINGS", "AssumptionWarning", "BatchNorm", "BlockConfig", "BottleneckBlock",
    "CheckpointError", "InputError", "Limits", "Naming", "PortedNetwork", "PortedWarning",
    "ResNet", "ResNetConfig", "ResidualBlock", "Run", "__version__", "architectures",
    "compile_inference", "compiler_options", "conv_lowering", "create", "from_torch", "load",
    "load_ported", "load_run", "load_run_into", "optimizer_of", "port", "ported_state_dict",
    "preprocess", "save", "to_torch",
]  # fmt: skip

_imported, __dir__ = lazily(
    __name__,
    {
        "checkpoint": "Limits",
        "convert": "NAMINGS Naming",
        "runs.optimizers": "optimizer_of",
        "runs.own": "load_run_into",
        "runs.run": "Run",
        "config": "BlockConfig ResNetConfig architectures",
        "nn.blocks": "BottleneckBlock ResidualBlock",
        "errors": "AssumptionWarning CheckpointError InputError PortedWarning",
        "images": "preprocess",
        "export.inference": "compile_inference",
        "cpu.switch": "compiler_options conv_lowering",
        "nn.norm": "BatchNorm",
        "nn.resnet": "ResNet",
        "port.folder": "load_ported ported_state_dict",
        "port.network": "PortedNetwork",
        "io": "create from_torch load load_run save to_torch",
    },
)


def __getattr__(name: str) -> Any:
    if name == "port":  # a package that can be called, so that it is not replaced by a function
        return importlib.import_module("flax_resblock.port")
    return _imported(name)
