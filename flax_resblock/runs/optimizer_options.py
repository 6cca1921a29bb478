"""Which optimizer a state dict is of, by the options of its param groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import Any

from flax_resblock.errors import CheckpointError, some
from flax_resblock.runs.optimizer_kinds import OPTIMIZERS, OptimizerKind
from flax_resblock.runs.param_groups import WEIGHTS_ONLY


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
    found = [name for name, row in OPTIMIZERS.items() if row.package and _fits(row, options)]
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
    known = ", ".join(name for name, row in OPTIMIZERS.items() if row.package)
    raise CheckpointError(
        f"{source} is no optimizer with a counterpart here ({known}): its options are "
        f"{some(sorted(options - {'params'}))}. {WEIGHTS_ONLY}"
    )


def _fits(row: OptimizerKind, options: Set[str]) -> bool:
    step = {"step"} if row.counts_in_group else set()
    return row.options.keys() <= options <= row.known | step


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
        step = {"step"} if row.counts_in_group else set()
        missing = [name for name in row.options if name not in group]
        other = set(group) - row.known - step
        if missing or other:
            extra = f"has options that {kind} does not know: {some(sorted(other))}"
            words = f"lacks {some(missing)}" if missing else extra
            raise CheckpointError(f"{where} {words}. {WEIGHTS_ONLY}")
