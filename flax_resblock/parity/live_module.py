"""Reads a PyTorch module of the user's own, and proves the reading by running the module."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flax_resblock.checkpoint import Record
from flax_resblock.checkpoint.torch_file import with_tensors
from flax_resblock.checkpoint.unwrap import record_of, unwrap
from flax_resblock.config import Path as ModelPath
from flax_resblock.convert.detection.assumption_rules import ASSUMPTION_RULES
from flax_resblock.convert.detection.assumptions import KNOWN
from flax_resblock.convert.metadata import EPS
from flax_resblock.convert.modules import ModuleFacts, module_facts
from flax_resblock.convert.opening import OpenedCheckpoint, ReadOptions, ignored, interpret, without
from flax_resblock.convert.state_map import StateMap
from flax_resblock.errors import CheckpointError, InputError, some
from flax_resblock.parity.certificate import Hashes, hashes
from flax_resblock.parity.forward_check import SIZES, ForwardFigures, Size, check_forward
from flax_resblock.parity.forward_run import by_use, tensors_in
from flax_resblock.parity.module_run import draws_numbers, global_state_kept, inner, runnable
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.user_code import load_factory
from flax_resblock.parity.user_module import made_by

_POOLED = frozenset({"stem_pool"})
_UNSEEN = _POOLED | {"order", "shortcut_from", "last_activation", "branch_activation", "shortcut"}
_UNSEEN |= {"head_pool", "attention_place"}
"""Options of functions that no layer shows."""
_MOST = 3
"""Options that differ at a time from what was assumed."""
_CLOSE = 1e-4
"""Relative difference below which a reading is worth a proof."""


def open_module(
    module: Any, reading: ReadOptions, *, sizes: Sequence[Size] = SIZES, wide: bool = False
) -> tuple[OpenedCheckpoint, ForwardFigures]:
    """The state dict of a module with the one reading that fits and computes the same.

    Nothing is assumed: what the weights do not show is read off the layers, and the module runs.

    Args:
      module: The ``nn.Module``; it is left as it was.
      sizes, wide: See :func:`~flax_resblock.parity.forward_check.check_forward`.
    Raises:
      CheckpointError: Its tensors fit no network, or several.
      InputError: Its layers or its forward pass are not those of the network that they fit.
    """
    facts, asked, said = module_facts(module), reading, reading.assumptions
    stride = facts.stride if reading.stride is None else reading.stride
    reading = replace(reading, stride=stride, assume=KNOWN)
    record = record_of(module.state_dict(), type(module).__name__)
    opened = interpret(record, reading)
    if reading.architecture is None:
        told = {**facts.told(opened.state_map), **reading.assumptions}
        reading = replace(reading, assumptions=told)
        opened = interpret(record, reading)
    same = _settled(reading, opened)

    def values_of(state: Mapping[str, Any]) -> dict[ModelPath, np.ndarray]:
        again = interpret(record_of(state, record.source), same)
        return again.state_map.to_flax(again.tensors)

    eps = facts.norm_options[EPS]
    eps = 1e-5 if eps is None else eps
    # What the layers declare explains a difference; it is none where the outputs are equal at odd
    # sizes too, as of a layer that pads in front of a convolution without padding.
    odd = bool(facts.differences(opened.state_map))
    if facts.trains_otherwise(opened.state_map):
        facts.check(opened.state_map)
    try:
        figures = check_forward(module, opened, values_of, eps=eps, sizes=sizes, wide=wide, odd=odd)
    except Exception:
        known = reading.architecture is not None or said.keys() & (_UNSEEN - _POOLED)
        options = (_POOLED if known else _UNSEEN) - said.keys()
        told = _equal_reading(module, opened, facts, eps, sizes, options)
        if told is not None:
            told = {**said, **told}
            return open_module(module, replace(asked, assumptions=told), sizes=sizes, wide=wide)
        facts.check(opened.state_map)
        raise
    seen = {"channels": opened.config.in_channels, "size": figures.size}
    if not opened.config.dropout and draws_numbers(module, **seen):
        drawn = (
            "in training its forward pass draws random numbers, as dropout does, and the Flax "
            "network does not; what they compute in evaluation is equal"
        )
        opened = replace(opened, notes=(*opened.notes, drawn))
    return replace(opened, norm_options=facts.norm_options), figures


def _equal_reading(
    module: torch.nn.Module,
    opened: OpenedCheckpoint,
    facts: ModuleFacts,
    eps: float,
    sizes: Sequence[Size],
    options: Set[str],
) -> dict[str, Any] | None:
    """The options with which the reference network computes what a module computes, with the
    module's own weights; None where none of them do. The caller proves them.

    Args:
      opened: What its state dict was read as, which computes something else.
      facts: What its layers declare.
      eps: Of its norms.
      sizes: Of the images, in the order in which they are tried.
    """
    norm_options = {**facts.norm_options, EPS: eps}
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
        for told in _others(opened, options):
            with suppress(ValueError, InputError, KeyError, RuntimeError):
                state_map = StateMap(replace(opened.config, **told), opened.state_map.naming)
                if len(state_map.entries) != len(opened.state_map.entries):
                    continue  # another number of tensors
                if "stem_pool" in told:  # under which its layers may declare something else
                    config = replace(state_map.config, **{**facts.told(state_map), **told})
                    state_map = StateMap(config, state_map.naming)
                again = replace(opened, state_map=state_map)
                pair = replace(ReferencePair.of(again), norm_options=norm_options)
                found = pair.torch(PRECISIONS["float32"]).eval()(images)
                if any(
                    one.shape == found.shape and relative_l2(found.numpy(), one.numpy()) < _CLOSE
                    for one in outputs
                ):
                    return told
    return None


def _others(opened: OpenedCheckpoint, options: Set[str]) -> Iterator[dict[str, Any]]:
    """Other values of the options, of one first and of several later."""
    choices = {
        rule.field: list(rule.others(opened.config))
        for rule in ASSUMPTION_RULES
        if rule.field in options and rule.matters(opened.config)
    }
    for number in range(1, _MOST + 1):
        for fields in combinations([name for name in choices if choices[name]], number):
            for values in product(*(choices[name] for name in fields)):
                yield dict(zip(fields, values, strict=True))


def _settled(reading: ReadOptions, opened: OpenedCheckpoint) -> ReadOptions:
    """Reads other tensors of the same names as these were read."""
    found = {"architecture": opened.config, "naming": opened.state_map.naming}
    return replace(reading, num_classes=None, assumptions={}, **found)


@dataclass(frozen=True)
class OwnNetwork:
    """A network of the user's own as code.

    Attributes:
      spec: ``FILE.py:NAME`` or ``package.module:NAME``.
      sizes: Of the images that it is run on, in the order in which they are tried.
      ported_by: The command that ports it, for the message that it is no network of this library.
    """

    spec: str
    kwargs: Mapping[str, Any]
    sizes: tuple[Size, ...] = SIZES
    ported_by: str = ""

    def read(self, record: Record, reading: ReadOptions) -> tuple[OpenedCheckpoint, dict[str, Any]]:
        """A checkpoint read as the weights of this network, which is run with them.

        Args:
          record: What the file holds; its tensors are loaded into the module, strictly.
        Returns:
          The checkpoint, and what the certificate says about the module: ``spec``, ``sha256`` of
          its source, ``image_size``, ``float32`` and ``float64``.
        Raises:
          InputError: The code raises, the tensors are not the module's, or what it computes is not
            what the Flax network computes.
        """
        factory = load_factory(self.spec)
        module = made_by(factory, self.kwargs, f"`torch={self.spec}`: calling it")
        load_into(module, without(record.tensors, ignored(record, reading.ignore)), record.source)
        try:
            opened, figures = open_module(module, reading, sizes=self.sizes, wide=True)
        except InputError as error:
            gap = "\n" if "\n" in str(error) else " "
            advice = f"{gap}To port it instead, as Flax source of its own, run: {self.ported_by}"
            raise type(error)(f"{error}{advice if self.ported_by else ''}") from error
        again = interpret(record, _settled(reading, opened))
        again = replace(again, norm_options=opened.norm_options)
        if figures.elsewhere:
            again = replace(again, notes=(*again.notes, figures.elsewhere))
        about = {
            "spec": self.spec,
            "sha256": source_hash(factory),
            "image_size": list(figures.size),
            "float32": figures.float32,
            "float64": figures.float64,
        }
        return again, about


def load_into(module: Any, tensors: Mapping[str, np.ndarray], source: str) -> None:
    """Loads the tensors into the module, which has them under names with other wrappers.

    Raises:
      CheckpointError: They are not the tensors of the module.
    """
    name = type(module).__name__
    keys = {key: key for key in module.state_dict()}
    own = unwrap(keys, is_tensor=lambda key: isinstance(key, str), source=name).state
    filled = dict(tensors)
    for key, full in own.items():  # PyTorch fills counters as well
        if key not in filled and full.endswith("num_batches_tracked"):
            filled[key] = np.zeros((), np.int64)
    missing, unexpected = sorted(own.keys() - filled), sorted(filled.keys() - own)
    if missing or unexpected:
        lines = [f"The tensors of {source} are not those of {name}."]
        lines += [f"  missing     {some(missing)}"] if missing else []
        lines += [f"  unexpected  {some(unexpected)}"] if unexpected else []
        lines += [
            "Create the module as it was trained, with `kwargs=...` where it needs arguments."
        ]
        raise CheckpointError("\n".join(lines))
    try:
        module.load_state_dict(with_tensors({own[key]: filled[key] for key in own}), strict=True)
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"{source} cannot be loaded into {name}: {first}") from error


def source_hash(factory: Any) -> Hashes | None:
    """SHA-256 of the file that the code is in; None where there is no such file."""
    try:
        file = inspect.getsourcefile(factory)
    except TypeError:
        return None
    return None if file is None else hashes(Path(file))
