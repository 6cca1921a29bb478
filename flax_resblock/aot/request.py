"""What to compile and for which target: a value that can be compared, hashed and sent to another
process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from flax_resblock import config as arch
from flax_resblock.aot.targets import Target, parse_target
from flax_resblock.config import SlotKind, walk
from flax_resblock.errors import InputError

What = Literal["forward", "train-step"]
Dtype = Literal["float32", "bfloat16"]
Precision = Literal["default", "high", "highest"]
BatchStatistics = Literal["global", "replica"]

PRECISIONS: tuple[Precision, ...] = ("default", "high", "highest")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One program to compile.

    Attributes:
      subject: A configuration in JSON, see :func:`flax_resblock.config.to_json`; or the folder of
        an exported network, with ``exported``.
      exported: Whether ``subject`` is such a folder; it brings its own precision and dtype.
      target: ``"tpu:v5e:2x2"``, see :func:`flax_resblock.aot.targets.parse_target`.
      slices: TPU slices that train together.
      what: ``"forward"`` in evaluation mode, or ``"train-step"``: forward in training mode,
        backward, and an update of SGD with momentum.
      dtype: Of the computation; parameters are float32.
      precision: jax's ``default_matmul_precision``; ``"highest"`` is what
        :func:`flax_resblock.parity.devices.strict` sets.
      slot_precision: ``(slot, precision)`` pairs that differ from it.
      batch_norm: Of the train step: statistics of the global batch, or of each device's share.
      hlo: File that the optimised program is written to, as text.
    """

    subject: str
    target: str
    exported: bool = False
    slices: int = 1
    what: What = "forward"
    batch: int = 8
    height: int = 16
    width: int = 16
    dtype: Dtype = "float32"
    precision: Precision = "highest"
    slot_precision: tuple[tuple[str, str], ...] = ()
    batch_norm: BatchStatistics = "global"
    hlo: str | None = None

    @property
    def config(self) -> arch.Config:
        """The network or block. An exported one has none."""
        return arch.from_json(self.subject)

    @property
    def parsed_target(self) -> Target:
        """The target."""
        return parse_target(self.target)

    @cached_property
    def _blurs(self) -> set[str]:
        slots = () if self.exported else walk(self.config)
        return {slot.name for slot in slots if slot.kind is SlotKind.BLUR}

    def precision_of(self, slot: str) -> str:
        """The precision asked for at a slot; a blur is always computed in full."""
        if slot in self._blurs:
            return "highest"
        return dict(self.slot_precision).get(slot, self.precision)

    def check(self) -> None:
        """Raises InputError for a request that cannot be compiled, before a compiler starts."""
        target = self.parsed_target
        if min(self.batch, self.height, self.width, self.slices) < 1:
            raise InputError(
                f"batch {self.batch}, image size {self.height} x {self.width} and slices "
                f"{self.slices} must be positive."
            )
        if self.slices > 1 and target.platform != "tpu":
            raise InputError(
                f"slices are TPU slices; {self.target} has none. Say how many GPUs, as in "
                f"cuda:{target.chip}:8."
            )
        if self.exported:
            if self.what != "forward":
                raise InputError(
                    f"{self.subject} is an exported network, which can only run forward; give "
                    f"a checkpoint or an architecture for a train step."
                )
            return
        slots = {slot.name for slot in walk(self.config) if slot.multiplies}
        for slot, precision in self.slot_precision:
            if slot not in slots:
                raise InputError(
                    f"there is no convolution or product at {slot!r}; there is one at each of "
                    f"{', '.join(sorted(slots))}."
                )
            if precision not in PRECISIONS:
                raise InputError(
                    f"precision {precision!r} of {slot} is unknown; choose from "
                    f"{', '.join(PRECISIONS)}."
                )

    def but(self, **changes: Any) -> Request:
        """The same with some fields changed."""
        return replace(self, **changes)


def request_for(config: arch.Config, target: str, **options: Any) -> Request:
    """A request for a network or block, with its usual image size unless ``height`` and ``width``
    say otherwise; checked.

    Raises:
      InputError: See :meth:`Request.check`.
    """
    size = {"height": config.image_size, "width": config.image_size}
    request = Request(subject=arch.to_json(config), target=target, **{**size, **options})
    request.check()
    return request
