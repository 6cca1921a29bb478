"""``flax-resblock verify``."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.markup import escape

from flax_resblock.architecture import name_of
from flax_resblock.checkpoint.atomic import refuse_existing, replacing
from flax_resblock.checkpoint.record import digests
from flax_resblock.cli.common import ReadingFlags, output, print_notes, print_table, refuse_unhealthy, status
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


@contextmanager
def _torch_needed() -> Iterator[None]:
    """Turns the absence of torch into a sentence."""
    try:
        yield
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError("verify runs the PyTorch side and needs torch: pip install 'flax-resblock[torch]'.") from error


Precision = Literal["both", "float64", "float32"]

OptionalCheckpoint = Annotated[
    Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT", help=".pth, .pt, .th, .safetensors (or its index), or an Orbax folder.")
]


def verify(
    reading: ReadingFlags,
    checkpoint: OptionalCheckpoint = None,
    torch: str | None = None,
    kwargs: str | None = None,
    batch: int = 3,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
    eval_only: bool = False,
    gradients: bool = False,
    precision: Precision = "both",
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
      torch: Examine a PyTorch module of your own instead: FILE.py:NAME or package.module:NAME, a class or function that makes it. Importing it runs its
        code. A block that asks for in_channels and out_channels is tried with several; it is held against the specification of a residual block.
      kwargs: Arguments of that class or function, as a JSON object.
      batch: Number of random, asymmetric images.
      height: Of the images; by default an odd size that suits the stem.
      width: Of the images; by default an even size that suits the stem.
      seed: Of the images.
      eval_only: Evaluation mode only.
      gradients: Also gradients of every parameter, activation and the input.
      precision: Which precisions to compare; the float64 truth is always PyTorch's.
      slots: Print every slot, not only the worst of each kind.
      json_file: Also write every measurement to this file.
      force: Replace that file if it exists.
      allow_nonfinite: Compare even if the checkpoint holds NaN, infinities or negative variances.
    """
    if batch < 1 or (height or 1) < 1 or (width or 1) < 1:
        raise InputError(f"--batch {batch}, --height {height} and --width {width} must be positive.")
    if json_file is not None:
        refuse_existing(json_file, force)
    precisions: tuple[Any, ...] = ("float64", "float32") if precision == "both" else (precision,)
    if torch is not None:
        if checkpoint is not None:
            raise InputError("give a checkpoint or --torch FILE.py:NAME, not both; --torch examines the code, with random weights.")
        if json_file is not None or height is not None or width is not None or slots:
            raise InputError("--json-file, --height, --width and --slots belong to the verification of a checkpoint; --torch takes none of them.")
        return _verify_module(torch, kwargs, {"train": not eval_only, "gradients": gradients, "precisions": precisions}, batch, seed)
    if checkpoint is None:
        raise InputError("give a checkpoint to verify, or --torch FILE.py:NAME for a PyTorch module of your own.")
    source = reading.open(checkpoint)
    refuse_unhealthy(source, allow_nonfinite)
    if source.afresh:
        raise InputError("verify compares what a checkpoint holds; it cannot start keys afresh.")
    with _torch_needed():
        from flax_resblock.parity.compare import Plan, compare_twins
        from flax_resblock.parity.inputs import adversarial_images
        from flax_resblock.parity.report import slot_table, summary_table, to_json, verdict_lines
        from flax_resblock.parity.twins import Twins

    images = adversarial_images(source.config, batch=batch, height=height, width=width, seed=seed)
    output.print(f"[bold]{name_of(source.config)}[/]  {checkpoint}, input {list(images.shape)}", soft_wrap=True)
    print_notes(source.notes)
    with status.status("starting") as spinner:
        plan = Plan(train=not eval_only, gradients=gradients, precisions=precisions)
        comparison = compare_twins(Twins.of(source), images, plan, progress=lambda step: spinner.update(f"comparing: {step}"), seed=seed)
    if slots:
        for group, quantity, rows in comparison.groups():
            print_table(slot_table(rows, f"{quantity}, {group}"))
    print_table(summary_table(comparison))
    for line in verdict_lines(comparison):
        output.print(line, style="bold green" if comparison.passed else "bold red", markup=False, soft_wrap=True)
    if json_file is not None:
        facts = to_json(comparison, _provenance(source, batch, images.shape[1:3], seed))
        with replacing(json_file, force=force) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        output.print(f"wrote {json_file}", markup=False)
    return 0 if comparison.passed else 1


def _verify_module(spec: str, kwargs: str | None, plan: dict[str, Any], batch: int, seed: int) -> int:
    """Examines a person's own module and says what is wrong with it."""
    with _torch_needed():
        from flax_resblock.parity.compare import Plan
        from flax_resblock.parity.report import summary_table
        from flax_resblock.parity.user_module import cases_of, examine, load_factory
    try:
        arguments = None if kwargs is None else json.loads(kwargs)
    except ValueError as error:
        raise InputError(f'--kwargs {kwargs!r} is no JSON ({error}). Write it like --kwargs \'{{"in_channels": 8, "out_channels": 16}}\'.') from error
    if arguments is not None and not isinstance(arguments, dict):
        raise InputError(f"--kwargs {kwargs!r} must be a JSON object, argument names to values.")
    factory = load_factory(spec)
    wrong = 0
    for call in cases_of(factory, arguments):
        with status.status(f"examining {spec}"):
            case = examine(factory, call, Plan(**plan), batch=batch, seed=seed)
        failed = bool(case.findings) or (case.comparison is not None and not case.comparison.passed)
        wrong += failed
        output.print(f"[bold]{escape(case.title)}[/]  {'[bold red]wrong[/]' if failed else '[green]equals its Flax twin[/]'}", soft_wrap=True)
        for finding in case.findings:
            output.print(f"  {finding}", markup=False, soft_wrap=True)
        if case.comparison is not None and not case.comparison.passed:
            print_table(summary_table(case.comparison))
    return 1 if wrong else 0
