"""``flax-resblock verify``."""

from __future__ import annotations

import json as json_module
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from rich.markup import escape

from flax_resblock.checkpoint.atomic import refuse_existing, replacing
from flax_resblock.cli.common import (
    ReadingFlags,
    output,
    print_notes,
    print_table,
    refuse_unhealthy,
    status,
)
from flax_resblock.cli.interrupts import still_wanted
from flax_resblock.config import ARCHITECTURES, Config, architecture, name_of
from flax_resblock.errors import InputError, MissingDependencyError
from flax_resblock.parity.certificate import REFERENCE

if TYPE_CHECKING:
    from rich.status import Status

    from flax_resblock.convert.opening import OpenedCheckpoint
    from flax_resblock.parity.ambiguity import Consequence
    from flax_resblock.parity.api import Verification
    from flax_resblock.parity.comparison import Plan
    from flax_resblock.parity.parts import Devices
    from flax_resblock.parity.reference import ReferencePair
    from flax_resblock.parity.user_module import Case


@contextmanager
def _torch_needed() -> Iterator[None]:
    """Turns the absence of torch into a sentence."""
    try:
        yield
    except ImportError as error:
        if error.name != "torch":
            raise
        raise MissingDependencyError(
            "verify runs the PyTorch side and needs torch: pip install 'flax-resblock[torch]'."
        ) from error


OptionalCheckpoint = Annotated[
    Path | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CKPT",
        help=(
            ".pth, .pt, .th, .safetensors (or its index), an Orbax folder; or the name of an "
            "architecture, with random weights."
        ),
    ),
]


@dataclass(frozen=True)
class InputFlags:
    """What the networks are fed."""

    batch: int = 3
    """Number of random, asymmetric images."""
    height: int | None = None
    """Of the images; by default an odd size that suits the stem."""
    width: int | None = None
    """Of the images; by default an even size that suits the stem."""
    seed: int = 0
    """Of the images, and of the weights where they are random."""
    input: Path | None = None
    """Images of your own instead: a .npy file, (N, H, W, C), normalised as the network expects
    them.
    """

    def images(self, config: Config) -> np.ndarray:
        """``(N, H, W, C)``, float64."""
        from flax_resblock.parity.inputs import adversarial_images, read_images

        if self.input is not None:
            return read_images(self.input, config)
        return adversarial_images(
            config, batch=self.batch, height=self.height, width=self.width, seed=self.seed
        )

    def check(self) -> None:
        """Raises InputError for numbers that make no images."""
        if self.batch < 1 or (self.height or 1) < 1 or (self.width or 1) < 1:
            raise InputError(
                f"--batch {self.batch}, --height {self.height} and --width {self.width} must "
                f"be positive."
            )


