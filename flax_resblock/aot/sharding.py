"""Which all-reduces a training step over several devices must have, from the description of the
network alone; and whether the compiled one has them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from flax_resblock.aot.hlo import CompiledProgram
from flax_resblock.aot.request import Request
from flax_resblock.config import Branch, Config, SlotKind, walk

_PER_NORM = {"float32": 3, "bfloat16": 2}
"""All-reduces that each norm waits for with global statistics: in float32 of the mean, of its
correction and the squares, and of the sums of its backward pass. In bfloat16 the first is not
needed."""
_STATISTICS = {"float32": 3, "bfloat16": 2}
"""Values per channel of a norm in them, besides the gradients of scale and bias, which are the sums
of its backward pass: the mean, its correction and the squares."""
_BETWEEN_SLICES = {"send", "recv", "all-gather"}


@dataclass(frozen=True)
class Expected:
    """All-reduces of one step.

    Attributes:
      fewest, most: How many.
      elements: Values that each device contributes to them, all together.
    """

    fewest: int
    most: int
    elements: int
    reason: str


def expected(config: Config, batch_norm: str, dtype: str = "float32") -> Expected:
    """All-reduces of a training step on several devices.

    With statistics of each device's own share, only the gradients and the loss are summed, together
    in one all-reduce. With global statistics, every norm also needs two all-reduces forward (one in
    bfloat16) and one backward. Those of a shortcut's norm travel with those of its block. Where the
    shortcut pools first they may travel alone, as their values are ready at another time; the
    compiler decides.

    The bias of a shortcut's norm and that of the block's last norm have the same gradient, unless
    attention weighs the main path before the addition or the main path ends with an activation.
    The compiler sums the gradient once for both."""
    slots = list(walk(config))
    norms = [slot for slot in slots if slot.kind is SlotKind.NORM]
    weighs = [s for s in slots if s.branch is Branch.ATTENTION and s.kind is SlotKind.OUTPUT]
    weighed = {(s.stage, s.block) for s in weighs if not s.takes}
    pooled = {(s.stage, s.block) for s in slots if s.kind is SlotKind.AVERAGE_POOL}
    skips = [slot for slot in norms if slot.branch is Branch.SHORTCUT]
    shared = sum(slot.shape[0] for slot in skips if (slot.stage, slot.block) not in weighed)
    shared = 0 if config.branch_activation else shared
    loss = 1
    gradients = sum(slot.parameters for slot in slots) - shared + loss
    if batch_norm == "replica":
        return Expected(1, 1, gradients, "all gradients and the loss together")
    per_norm = _PER_NORM[dtype]
    chain, alone = len(norms) - len(skips), sum((s.stage, s.block) in pooled for s in skips)
    reason = (
        f"{per_norm} for each of {chain} norms in a row"
        + (f", up to {per_norm} for each of {alone} pooled shortcuts" if alone else "")
        + ", and the gradients with the loss"
    )
    return Expected(
        per_norm * chain + 1,
        per_norm * (chain + alone) + 1,
        gradients + _STATISTICS[dtype] * sum(slot.shape[0] for slot in norms),
        reason,
    )


def is_step_on_several(request: Request, devices: int) -> bool:
    """Whether there is anything to expect."""
    return request.what == "train-step" and devices > 1


def differences(request: Request, program: CompiledProgram, devices: int) -> list[str]:
    """Where the collectives of a compiled program are not the expected ones; empty where they are.

    On one TPU slice the number of values in all-reduces must be exact. On TPUs the number of
    all-reduces must be within its bounds. Between slices every all-reduce goes on over the network,
    as sends and receives of padded pieces that are gathered again. The CUDA compiler joins
    all-reduces by size, so that only collectives of another kind are reported."""
    kinds = Counter(collective.kind for collective in program.collectives)
    if not is_step_on_several(request, devices):
        return (
            [f"{sum(kinds.values())} collectives ({', '.join(sorted(kinds))}) where none is needed"]
            if kinds
            else []
        )
    should = expected(request.config, request.batch_norm, request.dtype)
    reduces = [collective for collective in program.collectives if collective.kind == "all-reduce"]
    found = []
    tpu = request.parsed_target.platform == "tpu"
    if tpu and not should.fewest <= len(reduces) <= should.most:
        bounds = " to ".join(map(str, sorted({should.fewest, should.most})))
        found.append(f"{len(reduces)} all-reduces, expected {bounds}: {should.reason}")
    elements = sum(math.prod(shape) for collective in reduces for shape in collective.shapes)
    if tpu and request.slices == 1 and elements != should.elements:
        found.append(f"{elements} values are summed over the devices, expected {should.elements}")
    if request.slices > 1 and kinds["send"] < should.fewest:
        found.append(
            f"{kinds['send']} exchanges between the slices, expected one at least for each of "
            f"{should.fewest} all-reduces"
        )
    others = sorted(
        set(kinds) - {"all-reduce"} - (_BETWEEN_SLICES if request.slices > 1 else set())
    )
    if others:
        found.append(f"further collectives: {', '.join(others)}")
    return found
