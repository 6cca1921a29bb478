"""``flax-resblock verify``."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

from flax_resblock.architecture import name_of
from flax_resblock.checkpoint.atomic import refuse_existing, replacing
from flax_resblock.checkpoint.record import digests
from flax_resblock.cli.common import Checkpoint, ReadingFlags, output, print_notes, print_table, refuse_unhealthy, status
from flax_resblock.convert.source import Source
from flax_resblock.errors import InputError, MissingDependencyError


def _provenance(source: Source, batch: int, size: tuple[int, int], seed: int) -> dict[str, Any]:
    import jax
    import torch

    from flax_resblock import __version__

    return {
        "checkpoint": source.record.source,
        "sha256": digests(source.tensors),
        "architecture": name_of(source.config),
        "layout": source.state_map.layout.name,
        "versions": {"flax_resblock": __version__, "jax": jax.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "jax_device": jax.devices()[0].device_kind,
        "input": {"batch": batch, "height": size[0], "width": size[1], "seed": seed},
    }


def verify(
    checkpoint: Checkpoint,
    reading: ReadingFlags,
    batch: int = 3,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    eval_only: bool = False,
    gradients: bool = False,
    slots: bool = False,
    json_file: Path | None = None,
    force: bool = False,
    allow_nonfinite: bool = False,
) -> int:
    """Runs the network in PyTorch and in Flax side by side and compares every slot: activations in evaluation and training mode, running statistics,
    with --gradients also every gradient, in float64 and float32.

    float64 must agree to 1e-12. In float32 Flax's error against the float64 truth may be four times PyTorch's own, or 8 ulp. Exit status 1 when
    something differs.

    Args:
      reading: How to read the checkpoint.
      batch: Number of random, asymmetric images.
      height: Of the images; by default an odd size that suits the stem.
      width: Of the images; by default an even size that suits the stem.
      seed: Of the images.
      eval_only: Evaluation mode only.
      gradients: Also gradients of every parameter, activation and the input.
      slots: Print every slot, not only the worst of each kind.
      json_file: Also write every measurement to this file.
      force: Replace that file if it exists.
      allow_nonfinite: Compare even if the checkpoint holds NaN, infinities or negative variances.
    """
    if batch < 1 or (height or 1) < 1 or (width or 1) < 1:
        raise InputError(f"--batch {batch}, --height {height} and --width {width} must be positive.")
    if json_file is not None:
        refuse_existing(json_file, force)
    source = reading.open(checkpoint)
    refuse_unhealthy(source, allow_nonfinite)
    if source.afresh:
        raise InputError("verify compares what a checkpoint holds; it cannot start keys afresh.")
    try:
        from flax_resblock.parity.compare import Plan, compare_twins
        from flax_resblock.parity.inputs import adversarial_images
        from flax_resblock.parity.report import slot_table, summary_table, to_json, verdict_lines
        from flax_resblock.parity.twins import Twins
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("verify runs the PyTorch twin and needs torch: pip install 'flax-resblock[torch]'.") from error

    images = adversarial_images(source.config, batch=batch, height=height, width=width, seed=seed)
    output.print(f"[bold]{name_of(source.config)}[/]  {checkpoint}, input {list(images.shape)}", soft_wrap=True)
    print_notes(source.notes)
    with status.status("starting") as spinner:
        plan = Plan(train=not eval_only, gradients=gradients)
        comparison = compare_twins(Twins.of(source), images, plan, progress=lambda step: spinner.update(f"comparing: {step}"), seed=seed)
    if slots:
        for precision, quantity, rows in comparison.groups():
            print_table(slot_table(rows, f"{quantity}, {precision}"))
    print_table(summary_table(comparison))
    for line in verdict_lines(comparison):
        output.print(line, style="bold green" if comparison.passed else "bold red", markup=False, soft_wrap=True)
    if json_file is not None:
        facts = to_json(comparison, _provenance(source, batch, images.shape[1:3], seed))
        with replacing(json_file, force=force) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        output.print(f"wrote {json_file}", markup=False)
    return 0 if comparison.passed else 1