@dataclass(frozen=True)
class WhatFlags:
    """What is compared, and how strictly."""

    eval_only: bool = False
    """Evaluation mode only."""
    gradients: bool = False
    """Also gradients of every parameter, activation and the input."""
    isolated: bool = False
    """Also every layer by itself, fed PyTorch's own input, so that its own error shows."""
    steps: int = 0
    """Also so many training steps with each optimizer, everything compared after every step."""
    optimizer: Literal["both", "sgd", "adamw"] = "both"
    """Of those steps: SGD with Nesterov momentum and weight decay, AdamW, or both, one after the
    other.
    """
    learning_rate: float | None = None
    """Of those steps; by default one at which the first step moves no tensor by more than half a
    percent.
    """
    all: bool = False
    """Everything: --gradients --isolated --steps 5 --precision all. Without CKPT, on a set of
    networks with random weights.
    """
    precision: Literal["both", "float64", "float32", "bfloat16", "all"] = "both"
    """float64 proves that the algorithms are the same; both is float64 and float32. The truth is
    always PyTorch's float64.
    """
    rtol: float | None = None
    """Judge by a tolerance of your own, as numpy.allclose does, instead of by PyTorch's own
    rounding.
    """
    atol: float | None = None
    """Absolute part of that tolerance."""
    conv_lowering: Literal["xla", "auto"] = "xla"
    """How Flax computes convolutions: as XLA does on every device, or, on a CPU, in the forms that
    `train` and `predict` take there because they are faster.
    """

    def plan(self) -> Plan:
        """As the verifier takes it."""
        from flax_resblock.parity.comparison import Plan
        from flax_resblock.parity.oracle import Tolerance
        from flax_resblock.parity.trajectory import RECIPES

        if self.steps < 0 or (
            self.learning_rate is not None and not 0 < self.learning_rate < float("inf")
        ):
            raise InputError(
                f"--steps {self.steps} must not be negative and --learning-rate "
                f"{self.learning_rate} must be positive."
            )
        if any(
            value is not None and not 0 <= value < float("inf") for value in (self.rtol, self.atol)
        ):
            raise InputError(
                f"--rtol {self.rtol} and --atol {self.atol} must be numbers that are not negative."
            )
        if self.eval_only and self.steps:
            raise InputError(
                "--steps trains, and --eval-only asks for evaluation mode only; leave one of "
                "them out."
            )
        names = {"both": ("float64", "float32"), "all": ("float64", "float32", "bfloat16")}
        return Plan(
            train=not self.eval_only,
            gradients=self.gradients or self.all,
            isolated=self.isolated or self.all,
            steps=self.steps or (5 if self.all and not self.eval_only else 0),
            optimizers=tuple(RECIPES) if self.optimizer == "both" else (self.optimizer,),
            learning_rate=self.learning_rate,
            precisions=names.get(
                "all" if self.all and self.precision == "both" else self.precision,
                (self.precision,),
            ),
            tolerance=None
            if self.rtol is None and self.atol is None
            else Tolerance(self.rtol or 0.0, self.atol or 0.0),
            conv_lowering=self.conv_lowering,
        )


@dataclass(frozen=True)
class DeviceFlags:
    """Where each side computes; float64 is always computed on the CPU."""

    device: str | None = None
    """For JAX: cpu, gpu or tpu."""
    torch_device: str | None = None
    """For PyTorch: cpu, cuda, cuda:1, mps ..."""


@dataclass(frozen=True)
class ReportFlags:
    """What is written besides the terminal."""

    slots: bool = False
    """Print every slot, not only the worst of each kind."""
    json: Annotated[Path | None, tyro.conf.arg(aliases=["--json-file"])] = None
    """Write every measurement to this file; docs/verification.md describes the fields."""
    html: Path | None = None
    """Write a report to this file: one page that needs nothing else."""
    force: bool = False
    """Replace these files if they exist."""

    def check(self) -> None:
        """Raises InputError for files that exist, and says early what is not installed."""
        for path in (self.json, self.html):
            if path is not None:
                refuse_existing(path, self.force)
        missing = [
            name
            for name in ("jinja2", "matplotlib")
            if self.html is not None and find_spec(name) is None
        ]
        if missing:
            raise MissingDependencyError(
                f"--html needs {' and '.join(missing)}: pip install 'flax-resblock[report]'. "
                f"--json writes the same figures without."
            )


