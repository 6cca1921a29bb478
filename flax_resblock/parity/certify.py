"""The last step of a conversion: opens its output again, runs it in both frameworks, and writes its
certificate."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flax_resblock import checkpoint
from flax_resblock.config import name_of
from flax_resblock.convert.opening import OpenedCheckpoint, ReadOptions, open_checkpoint
from flax_resblock.errors import InputError, OutputError, some
from flax_resblock.hub.names import HUB
from flax_resblock.parity.certificate import (
    ITSELF,
    KIND,
    REFERENCE,
    SCHEMA,
    certificate_of,
    hashes,
    read_certificate,
    versions,
)

PACKAGES = ("jax", "flax", "numpy", "safetensors", "orbax-checkpoint", "torch")
BATCH = 2
"""Images of the verification."""


def refuse_foreign_certificate(out: Path) -> None:
    """Raises InputError where the certificate would go to a file that is none; such a file is never
    replaced."""
    path = certificate_of(out)
    if not os.path.lexists(path):
        return
    try:
        read_certificate(path)
    except InputError as error:
        raise InputError(
            f"{error} convert keeps its certificate under this name and never replaces another "
            "file, even by force. Move that file, choose another folder, or pass "
            "`certificate=False`."
        ) from error


def provenance(source: OpenedCheckpoint) -> dict[str, Any]:
    """What a checkpoint is called, without its folder, and the SHA-256 of its file, of its files,
    or of a shard index and its shards."""
    path = Path(source.record.source)
    named = {HUB: source.record.metadata[HUB]} if HUB in source.record.metadata else {}
    if path.suffix != ".json":
        return {"path": path.name, "sha256": hashes(path), **named}
    # the shards are plain names, which reading the source has checked
    shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
    digests = {name: hashes(path.with_name(name)) for name in sorted({path.name, *shards})}
    return {"path": path.name, "sha256": digests, **named}


@contextmanager
def _interrupts_later() -> Iterator[None]:
    """Holds an interrupt back until the block has ended: the frameworks crash the process when one
    meets them half imported."""
    # interrupts go to the main thread, and only it may hold them
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


def verify_written(source: OpenedCheckpoint) -> dict[str, Any]:
    """The quick verification: every slot in both frameworks, evaluation mode, float64.

    Args:
      source: The output, opened again.
    Returns:
      ``passed``, ``compared_with``, ``criterion``, ``worst``, ``tensors`` (how many were
      compared); or ``skipped``, why there was none.
    """
    if source.unhealthy:
        return {"skipped": f"values that no healthy checkpoint has: {some(source.unhealthy)}"}
    try:
        with _interrupts_later():
            import jax

            from flax_resblock.cpu.compiling import give_memory_back
            from flax_resblock.cpu.switch import conv_lowering
            from flax_resblock.parity.comparison import Plan, compare_pair
            from flax_resblock.parity.frugal import FrugalPair
            from flax_resblock.parity.inputs import adversarial_images
            from flax_resblock.parity.oracle import FLOAT64_LIMIT

            jax.devices("cpu")
    except ImportError as error:
        if error.name != "torch":
            raise
        return {"skipped": "PyTorch is not installed"}
    except RuntimeError as error:  # the accelerator belongs to another process, for one
        return {"skipped": f"jax does not start: {str(error).strip().splitlines()[0][:160]}"}
    images = adversarial_images(source.config, batch=BATCH)
    plan = Plan(train=False, gradients=False, precisions=("float64",))
    pair = FrugalPair.of(source)
    del source
    give_memory_back()
    with conv_lowering(plan.conv_lowering):
        comparison = compare_pair(pair, images, plan)
    rows = comparison.measurements
    worst = max(rows, key=lambda row: (not row.verdict.passed, row.verdict.excess))
    error = worst.verdict.error
    return {
        "passed": comparison.passed,
        "compared_with": REFERENCE,
        "criterion": (
            f"evaluation mode, float64, XLA's own convolutions: relative L2 difference of Flax "
            f"from PyTorch at most {FLOAT64_LIMIT:g} for every tensor"
        ),
        "worst": {
            "quantity": worst.quantity,
            "slot": worst.slot,
            "error": error if math.isfinite(error) else str(error),
            "limit": worst.verdict.limit,
        },
        "tensors": len(comparison.measurements),
    }


def certify(
    out: Path, reading: ReadOptions, origin: Mapping[str, Any], notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Opens an output again, verifies it and writes its certificate.

    Args:
      reading: What it is; a ``.pth`` does not always tell.
      origin: :func:`provenance` of what it was made from, and under ``module`` the user's own
        network that it was compared with.
      notes: What was assumed, left out or filled when that was read.
    Returns:
      ``verification`` of the entry, see :func:`verify_written`.
    Raises:
      OutputError: The certificate cannot be written.
    """
    opened = [open_checkpoint(out, reading)]
    record = opened[0].record
    recorded = checkpoint.recorded_digests(record)  # which reading has compared
    facts = {
        "tensors": recorded or checkpoint.digests(record.tensors),
        "architecture": name_of(opened[0].config),
        "naming": opened[0].state_map.naming.name,
    }
    del record
    verification = verify_written(opened.pop())
    if "module" in origin:
        verification["compared_with"] = (
            f"{origin['module']['spec']}, your own module, and the reference network of this "
            "description"
        )
    entry = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": dict(origin),
        "output": {"sha256": hashes(out)},
        **facts,
        "notes": list(notes),
        "versions": versions(PACKAGES),
        "verification": verification,
    }
    path = certificate_of(out)
    name = ITSELF if path.parent == out else out.name
    content = {"schema": SCHEMA, "kind": KIND, "outputs": {name: entry}}
    try:
        with checkpoint.replacing(path, force=True) as temporary:
            temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OutputError as error:
        raise OutputError(f"{error} {out} itself is complete.") from error
    return verification
