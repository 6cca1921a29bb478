"""The optimizers that both frameworks have: what each keeps and which options decide its update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs.param_groups import WEIGHTS_ONLY


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that both frameworks have.

    Attributes:
      tensors: What it keeps per parameter, by torch's names.
      options: The options that decide its update, with torch's defaults (optax's where torch does
        not have the optimizer).
      later: More of them, which files of an older torch lack, with the values that they had.
      only: Options that are supported at this one value.
      flags: Options that change how torch computes and not what; they are kept for the way back.
      needs: Tensors that only groups with an option have, and the option.
      scalars: Tensors that are one number, whatever the shape of the parameter.
      begins: Values of tensors before the first step, where they are not 0: a number, or an option.
      counts: Whether it counts its steps, as Adam does.
      package: Where it comes from; None where only JAX has it.
      counts_in_group: Whether it counts them once per param group.
      adaptive: Whether the update of a kernel is scaled by the ratio of the kernel's norm to the
        update's own (the options ``trust_coefficient`` and, for LARS, ``eps``; 0 switches it off).
    """

    tensors: tuple[str, ...]
    options: Mapping[str, Any]
    later: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    flags: Mapping[str, Any] = field(default_factory=dict)
    needs: Mapping[str, str] = field(default_factory=dict)
    scalars: tuple[str, ...] = ()
    begins: Mapping[str, float | str] = field(default_factory=dict)
    counts: bool = True
    package: str | None = "torch.optim"
    counts_in_group: bool = False
    adaptive: bool = False

    @property
    def known(self) -> set[str]:
        """Every option that it may have."""
        step = ("step",) if self.counts_in_group else ()
        return {*self.options, *self.later, *self.only, *self.flags, *NOT_COMPUTED, *step}

    def has(self, tensor: str, options: Mapping[str, Any]) -> bool:
        """Whether parameters of a group with these options have a tensor."""
        return tensor not in self.needs or bool(options.get(self.needs[tensor]))

    def buffered(self, options: Mapping[str, Any]) -> bool:
        """Whether parameters of a group with these options have any."""
        return any(self.has(tensor, options) for tensor in self.tensors)

    def beginning(self, tensor: str, options: Mapping[str, Any]) -> float:
        """The value of a tensor before the first step."""
        value = self.begins.get(tensor, 0.0)
        return float(options[value] if isinstance(value, str) else value)


NOT_COMPUTED = frozenset(
    {
        *("foreach", "fused", "capturable", "differentiable", "swap_params"),
        *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "lr_scale"),
        *("params", "param_names", "group_name", "param_group", "name"),
        *("max_lr_snapshot", "fastai"),
    }
)
"""Entries of a param group that the update does not depend on: torch's flags, what a scheduler
keeps there, the parameters and their names, and what goes back to fastai."""

_FLAGS = {"foreach": None, "differentiable": False, "fused": None}
_CAPTURABLE = {"foreach": None, "differentiable": False, "capturable": False}
_MOMENTUM, _MOMENTS = ("momentum_buffer",), ("exp_avg", "exp_avg_sq")
_BETAS = {"betas": (0.9, 0.999), "eps": 1e-8}
_DECOUPLED = {"decoupled_weight_decay": False}
_BY_MOMENTUM = {"momentum_buffer": "momentum"}


def _torch(
    tensors: tuple[str, ...],
    options: Mapping[str, Any],
    flags: Mapping[str, Any] = MappingProxyType(_CAPTURABLE),
    later: Mapping[str, Any] = MappingProxyType({}),
    **others: Any,
) -> OptimizerKind:
    """One of torch.optim, which all have ``maximize`` by now."""
    return OptimizerKind(tensors, options, {"maximize": False, **later}, flags=flags, **others)


def _adam(decay: float, decoupled: bool) -> OptimizerKind:
    return _torch(
        (*_MOMENTS, "max_exp_avg_sq"),
        {"lr": 1e-3, **_BETAS, "weight_decay": decay, "amsgrad": False},
        {**_FLAGS, "capturable": False, "decoupled_weight_decay": decoupled},
        needs={"max_exp_avg_sq": "amsgrad"},
    )


