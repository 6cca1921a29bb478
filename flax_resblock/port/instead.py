"""What ``from_torch`` makes of a module that no configuration describes: it is ported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flax_resblock.errors import InputError, some
from flax_resblock.port.network import PortedNetwork
from flax_resblock.port.porting import port


def ported_instead(
    module: Any, refusal: InputError, arguments: Sequence[str]
) -> tuple[PortedNetwork, str]:
    """A module as Flax source, because it is not a network of this library.

    Args:
      module: An ``nn.Module``.
      refusal: Why it is no network of this library.
      arguments: What the caller says about it besides. A port has no place for such wishes.
    Returns:
      The ported network, and a warning about it.
    Raises:
      InputError: It cannot be ported either, or the caller gave arguments; with both reasons.
    """
    why = " ".join(line.strip() for line in str(refusal).splitlines())
    name = type(module).__name__
    if arguments:
        given = " and ".join(f"{one}=" for one in arguments)
        raise type(refusal)(
            f"{why} A network of another kind is ported where from_torch is given the module "
            f"alone, without {given}."
        ) from refusal
    try:
        ported = port(module, expand=True)
    except Exception as error:
        said = str(error)
        if not isinstance(error, InputError):
            said = f"Porting {name} failed with {type(error).__name__}: {error}."
        raise InputError(f"{said} It is no network of this library either: {why}") from error
    first = why.partition(". ")[0].rstrip(".")
    broken = [str(key) for key, value in _tensors(ported) if not np.isfinite(value).all()]
    notes = [*ported.notes]
    notes += [f"{some(broken)} hold values that are not finite; carried as they are"] * bool(broken)
    return ported, " ".join(
        [
            f"{name} was ported to Flax source and compared with it, because no configuration "
            f"describes it: {first}. flax_resblock.port(module).source is the code; "
            f"flax_resblock.save(model, folder) writes it with the weights and the proof.",
            *(f"Note: {note}." for note in notes),
        ]
    )


def _tensors(ported: PortedNetwork) -> list[tuple[str, np.ndarray]]:
    """Every tensor of the state dict that holds numbers with a fraction."""
    state = ported.table.to_torch(ported.carried.whole(ported.values))
    return [(key, value) for key, value in state.items() if value.dtype.kind not in "biu"]
