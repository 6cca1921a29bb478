"""Finds the options of a user's own module that neither its tensors nor its layers show: each
reading is run in PyTorch beside the module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import torch

from flax_resblock.convert.detection.assumption_rules import ASSUMPTION_RULES
from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.convert.state_map import StateMap
from flax_resblock.errors import InputError
from flax_resblock.parity.forward_run import Size, by_use, tensors_in
from flax_resblock.parity.module_run import global_state_kept, inner, runnable
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair

UNSEEN = {"order", "shortcut_from", "last_activation", "branch_activation", "shortcut", "head_pool"}
UNSEEN |= {"attention_place"}
"""Options of functions that no layer shows."""
_MOST = 3
"""Options that differ at a time from what was assumed."""
_CLOSE = 1e-4
"""Relative difference below which a reading is worth a proof."""


def equal_reading(
    module: torch.nn.Module,
    opened: OpenedCheckpoint,
    norm_options: Mapping[str, Any],
    sizes: Sequence[Size],
) -> dict[str, Any] | None:
    """The options with which the reference network computes what a module computes, with the
    module's own weights; None where none of them do. The caller proves them.

    Args:
      module: It is left as it was.
      opened: What its state dict was read as, which computes something else.
      norm_options: ``eps`` and ``momentum`` of its norms.
      sizes: Of the images, in the order in which they are tried.
    """
    generator, channels = torch.Generator().manual_seed(0), opened.config.in_channels
    with global_state_kept(), runnable(inner(module)) as copied:
        for size in by_use(opened.config, sizes):
            images = torch.randn(2, channels, *size, generator=generator)
            outputs: list[torch.Tensor] = []
            with suppress(Exception):  # whatever its forward pass raises
                outputs = tensors_in(copied(images))
            if outputs:
                break
        else:
            return None
        state = {entry.flax_path: entry for entry in opened.state_map.entries}
        for told in _others(opened):
            with suppress(ValueError, InputError, KeyError, RuntimeError):
                state_map = StateMap(replace(opened.config, **told), opened.state_map.naming)
                if len(state_map.entries) != len(state):
                    continue  # another number of tensors
                again = replace(opened, state_map=state_map)
                pair = replace(ReferencePair.of(again), norm_options=norm_options)
                found = pair.torch(PRECISIONS["float32"]).eval()(images)
                if any(
                    one.shape == found.shape and relative_l2(found.numpy(), one.numpy()) < _CLOSE
                    for one in outputs
                ):
                    return told
    return None


def _others(opened: OpenedCheckpoint) -> Iterator[dict[str, Any]]:
    """Other values of the options, of one first and of several later."""
    choices = {
        rule.field: list(rule.others(opened.config))
        for rule in ASSUMPTION_RULES
        if rule.field in UNSEEN and rule.matters(opened.config)
    }
    for number in range(1, _MOST + 1):
        for fields in combinations([name for name in choices if choices[name]], number):
            for values in product(*(choices[name] for name in fields)):
                yield dict(zip(fields, values, strict=True))
