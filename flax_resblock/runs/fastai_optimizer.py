"""fastai's own Adam and Lamb, whose state dict is not torch's.

It has a list of hyper-parameters per group and a list of states per parameter. Its Adam computes
what torch's Adam and AdamW compute, and its Lamb what timm's does with other options. All of them
keep the same entries. Its other optimizers are told apart by theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flax_resblock.errors import CheckpointError
from flax_resblock.runs.param_groups import WEIGHTS_ONLY

FORM = "fastai"
"""Option of a param group that holds what goes back to fastai; no update depends on it."""
ASSUMED = (
    "assumed, as fastai's file does not show it: its Adam with decoupled weight decay, the default "
    "of a Learner; `optimizer='adam'` if it was made with decouple_wd=False, `optimizer='lamb'` if "
    "it is its Lamb"
)
_TENSORS = {"grad_avg": "exp_avg", "sqr_avg": "exp_avg_sq"}
_HYPERS = {"lr", "mom", "sqr_mom", "eps", "wd"}
_FLAGS = {"do_wd", "force_train"}
_KIND = "kind"
"""Entry of the state by which this library says which optimizer it is of; fastai passes it by."""
_KINDS: Mapping[str, Mapping[str, Any]] = {
    "adam": {"amsgrad": False, "decoupled_weight_decay": False},
    "adamw": {"amsgrad": False, "decoupled_weight_decay": True},
    "lamb": {"bias_correction": True, "grad_averaging": True, "max_grad_norm": None}
    | {"trust_clip": 10.0, "always_adapt": True, "decoupled_decay": True},
}


def as_torch(
    state: Mapping[str, Any], kind: str | None, source: str
) -> tuple[dict[str, Any], str, bool]:
    """The state dict of torch's Adam or AdamW, or timm's Lamb, that goes on as fastai's would
    (``{"state": [...], "hypers": [...]}``, the states of all groups one after the other); the
    optimizer's kind; and whether that was assumed. Raises CheckpointError for another optimizer, or
    several groups, of which the state does not say which parameters they have."""
    hypers, states = list(state["hypers"]), list(state["state"])
    kept = {key for one in states for key in one} - _FLAGS
    own, wrappers = dict(hypers[0]), set(map(str, state)) - {"hypers", "state", _KIND}
    if wrappers or kept != {*_TENSORS, "step"} or set(own) != _HYPERS:
        wrapped = f", inside an optimizer that keeps {', '.join(sorted(wrappers))}"
        raise CheckpointError(
            f"{source} is of fastai's own optimizers, of which Adam and Lamb have a counterpart. "
            f"It keeps {', '.join(sorted(kept)) or 'nothing'} per parameter, and its options "
            f"are {', '.join(sorted(own))}{wrapped if wrappers else ''}. {WEIGHTS_ONLY}"
        )
    said = kind or state.get(_KIND)
    if said is not None and said not in _KINDS:
        raise CheckpointError(
            f"{source} is fastai's Adam or Lamb by what it keeps, and not {said}. Say one of "
            f"{', '.join(_KINDS)}."
        )
    if any(one != own for one in hypers):
        raise CheckpointError(
            f"{source} has {len(hypers)} groups with different options, and does not say which "
            f"parameters belong to which. Train them alike, or with OptimWrapper. {WEIGHTS_ONLY}"
        )
    steps = {int(one["step"]) for one in states if "step" in one}
    if len(steps) > 1:
        raise CheckpointError(
            f"{source} has parameters that were updated a different number of times "
            f"({', '.join(map(str, sorted(steps)))}); a run in JAX counts once for all of them. "
            f"{WEIGHTS_ONLY}"
        )
    count = np.asarray(steps.pop(), np.float32)
    flags = [{key: value for key, value in one.items() if key in _FLAGS} for one in states]
    options = {"lr": own["lr"], "betas": (own["mom"], own["sqr_mom"]), "eps": own["eps"]}
    options |= _KINDS[said or "adamw"]
    options[FORM] = {"lists": len(hypers), "wd": own["wd"], "flags": flags}
    of_group, of_parameter = {}, {"step": count}
    if said == "lamb":
        of_group, of_parameter = {"step": int(count)}, {}
    members = {True: list[int](), False: list[int]()}
    for number, one in enumerate(flags):
        members[bool(one.get("do_wd", True))].append(number)
    groups = [
        {**options, **of_group, "weight_decay": own["wd"] if decays else 0.0, "params": numbers}
        for decays, numbers in members.items()
        if numbers
    ]
    per_parameter = {
        number: {**of_parameter, **{theirs: one[ours] for ours, theirs in _TENSORS.items()}}
        for number, one in enumerate(states)
        if "step" in one
    }
    found = "timm-lamb" if said == "lamb" else said or "adamw"
    return {"state": per_parameter, "param_groups": groups}, found, said is None


def from_torch(state: Mapping[str, Any], order: Sequence[int], kind: str) -> dict[str, Any]:
    """The inverse of :func:`as_torch`.

    Args:
      state: Of torch's optimizer.
      order: The numbers of its parameters in the model's order.
      kind: Of the optimizer.
    """
    group = state["param_groups"][0]
    (mom, sqr_mom), own = group["betas"], group[FORM]
    hypers = {"wd": own["wd"], "sqr_mom": sqr_mom, "lr": group["lr"], "mom": mom}
    states = []
    for number, flags in zip(order, own["flags"], strict=True):
        kept, tensors = state["state"].get(number, {}), {}
        if kept:
            step = int(float(kept.get("step", group.get("step", 0))))
            tensors = {ours: kept[theirs] for ours, theirs in _TENSORS.items()} | {"step": step}
        states.append({**flags, **tensors})
    lists = [{**hypers, "eps": group["eps"]} for _ in range(own["lists"])]
    return {"state": states, "hypers": lists, _KIND: "lamb" if kind == "timm-lamb" else kind}
