"""What follows from an option that cannot be inferred from the weights: how far the output with
the other choice is from the output with the one that was assumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flax_resblock.convert.opening import OpenedCheckpoint
from flax_resblock.parity.oracle import relative_l2
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from flax_resblock.parity.taps import to_torch


@dataclass(frozen=True)
class Consequence:
    """One alternative to a choice that was assumed.

    Attributes:
      flag: That would make it, ``"--stride-on 1x1"``.
      meaning: In words.
      difference: Relative L2 difference of the output, evaluation mode, float64.
    """

    flag: str
    meaning: str
    difference: float

    @property
    def note(self) -> str:
        """For the terminal."""
        return (
            f"with {self.flag} ({self.meaning}) the output would differ by {self.difference:.1e} "
            f"(relative, evaluation mode); the tensors fit either way"
        )


def consequences(source: OpenedCheckpoint, images: np.ndarray) -> Iterator[Consequence]:
    """What every alternative to an assumption of ``source`` would change, by PyTorch's float64
    runs.

    Args:
      source: The opened checkpoint.
      images: ``(N, H, W, C)``.
    """
    twins = ReferencePair.of(source)
    for assumption in source.assumed:
        made = _output(twins, images)
        for value, config in assumption.alternatives.items():
            other = _output(ReferencePair(config, twins.state, twins.norm_options), images)
            yield Consequence(
                f"{assumption.rule.flag} {value}",
                assumption.rule.choices[value],
                relative_l2(other, made),
            )


def _output(twins: ReferencePair, images: np.ndarray) -> Any:
    precision = PRECISIONS["float64"]
    with torch.no_grad():
        return twins.torch(precision).eval()(to_torch(images, precision)).numpy()