def verify(
    reading: ReadingFlags,
    input: InputFlags,
    what: WhatFlags,
    devices: DeviceFlags,
    report: ReportFlags,
    checkpoint: OptionalCheckpoint = None,
    torch: str | None = None,
    kwargs: str | None = None,
    certificate: Path | None = None,
    allow_nonfinite: bool = False,
) -> int:
    """Runs the network in PyTorch and in Flax side by side and compares every slot: tensors,
    activations in evaluation and training mode, running statistics after one batch and after five;
    with --gradients every gradient, with --steps whole training runs. Where something differs it
    says where it begins and, if it is a known mistake, which.

    float64 must agree to 1e-12. In float32 Flax's error against the float64 truth may be four times
    PyTorch's own, or 8 ulp. Exit status 1 when something differs.

    Args:
      reading: How to read the checkpoint.
      input: What the networks are fed.
      what: What is compared.
      devices: Where.
      report: What is written.
      torch: Examine a PyTorch module of your own instead: FILE.py:NAME or package.module:NAME, a
        class or function that makes it. Importing it runs its code. A block that asks for
        in_channels and out_channels is tried with several; it is held against the specification of
        a residual block.
      kwargs: Arguments of that class or function, as a JSON object.
      certificate: Check a parity.json that `convert` wrote: are the files still those that were
        verified? Runs no network.
      allow_nonfinite: Compare even if the checkpoint holds NaN, infinities or negative variances.
    """
    input.check()
    report.check()
    chosen = [
        name
        for name, value in (
            ("CKPT", checkpoint),
            ("--torch", torch),
            ("--certificate", certificate),
        )
        if value is not None
    ]
    if len(chosen) > 1:
        raise InputError(
            f"give one of {' and '.join(chosen)}, not both: each is verified by itself."
        )
    if certificate is not None:
        return _recheck(certificate)
    with _torch_needed():
        plan = what.plan()
        places, found = _devices(devices, plan)
    if torch is not None:
        return _verify_module(torch, kwargs, plan, places, input, report, found)
    if checkpoint is None and reading.architecture is None:
        if what.all:
            return _verify_battery(plan, places, input, report, found)
        raise InputError(
            "give a checkpoint or the name of an architecture to verify, --torch FILE.py:NAME "
            "for a PyTorch module of your own, or --all."
        )
    subject = _subject(checkpoint, reading, input, allow_nonfinite)
    images = input.images(subject.twins.config)
    output.print(
        f"[bold]{escape(name_of(subject.twins.config))}[/]  {escape(subject.title)}, input "
        f"{list(images.shape)}",
        soft_wrap=True,
    )
    print_notes(subject.notes)
    verification, facts = _run(subject.twins, images, plan, places, input, subject.facts, found)
    _print(verification, report, compared_with=subject.facts["compared_with"])
    consequences = [consequence.note for consequence in _consequences(subject, images)]
    print_notes(tuple(consequences))
    facts["notes"] += consequences
    _write(facts, report)
    return 0 if verification.passed else 1


@dataclass(frozen=True)
class _Subject:
    """What is verified: the twins, and what there is to say about where they come from."""

    twins: ReferencePair
    title: str
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()
    source: OpenedCheckpoint | None = None


def _consequences(subject: _Subject, images: np.ndarray) -> list[Consequence]:
    """What the choices that the weights do not show change."""
    if subject.source is None or not subject.source.assumed:
        return []
    from flax_resblock.parity.ambiguity import consequences

    with status.status("trying what was not assumed"):
        return list(consequences(subject.source, images))


def _subject(
    checkpoint: Path | None, reading: ReadingFlags, input: InputFlags, allow_nonfinite: bool
) -> _Subject:
    with _torch_needed():
        from flax_resblock.parity.provenance import of_source
        from flax_resblock.parity.reference import ReferencePair

    named = None if checkpoint is None else str(checkpoint)
    if checkpoint is None or (named in ARCHITECTURES and not checkpoint.exists()):
        name = named or str(reading.architecture)
        try:
            config = architecture(
                name,
                **({} if reading.num_classes is None else {"num_classes": reading.num_classes}),
            )
        except ValueError as error:
            raise InputError(str(error)) from error
        return _Subject(
            ReferencePair.random(config, input.seed),
            f"random weights, seed {input.seed}",
            {"subject": name, "compared_with": REFERENCE, "architecture": name},
        )
    source = reading.open(checkpoint)
    refuse_unhealthy(source, allow_nonfinite)
    return _Subject(
        ReferencePair.of(source), str(checkpoint), of_source(source), source.notes, source
    )