OPTIMIZERS: Mapping[str, OptimizerKind] = MappingProxyType(
    {
        "sgd": _torch(
            _MOMENTUM,
            {"lr": 1e-3, "momentum": 0, "nesterov": False, "weight_decay": 0, "dampening": 0},
            _FLAGS,
            needs=_BY_MOMENTUM,
            counts=False,
        ),
        "adam": _adam(0, decoupled=False),
        "adamw": _adam(1e-2, decoupled=True),
        "rmsprop": _torch(
            ("square_avg", "momentum_buffer", "grad_avg"),
            {"lr": 1e-2, "momentum": 0, "alpha": 0.99, "eps": 1e-8, "centered": False}
            | {"weight_decay": 0},
            needs={"grad_avg": "centered", **_BY_MOMENTUM},
        ),
        "adagrad": _torch(
            ("sum",),
            {"lr": 1e-2, "lr_decay": 0, "eps": 1e-10, "weight_decay": 0}
            | {"initial_accumulator_value": 0},
            _FLAGS,
            begins={"sum": "initial_accumulator_value"},
        ),
        "adadelta": _torch(
            ("square_avg", "acc_delta"), {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0}
        ),
        "adamax": _torch(("exp_avg", "exp_inf"), {"lr": 2e-3, **_BETAS, "weight_decay": 0}),
        "nadam": _torch(
            ("mu_product", *_MOMENTS),
            {"lr": 2e-3, **_BETAS, "weight_decay": 0, "momentum_decay": 4e-3},
            later=_DECOUPLED,
            scalars=("mu_product",),
            begins={"mu_product": 1.0},
        ),
        "radam": _torch(_MOMENTS, {"lr": 1e-3, **_BETAS, "weight_decay": 0}, later=_DECOUPLED),
        "timm-lars": OptimizerKind(
            _MOMENTUM,
            {"lr": 1.0, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
            | {"trust_coeff": 0.001, "eps": 1e-8, "trust_clip": False, "always_adapt": False},
            flags={"foreach": None},
            needs=_BY_MOMENTUM,
            counts=False,
            package="timm.optim",
        ),
        "timm-lamb": OptimizerKind(
            _MOMENTS,
            {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-6}
            | {"weight_decay": 0.01, "grad_averaging": True, "max_grad_norm": 1.0}
            | {"trust_clip": False, "always_adapt": False},
            later={"decoupled_decay": False},
            only={"caution": False, "corrected_weight_decay": False},
            flags={"foreach": None},
            package="timm.optim",
            counts_in_group=True,
        ),
        "lars": OptimizerKind(
            _MOMENTUM,
            {"lr": 1.0, "momentum": 0.9, "nesterov": False, "weight_decay": 0}
            | {"trust_coefficient": 0.001, "eps": 0.0},
            needs=_BY_MOMENTUM,
            counts=False,
            package=None,
            adaptive=True,
        ),
        "lamb": OptimizerKind(
            _MOMENTS,
            {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0}
            | {"trust_coefficient": 1.0},
            package=None,
            adaptive=True,
        ),
    }
)
"""Every optimizer that a run can have, by name."""


def read_kind(
    groups: Sequence[Mapping[str, Any]], kept: set[str], kind: str | None, source: str
) -> str:
    """The key of :data:`~flax_resblock.runs.optimizer_kinds.OPTIMIZERS` of param groups that keep
    tensors of these names; ``kind``, what the caller says, is checked. Raises CheckpointError for
    none, several, or one with options that have no counterpart."""
    kind = _kind(groups, kept, kind, source)
    _check_options(groups, kind, source)
    return kind


def _kind(
    groups: Sequence[Mapping[str, Any]], kept: set[str], kind: str | None, source: str
) -> str:
    options = groups[0].keys()
    if kind is not None:
        if kind not in OPTIMIZERS:
            raise CheckpointError(
                f"{source}: optimizer {kind!r} is unknown; known: {', '.join(OPTIMIZERS)}."
            )
        return kind
    rows = {name: row for name, row in OPTIMIZERS.items() if row.package}
    found = [name for name, row in rows.items() if row.options.keys() <= options <= row.known]
    if len(found) > 1:  # RAdam and Adamax of an older torch
        found = [name for name in found if kept <= {"step", *OPTIMIZERS[name].tensors}] or found
    if found == ["adam", "adamw"]:
        if "decoupled_weight_decay" in options:
            return "adamw" if groups[0]["decoupled_weight_decay"] else "adam"
        if all(not group["weight_decay"] for group in groups):
            return "adam"  # without decay the two are the same
        raise CheckpointError(
            f"{source} is Adam or AdamW, which torch before 2.6 writes alike; they decay "
            f"differently. Say which: `optimizer='adam'` or `optimizer='adamw'`."
        )
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{source} is of one of these: {', '.join(found)}, which have the same options. Say "
            "which with optimizer=... in Python."
        )
    raise CheckpointError(
        f"{source} is no optimizer with a counterpart here ({', '.join(rows)}): its options are "
        f"{some(sorted(options - {'params'}))}. {WEIGHTS_ONLY}"
    )


def _check_options(groups: Sequence[Mapping[str, Any]], kind: str, source: str) -> None:
    row = OPTIMIZERS[kind]
    for number, group in enumerate(groups):
        where = f"{source}, param group {number}"
        for name, value in row.only.items():
            if group.get(name, value) != value:
                raise CheckpointError(
                    f"{where}: {name}={group[name]!r} has no counterpart here (only "
                    f"{name}={value!r}). {WEIGHTS_ONLY}"
                )
        missing = [name for name in row.options if name not in group]
        other = set(group) - row.known
        if missing or other:
            extra = f"has options that {kind} does not know: {some(sorted(other))}"
            words = f"lacks {some(missing)}" if missing else extra
            raise CheckpointError(f"{where} {words}. {WEIGHTS_ONLY}")
