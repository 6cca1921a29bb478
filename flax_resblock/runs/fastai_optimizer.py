"""fastai's own Adam, whose state dict is not torch's.

It has a list of hyper-parameters per group and a list of states per parameter. Its Adam computes
what torch's Adam and AdamW compute. Its Lamb keeps the same entries, so the caller has to say
which it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_resblock.errors import CheckpointError

_TENSORS = {"grad_avg": "exp_avg", "sqr_avg": "exp_avg_sq"}
_HYPERS = {"lr", "mom", "sqr_mom", "eps", "wd"}
_FLAGS = {"do_wd", "force_train"}
WHICH = (
    "is one of fastai's own, whose state does not say which. If it is fastai's Adam, the "
    "default, say `optimizer='adamw'`, or `optimizer='adam'` if it was made with "
    "decouple_wd=False. It goes back as torch's, for OptimWrapper. Others have no counterpart "
    "here."
)


def as_torch(state: Mapping[str, Any], kind: str | None, source: str) -> dict[str, Any]:
    """The state dict of torch's Adam or AdamW that goes on as fastai's Adam would.

    Args:
      state: ``{"state": [...], "hypers": [...]}``, the states of all groups one after the other.
      kind: What the caller says it is.
      source: For messages.
    Raises:
      CheckpointError: It is not said, or another one; or several groups, of which the state does
        not say which parameters they have.
    """
    hypers, states = list(state["hypers"]), list(state["state"])
    kept = {key for one in states for key in one} - _FLAGS
    if kind not in ("adam", "adamw"):
        raise CheckpointError(f"{source}, {WHICH}")
    if kept != {*_TENSORS, "step"} or any(set(one) != _HYPERS for one in hypers):
        raise CheckpointError(
            f"{source} is not fastai's Adam: it keeps {', '.join(sorted(kept)) or 'nothing'} per "
            f"parameter, and its options are {', '.join(sorted(hypers[0]))}."
        )
    if any(one != hypers[0] for one in hypers):
        raise CheckpointError(
            f"{source} has {len(hypers)} groups with different options, and does not say which "
            "parameters belong to which. Train them alike, or with OptimWrapper."
        )
    own, decays = hypers[0], [bool(one.get("do_wd", True)) for one in states]
    options = {
        "lr": own["lr"],
        "betas": (own["mom"], own["sqr_mom"]),
        "eps": own["eps"],
        "amsgrad": False,
        "decoupled_weight_decay": kind == "adamw",
    }
    groups = [
        {**options, "weight_decay": decay, "params": [n for n, d in enumerate(decays) if d == does]}
        for does, decay in ((True, own["wd"]), (False, 0.0))
    ]
    per_parameter = {
        number: {"step": np.asarray(one["step"], np.float32)}
        | {theirs: one[ours] for ours, theirs in _TENSORS.items()}
        for number, one in enumerate(states)
        if "step" in one
    }
    return {"state": per_parameter, "param_groups": [one for one in groups if one["params"]]}