def _devices(flags: DeviceFlags, plan: Plan) -> tuple[Devices, list[Any]]:
    """The devices, once the guard has measured that they deliver what is asked for."""
    from flax_resblock.parity.devices import jax_device, torch_device
    from flax_resblock.parity.parts import Devices
    from flax_resblock.parity.precision import measure_precision, require, strict
    from flax_resblock.parity.switches import make_xla_deterministic, sentence

    make_xla_deterministic()
    places = Devices(jax_device(flags.device), torch_device(flags.torch_device))
    cpu = jax_device("cpu")
    found = []
    with status.status("measuring what precision each side delivers"), strict():
        for name in plan.precisions:
            found += measure_precision("flax", cpu if name == "float64" else places.jax, name)
            found += measure_precision(
                "torch", torch_device(None) if name == "float64" else places.torch, name
            )
    require(found)
    if (places.jax.platform if places.jax is not None else "cpu", places.torch.type) != (
        "cpu",
        "cpu",
    ):
        output.print(f"  {sentence()}", markup=False, soft_wrap=True)
    return places, found


def _run(
    twins: ReferencePair,
    images: np.ndarray,
    plan: Plan,
    places: Devices,
    input: InputFlags,
    facts: dict[str, Any],
    found: list[Any],
) -> tuple[Verification, dict[str, Any]]:
    """Verifies, with progress, and returns the report too."""
    from flax_resblock.parity.api import verify_pair
    from flax_resblock.parity.provenance import Clock
    from flax_resblock.parity.report import to_json

    clock = Clock()
    with status.status("starting") as spinner:
        verification = verify_pair(
            twins,
            images,
            plan,
            progress=partial(_show, spinner, "comparing"),
            seed=input.seed,
            devices=places,
        )
    provenance = {
        **facts,
        "conv_lowering": plan.conv_lowering,
        **clock.facts(images, input.seed, places),
    }
    return verification, to_json(
        verification.comparison, provenance, verification.diagnosis, found, verification.notes
    )


def _show(spinner: Status, what: str, step: str) -> None:
    """Progress; between two steps an interrupt that got lost is noticed."""
    still_wanted()
    spinner.update(escape(f"{what}: {step}"))


def _print(
    verification: Verification,
    report: ReportFlags,
    *,
    diagnosis: bool = True,
    compared_with: str = "",
) -> None:
    """Tables, verdict and, where it was not printed before, the diagnosis."""
    from flax_resblock.parity.report import slot_table, summary_table, verdict_lines

    comparison = verification.comparison
    if report.slots:
        for group, quantity, rows in comparison.groups():
            print_table(slot_table(rows, f"{quantity}, {group}"))
    print_table(summary_table(comparison))
    for line in verdict_lines(comparison, compared_with):
        output.print(
            line,
            style="bold green" if comparison.passed else "bold red",
            markup=False,
            soft_wrap=True,
        )
    for cause in verification.diagnosis if diagnosis else ():
        output.print(f"  {cause}", style="bold", markup=False, soft_wrap=True)
    print_notes(tuple(verification.notes))


def _write(facts: dict[str, Any], report: ReportFlags) -> None:
    """The files that were asked for, each complete or not at all."""
    texts: dict[Path, str] = {}
    if report.json is not None:
        texts[report.json] = json_module.dumps(facts, indent=1, allow_nan=False) + "\n"
    if report.html is not None:
        from flax_resblock.parity.page import render_page

        texts[report.html] = render_page(facts)
    for path, text in texts.items():
        with replacing(path, force=report.force) as temporary:
            temporary.write_text(text, encoding="utf-8")
        output.print(f"wrote {path}", markup=False, soft_wrap=True)


def _recheck(path: Path) -> int:
    """Are the files of a certificate still those that were verified?"""
    from flax_resblock.parity.certificate import recheck

    checks = recheck(path)
    for check in checks:
        colour = "green" if check.status == "unchanged" else "bold red"
        output.print(
            f"[{colour}]{check.status:<10}[/] {escape(check.output)}"
            + (f"  {escape('; '.join(check.details))}" if check.details else ""),
            soft_wrap=True,
        )
    return 0 if all(check.status == "unchanged" for check in checks) else 1


