"""The optimizers that both frameworks have: what each keeps and which options decide its update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that both frameworks have.

    Attributes:
      tensors: What it keeps per parameter, by torch's names.
      options: The options that decide its update, with torch's defaults (optax's where torch does
        not have the optimizer).
      only: Options that are supported at this one value.
      flags: Options that change how torch computes and not what; they are kept for the way back.
      in_torch: Whether ``torch.optim`` has it.
      adaptive: Whether the update of a kernel is scaled by the ratio of the kernel's norm to the
        update's own (the options ``trust_coefficient`` and, for LARS, ``eps``; 0 switches it off).
    """

    tensors: tuple[str, ...]
    options: Mapping[str, Any]
    only: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    in_torch: bool = True
    adaptive: bool = False

    @property
    def counts(self) -> bool:
        """Whether it counts its steps, as Adam does."""
        return "exp_avg" in self.tensors

    def buffered(self, options: Mapping[str, Any]) -> bool:
        """Whether parameters of a group with these options have tensors."""
        return self.counts or bool(options["momentum"])


_FLAGS = {"foreach": None, "differentiable": False, "fused": None}
_MOMENTUM, _MOMENTS = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")


def _adam(decay: float, decoupled: bool) -> OptimizerKind:
    return OptimizerKind(
        _MOMENTS,
        {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay},
        only={"amsgrad": False, "maximize": False},
        flags={**_FLAGS, "capturable": False, "decoupled_weight_decay": decoupled},
    )


OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "sgd": OptimizerKind(
            _MOMENTUM,
            {"lr": 1e-3, "momentum": 0, "nesterov": False, "weight_decay": 0},
            only={"dampening": 0, "maximize": False},
            flags=_FLAGS,
        ),
        "adam": _adam(0, decoupled=False),
        "adamw": _adam(1e-2, decoupled=True),
        "lars": OptimizerKind(
            _MOMENTUM,
            {"lr": 1.0, "momentum": 0.9, "nesterov": False, "weight_decay": 0}
            | {"trust_coefficient": 0.001, "eps": 0.0},
            in_torch=False,
            adaptive=True,
        ),
        "lamb": OptimizerKind(
            _MOMENTS,
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0}
            | {"trust_coefficient": 1.0},
            in_torch=False,
            adaptive=True,
        ),
    }
)
"""Every optimizer that a run can have, by name."""

NOT_COMPUTED = frozenset(
    {
        *("foreach", "fused", "capturable", "differentiable", "swap_params"),
        *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"),
        *("params", "param_names", "decoupled_weight_decay"),
    }
)
"""Entries of a param group that the update does not depend on: torch's flags, what a scheduler
keeps there, and the parameters themselves.
"""
