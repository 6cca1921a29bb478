"""``flax-resblock verify``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.markup import escape

from flax_resblock.checkpoint import is_ported
from flax_resblock.cli import common, verify_flags
from flax_resblock.cli.verify_port import verify_port
from flax_resblock.cli.verify_run import Verifier, devices_of
from flax_resblock.cli.wording import in_flags
from flax_resblock.config import name_of
from flax_resblock.errors import InputError
from flax_resblock.parity.certificate import REFERENCE

if TYPE_CHECKING:
    from flax_resblock.convert.opening import OpenedCheckpoint
    from flax_resblock.parity.reference import ReferencePair

OptionalCheckpoint = Annotated[
    Path | None,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="CKPT",
        help=(
            "A .pth, .pt, .th or .safetensors file (or its index), an Orbax folder, or the name of "
            "an architecture, with random weights."
        ),
    ),
]


def verify(
    reading: common.ReadingFlags,
    input: verify_flags.InputFlags,
    what: verify_flags.WhatFlags,
    devices: verify_flags.DeviceFlags,
    report: verify_flags.ReportFlags,
    checkpoint: OptionalCheckpoint = None,
    torch: str | None = None,
    kwargs: str | None = None,
    flax: str | None = None,
    certificate: Path | None = None,
    allow_nonfinite: common.AllowNonfinite = False,
) -> int:
    """Runs the network in PyTorch and in Flax side by side and compares every slot: tensors,
    activations in evaluation and training mode, running statistics after one batch and after five,
    and on request gradients and training runs. It says where a difference begins and, if it is a
    known mistake, which.

    For example:

      flax-resblock verify resnet50.pth --gradients --html report.html

      flax-resblock verify --torch net.py:Block

      flax-resblock verify --torch net.py:Net --flax out/net.py:Net

    float64 must agree to 1e-12. In float32 Flax's error against the float64 truth may be four times
    PyTorch's own, or 8 ulp. Exit status 1 if something differs.

    Args:
      torch: Examine a PyTorch module of your own instead: FILE.py:NAME or package.module:NAME of a
        class or function that creates it. Importing it runs its code. A block with in_channels and
        out_channels is tried with several values and compared with the specification of a residual
        block. A network of another kind is ported and compared with its port, under the names of
        its modules; so is every network for which CKPT is given, with these weights.
      kwargs: Arguments of that class or function, as a JSON object.
      flax: Compare that module with this network, FILE.py:NAME in the folder that
        flax-resblock port wrote. You may have edited the file. Importing it runs its code. The
        weights are those of the folder, or of CKPT.
      certificate: Check instead whether the files of a certificate that convert wrote are
        unchanged. Runs no network.
    """
    verify_flags.be_frugal()
    input.check()
    report.check()
    subjects = {"CKPT": checkpoint, "--torch": torch, "--certificate": certificate}
    chosen = [name for name, value in subjects.items() if value is not None]
    with_weights = chosen == ["CKPT", "--torch"]
    if len(chosen) > 1 and not with_weights:
        raise InputError(f"give one of {' and '.join(chosen)}, not both: each is verified alone.")
    if certificate is not None:
        return _recheck(certificate)
    if flax is not None and torch is None:
        raise InputError(
            f"--flax {flax} is compared with your own PyTorch module: say which, with "
            f"--torch FILE.py:NAME."
        )
    if checkpoint is not None and is_ported(checkpoint):
        raise InputError(
            f"{checkpoint} is the folder of a port. It is compared with your PyTorch module by "
            f"flax-resblock verify --torch FILE.py:NAME --flax {checkpoint}/FILE.py:NAME, which "
            f"runs the code of both files."
        )
    with verify_flags.torch_needed():
        plan = what.plan()
        places, precision = devices_of(devices, plan)
    verifier = Verifier(plan, places, precision, input, report)
    if torch is not None and (flax is not None or checkpoint is not None):
        options: Any = {"weights": checkpoint, "flax": flax, "reading": reading}
        return verify_port(verifier, torch, kwargs, **options)
    if torch is not None:
        from flax_resblock.parity.user_module import NoSpecificationError

        try:
            return verifier.module(torch, kwargs)
        except NoSpecificationError as error:
            return verify_port(verifier, torch, kwargs, refusal=error)
    if checkpoint is None and reading.architecture is None:
        if what.all:
            return verifier.battery()
        raise InputError(
            "give a checkpoint or the name of an architecture to verify, --torch FILE.py:NAME "
            "for a PyTorch module of your own, or --all."
        )
    subject = _subject(checkpoint, reading, input.seed, allow_nonfinite)
    config = subject.pair.config
    images = input.images(config)
    common.print_title(name_of(config), f"{subject.title}, input {list(images.shape)}")
    common.print_notes(subject.notes)
    verification, facts = verifier.pair(subject.pair, images, subject.facts)
    verifier.print(verification, compared_with=subject.facts["compared_with"])
    notes = _consequences(subject, images)
    common.print_notes(notes)
    facts["notes"] += notes
    verifier.write(facts)
    return 0 if verification.passed else 1


@dataclass(frozen=True)
class _Subject:
    """The pair of networks to verify, and where it comes from."""

    pair: ReferencePair
    title: str
    facts: dict[str, Any]
    notes: Sequence[str] = ()
    source: OpenedCheckpoint | None = None


def _consequences(subject: _Subject, images: Any) -> list[str]:
    """What the assumptions about the checkpoint change."""
    if subject.source is None or not subject.source.assumed.choices:
        return []
    from flax_resblock.parity.reference import consequences

    with common.status.status("trying what was not assumed"):
        return [in_flags(consequence.note) for consequence in consequences(subject.source, images)]


def _subject(
    checkpoint: Path | None, reading: common.ReadingFlags, seed: int, allow_nonfinite: bool
) -> _Subject:
    with verify_flags.torch_needed():
        from flax_resblock.parity.reference import ReferencePair
        from flax_resblock.parity.report import checkpoint_facts

    if checkpoint is None or common.is_architecture(checkpoint):
        name = str(checkpoint or reading.architecture)
        pair = ReferencePair.random(reading.named(name), seed)
        facts = {"subject": name, "compared_with": REFERENCE, "architecture": name}
        return _Subject(pair, f"random weights, seed {seed}", facts)
    source = reading.open(checkpoint)
    common.refuse_unhealthy(source, allow_nonfinite)
    pair = ReferencePair.of(source)
    return _Subject(pair, str(checkpoint), checkpoint_facts(source), source.all_notes, source)


def _recheck(path: Path) -> int:
    from flax_resblock.parity.certificate import recheck

    checks = recheck(path)
    for check in checks:
        colour = "green" if check.status == "unchanged" else "bold red"
        details = f"  {escape('; '.join(check.details))}" if check.details else ""
        common.output.print(
            f"[{colour}]{check.status:<10}[/] {escape(check.output)}{details}", soft_wrap=True
        )
    return 0 if all(check.status == "unchanged" for check in checks) else 1