def _verify_battery(
    plan: Plan, places: Devices, input: InputFlags, report: ReportFlags, found: list[Any]
) -> int:
    """Every kind of block and network with random weights: what a new device or version of a
    framework is tried on.
    """
    from flax_resblock.parity.battery import BATTERY
    from flax_resblock.parity.reference import ReferencePair

    wrong, reports = 0, []
    for name, config in BATTERY.items():
        images = input.images(config)
        verification, facts = _run(
            ReferencePair.random(config, input.seed),
            images,
            plan,
            places,
            input,
            {"subject": name, "compared_with": REFERENCE, "architecture": name},
            found,
        )
        wrong += not verification.passed
        reports.append(facts)
        verdict = (
            f"[green]equal[/]  {len(verification.comparison.measurements)} tensors"
            if verification.passed
            else "[bold red]differs[/]"
        )
        output.print(
            f"{verdict}  [bold]{escape(name)}[/]  input {list(images.shape)}", soft_wrap=True
        )
        if not verification.passed:
            _print(verification, report)
    _write(next((facts for facts in reports if not facts["passed"]), reports[-1]), report)
    return 1 if wrong else 0


def _verify_module(
    spec: str,
    kwargs: str | None,
    plan: Plan,
    places: Devices,
    input: InputFlags,
    report: ReportFlags,
    found: list[Any],
) -> int:
    """Examines a person's own module and says what is wrong with it."""
    from flax_resblock.parity.provenance import Clock, of_module
    from flax_resblock.parity.report import to_json
    from flax_resblock.parity.user_module import cases_of, examine, load_factory

    try:
        arguments = None if kwargs is None else json_module.loads(kwargs)
    except ValueError as error:
        raise InputError(
            f"--kwargs {kwargs!r} is no JSON ({error}). Write it like --kwargs "
            f'\'{{"in_channels": 8, "out_channels": 16}}\'.'
        ) from error
    if arguments is not None and not isinstance(arguments, dict):
        raise InputError(f"--kwargs {kwargs!r} must be a JSON object, argument names to values.")
    factory = load_factory(spec)
    reports: list[dict[str, Any]] = []
    cases = []
    for call in cases_of(factory, arguments):
        clock = Clock()
        with status.status(f"examining {spec}") as spinner:
            case = examine(
                factory,
                call,
                plan,
                images=input.images,
                seed=input.seed,
                devices=places,
                progress=partial(_show, spinner, spec),
            )
        cases.append(case)
        if case.raised and not case.stated and arguments is not None:
            raise InputError(_cannot_run(case))
        verdict = "[green]equals its Flax twin[/]" if case.passed else "[bold red]wrong[/]"
        output.print(f"[bold]{escape(case.title)}[/]  {verdict}", soft_wrap=True)
        for finding in case.findings:
            output.print(f"  {finding}", markup=False, soft_wrap=True)
        if case.verification is not None and (report.slots or not case.passed):
            _print(case.verification, report, diagnosis=False)
        provenance = {
            **of_module(case),
            "conv_lowering": plan.conv_lowering,
            **clock.facts(input.images(case.config), input.seed, places),
        }
        reports.append(
            to_json(
                case.verification.comparison if case.verification else None,
                provenance,
                case.diagnosis,
                found,
            )
        )
    if all(case.raised and not case.stated for case in cases):
        raise InputError(_cannot_run(cases[0]))
    if report.json is not None or report.html is not None:
        chosen = next((facts for facts in reports if not facts["passed"]), reports[0])
        if len(reports) > 1:
            wrong = sum(not facts["passed"] for facts in reports)
            chosen["notes"].append(
                f"{len(reports)} calls of {spec} were tried and {wrong} found wrong; this is "
                f"the report of one, the terminal shows all"
            )
        _write(chosen, report)
    return 0 if all(facts["passed"] for facts in reports) else 1


def _cannot_run(case: Case) -> str:
    words = (
        f"its names and shapes are those of {name_of(case.config)}, so it was fed (N, C, H, W) "
        f"images with {case.config.in_channels} channels"
    )
    return (
        f"{case.title}: {case.raised}. There is nothing to compare: {words}. Repair its forward, "
        f"or say other arguments with --kwargs."
    )
