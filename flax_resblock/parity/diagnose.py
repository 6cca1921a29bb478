"""Names the likely cause of a divergence by testing known mistakes against the data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flax_resblock.architecture import BlockConfig
from flax_resblock.parity.oracle import FLOAT64_LIMIT, relative_l2
from flax_resblock.parity.taps import trace_torch
from flax_resblock.parity.twins import Twins


def explain_block(twins: Twins, images: np.ndarray) -> Iterator[str]:
    """Known mistakes of a block's last lines, tested against the module's own tensors: what is the output made of?"""
    if not isinstance(twins.config, BlockConfig):
        return
    trace = trace_torch(twins.torch(np.float64), images, twins.torch_slots)
    last = "norm3" if twins.config.kind == "bottleneck" else "norm2"
    if last not in trace.activations:
        return
    main = trace.activations[last]
    skip = trace.activations.get("shortcut.norm", images)

    def relu(value: np.ndarray) -> np.ndarray:
        return np.maximum(value, 0)

    candidates = {
        "the main path is overwritten: the output is relu(skip(x) + x), the convolutions are computed and thrown away": lambda: relu(skip + images),
        "the main path is missing: the output is relu(skip(x))": lambda: relu(skip),
        "the skip is not added: the output is relu of the main path alone": lambda: relu(main),
        "the last ReLU is missing: the output is main path + skip": lambda: main + skip,
        "ReLU comes before the addition: the output is relu(main path) + skip": lambda: relu(main) + skip,
        "the unprojected input is added: the output is relu(main path + x)": lambda: relu(main + images),
        "the skip is subtracted": lambda: relu(main - skip),
        "the branches are multiplied": lambda: relu(main * skip),
    }
    for sentence, candidate in candidates.items():
        try:
            value = candidate()
        except ValueError:
            continue  # shapes that do not add up cannot be what it computes
        if relative_l2(trace.output, value) <= FLOAT64_LIMIT:
            yield f"{sentence} (agrees to {relative_l2(trace.output, value):.0e})"
            return
