"""Comparisons of the device check: blocks and networks against PyTorch's float64 on the CPU."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from flax_resblock.checkpoint.torch_file import state_to_numpy
from flax_resblock.config import BlockConfig, architecture
from flax_resblock.cpu.switch import Lowering
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.norm import BatchNorm
from flax_resblock.parity.battery import BATTERY
from flax_resblock.parity.comparison import Plan, compare_pair
from flax_resblock.parity.devices import jax_device, strict, torch_device
from flax_resblock.parity.inputs import adversarial_images, randomised_norm_state
from flax_resblock.parity.oracle import Measurement
from flax_resblock.parity.pair import Precision
from flax_resblock.parity.parts import Devices
from flax_resblock.parity.reference import ReferencePair
from torch_ref import Block

CHUNKS = 5
"""Parts that share the kinds of blocks and networks."""


class Row(NamedTuple):
    """One line of the table.

    Attributes:
      subject, check: What was examined, and for what.
      figure: The outcome in words.
      passed: None for a fact without a verdict.
      detail: Further figures, for the JSON file.
    """

    subject: str
    check: str
    figure: str
    passed: bool | None = None
    detail: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Setting:
    """What the command line asks for.

    Attributes:
      kind: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      quick: Only the smallest case of each part.
      fault: None, or the fault that is put into the Flax side: ``"precision"`` lets the first
        convolution compute in bfloat16, ``"statistics"`` gives the first norm a momentum that is
        one percent too large.
      subjects: The only cases to compare; empty for all.
    """

    kind: str
    quick: bool = False
    fault: str | None = None
    subjects: tuple[str, ...] = ()

    @cached_property
    def places(self) -> Devices:
        """The device of each side; PyTorch's is the CPU where it cannot use the one of jax."""
        cuda = self.kind == "gpu" and torch.cuda.is_available()
        return Devices(jax_device(self.kind), torch_device("cuda" if cuda else "cpu"))

    @property
    def lowering(self) -> Lowering:
        """The convolutions to check: on an accelerator those that a user's program gets there, on
        a CPU XLA's own."""
        return "xla" if self.kind == "cpu" else "auto"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that this device has on both sides."""
        tf32 = ("tf32",) if self.places.torch.type == "cuda" else ()
        return ("float32", *tf32, "bfloat16")


@dataclass(frozen=True)
class FaultyPair(ReferencePair):
    """A pair whose Flax side has a deliberate fault, see :class:`Setting`."""

    fault: str = field(default="", kw_only=True)

    def flax(self, precision: Precision) -> Any:
        """The model with the fault in it."""
        model = super().flax(precision)
        layers = [module for _, module in nnx.iter_modules(model)]
        if self.fault == "precision":
            next(one for one in layers if isinstance(one, Conv)).dtype = jnp.bfloat16
        else:
            norm = next(one for one in layers if isinstance(one, BatchNorm))
            norm.momentum = 1.01 * (norm.momentum or 0.1)
        return model


def _compared(
    setting: Setting, subject: str, pair: ReferencePair, images: np.ndarray, plan: Plan
) -> Iterator[Row]:
    """One row per precision and quantity; one with the error where a comparison raises one, so that
    the other cases of a part are compared all the same."""
    if setting.subjects and subject not in setting.subjects:
        return
    if setting.fault:
        fields = (pair.config, pair.state, pair.norm_options, pair.naming, pair.module)
        pair = FaultyPair(*fields, fault=setting.fault)
    started = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - started:7.1f} s  {subject}: {text}", flush=True)

    try:
        with strict(setting.lowering):
            comparison = compare_pair(pair, images, plan, progress=progress, devices=setting.places)
    except Exception as error:  # of any class: a compiler's, or a library's that lacks a kernel
        text = f"{type(error).__name__}: {error}"[:300]
        yield Row(subject, "comparison", text, False, {"error": traceback.format_exc()})
        return
    for precision, quantity, rows in comparison.groups():
        yield _summary(f"{subject}, {precision}", quantity, rows)


def _summary(subject: str, quantity: str, rows: Sequence[Measurement]) -> Row:
    def plain(row: Measurement) -> dict[str, Any]:
        return {"slot": row.slot, "step": row.step, **asdict(row.verdict)}

    worst = max(rows, key=lambda row: row.verdict.excess)
    failed = [row for row in rows if not row.verdict.passed]
    own = [row.verdict for row in rows if row.verdict.reference_error > 0]
    ratio = statistics.median(v.error / v.reference_error for v in own) if own else None
    figure = f"{len(rows)} tensors" + (f", {len(failed)} beyond the limit" if failed else "")
    if any(row.verdict.error for row in rows):
        found = worst.verdict
        figure += f"; worst {worst.slot}: {found.error:.1e}, PyTorch {found.reference_error:.1e}"
        figure += f", limit {found.limit:.1e}"
    else:
        figure += ", no error at all"
    figure += f"; median ratio to PyTorch's error {ratio:.2f}" if ratio is not None else ""
    detail = {"tensors": len(rows), "failed": len(failed), "worst": plain(worst)}
    detail |= {"median_ratio": ratio, "failures": [plain(row) for row in failed[:30]]}
    return Row(subject, quantity, figure, not failed, detail)


def block(setting: Setting) -> Iterator[Row]:
    """The residual block of the question, the user's own PyTorch code on the other side."""
    cases = [(64, 64, 1), (64, 128, 1), (64, 64, 2), (64, 128, 2), (64, 128, 3)]
    plan = Plan(gradients=True, precisions=("float64", *setting.precisions))
    if setting.quick:
        cases, plan = [(8, 16, 2)], Plan(gradients=True, precisions=("float32",))
    for inputs, outputs, stride in cases:
        config = BlockConfig(in_channels=inputs, out_channels=outputs, stride=stride)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Block(inputs, outputs, stride)
        state = randomised_norm_state(state_to_numpy(module.state_dict()))
        pair = ReferencePair(config, state, {}, "sequential", module)
        skip = "identity skip" if len(module.skip) == 0 else "1x1 skip"
        subject = f"block {inputs} to {outputs}, stride {stride}, {skip}"
        images = adversarial_images(config, batch=4)
        yield from _compared(setting, subject, pair, images, plan)


def network(name: str, precision: str, setting: Setting) -> Iterator[Row]:
    """A network for images of 224x224 in one precision."""
    config = architecture(name)
    images = adversarial_images(config, batch=2, height=224, width=224)
    pair = ReferencePair.random(config)
    plan = Plan(gradients=True, precisions=(precision,))
    yield from _compared(setting, f"{name} at 224", pair, images, plan)


def battery(chunk: int, setting: Setting) -> Iterator[Row]:
    """Every kind of block and small network."""
    plan = Plan(gradients=True, precisions=setting.precisions)
    for name, config in list(BATTERY.items())[chunk::CHUNKS]:
        images = adversarial_images(config, batch=3)
        yield from _compared(setting, name, ReferencePair.random(config), images, plan)


def training(name: str, setting: Setting) -> Iterator[Row]:
    """Twenty training steps with each optimizer, everything compared after every step."""
    config = architecture("resnet20")
    images = adversarial_images(config, batch=8, height=17, width=16)
    plan = Plan(train=False, precisions=(name,), steps=20)
    yield from _compared(setting, "resnet20 at 17x16", ReferencePair.random(config), images, plan)
