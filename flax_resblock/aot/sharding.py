"""Which all-reduces a training step over several devices must have, from the description of the
network alone; and whether the compiled one has them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from flax_resblock.aot.hlo import Program
from flax_resblock.aot.request import Request
from flax_resblock.config import Config, SlotKind, walk

_FORWARD, _BACKWARD = 2, 1
_BETWEEN_SLICES = {"send", "recv", "all-gather"}
_VALUES = 6
"""Per channel of a norm: the mean, its correction and the squares forward; two sums through the
statistics and one more for scale and bias backward.
"""


@dataclass(frozen=True)
class Expected:
    """All-reduces of one step.

    Attributes:
      all_reduces: How many.
      elements: Values that each device contributes to them, all together.
      reason: In words.
    """

    all_reduces: int
    elements: int
    reason: str


def _chain(config: Config) -> int:
    """Norms that follow one another; the one of a shortcut runs beside those of its block, and
    their sums travel together.
    """
    return sum(slot.kind is SlotKind.NORM and slot.role != "shortcut.norm" for slot in walk(config))


def expected(config: Config, batch_norm: str) -> Expected:
    """All-reduces of a training step on several devices.

    With statistics of each device's own share only the gradients and the loss are summed, together.
    With global statistics every norm needs two more all-reduces forward (the mean first, then its
    correction and the squares) and one backward. The gradient of a norm's bias is the sum that the
    norm's backward pass needs anyway. The bias of a shortcut's norm has the gradient of the block's
    last one, so that it is summed once for both."""
    slots = list(walk(config))
    kernels = sum(
        math.prod(slot.shape) for slot in slots if slot.kind in (SlotKind.CONV, SlotKind.LINEAR)
    )
    biases = sum(slot.shape[-1] for slot in slots if slot.kind is SlotKind.LINEAR)
    channels = sum(slot.shape[0] for slot in slots if slot.kind is SlotKind.NORM)
    shortcuts = sum(
        slot.shape[0]
        for slot in slots
        if slot.kind is SlotKind.NORM and slot.role == "shortcut.norm"
    )
    loss = 1
    if batch_norm == "replica":
        return Expected(
            1,
            kernels + biases + 2 * channels - shortcuts + loss,
            "all gradients and the loss together",
        )
    chain = _chain(config)
    reason = (
        f"{_FORWARD} forward and {_BACKWARD} backward for each of {chain} norms in a row, and "
        f"the gradients with the loss"
    )
    return Expected(
        chain * (_FORWARD + _BACKWARD) + 1,
        kernels + biases + _VALUES * channels - shortcuts + loss,
        reason,
    )


def is_step_on_several(request: Request, devices: int) -> bool:
    """Whether there is anything to expect."""
    return request.what == "train-step" and devices > 1


def differences(request: Request, program: Program, devices: int) -> list[str]:
    """Where the collectives of a compiled program are not the expected ones; empty where they are.

    On one TPU slice the number of all-reduces and of the values in them must be exact. Between
    slices every all-reduce goes on over the network, as sends and receives of padded pieces that
    are gathered again; there the number of all-reduces must be exact. The CUDA compiler joins
    all-reduces by size, so that only collectives of another kind are remarked on."""
    kinds = Counter(collective.kind for collective in program.collectives)
    if not is_step_on_several(request, devices):
        return (
            [f"{sum(kinds.values())} collectives ({', '.join(sorted(kinds))}) where none is needed"]
            if kinds
            else []
        )
    should = expected(request.config, request.batch_norm)
    reduces = [collective for collective in program.collectives if collective.kind == "all-reduce"]
    found = []
    tpu = request.parsed_target.platform == "tpu"
    if tpu and len(reduces) != should.all_reduces:
        found.append(f"{len(reduces)} all-reduces, expected {should.all_reduces}: {should.reason}")
    elements = sum(math.prod(shape) for collective in reduces for shape in collective.shapes)
    if tpu and request.slices == 1 and elements != should.elements:
        found.append(f"{elements} values are summed over the devices, expected {should.elements}")
    if request.slices > 1 and kinds["send"] < should.all_reduces:
        found.append(
            f"{kinds['send']} exchanges between the slices, expected one at least for each of "
            f"{should.all_reduces} all-reduces"
        )
    others = sorted(
        set(kinds) - {"all-reduce"} - (_BETWEEN_SLICES if request.slices > 1 else set())
    )
    if others:
        found.append(f"further collectives: {', '.join(others)}")
    return found
