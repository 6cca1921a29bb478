"""Runs, prints and writes verifications for ``flax-resblock verify``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from flax_resblock.cli.common import (
    arguments_of,
    output,
    print_note,
    print_notes,
    print_table,
    say,
    status,
    write_text,
)
from flax_resblock.cli.interrupts import still_wanted
from flax_resblock.cli.verify_flags import DeviceFlags, InputFlags, ReportFlags
from flax_resblock.cli.wording import in_flags
from flax_resblock.config import Config, ResNetConfig, name_of
from flax_resblock.errors import InputError
from flax_resblock.parity.certificate import REFERENCE

if TYPE_CHECKING:
    import numpy as np
    from rich.status import Status

    from flax_resblock.parity.api import Verification
    from flax_resblock.parity.comparison import Plan
    from flax_resblock.parity.pair import Pair
    from flax_resblock.parity.parts import Devices
    from flax_resblock.parity.report import Clock
    from flax_resblock.parity.user_module import ExaminedModule


def devices_of(flags: DeviceFlags, plan: Plan) -> tuple[Devices, list[Any]]:
    """The devices, and the precision that each side was measured to deliver on them; raises
    InputError if a device does not exist or does not deliver the precision that it is asked for."""
    from flax_resblock.parity import devices
    from flax_resblock.parity.parts import Devices
    from flax_resblock.parity.precision import measure_precision, require

    devices.make_xla_deterministic()
    places = Devices(devices.jax_device(flags.device), devices.torch_device(flags.torch_device))
    cpu, torch_cpu = devices.jax_device("cpu"), devices.torch_device(None)
    found = []
    with status.status("measuring what precision each side delivers"), devices.strict():
        for name in plan.precisions:
            on_cpu = name == "float64"
            found += measure_precision("flax", cpu if on_cpu else places.jax, name)
            found += measure_precision("torch", torch_cpu if on_cpu else places.torch, name)
    require(found)
    platform = places.jax.platform if places.jax is not None else "cpu"
    if (platform, places.torch.type) != ("cpu", "cpu"):
        say(f"  {devices.settings_sentence()}")
    return places, found


@dataclass(frozen=True)
class Verifier:
    """Verifies as the flags say, on devices whose ``precision`` :func:`devices_of` measured."""

    plan: Plan
    places: Devices
    precision: list[Any]
    input: InputFlags
    report: ReportFlags

    def pair(
        self, pair: Pair, images: np.ndarray, facts: Mapping[str, Any]
    ) -> tuple[Verification, dict[str, Any]]:
        """Verifies a pair of networks; returns the report too, which holds ``facts``."""
        from flax_resblock.parity.api import verify_pair
        from flax_resblock.parity.report import Clock, report_json

        clock = Clock()
        with status.status("starting") as spinner:
            verification = verify_pair(
                pair,
                images,
                self.plan,
                progress=partial(_show, spinner, "comparing"),
                seed=self.input.seed,
                devices=self.places,
            )
        comparison, provenance = verification.comparison, self._provenance(facts, clock, images)
        content = report_json(
            comparison,
            provenance,
            verification.diagnosis,
            self.precision,
            [*map(in_flags, verification.notes)],
        )
        return verification, content

    def _provenance(
        self, facts: Mapping[str, Any], clock: Clock, images: np.ndarray
    ) -> dict[str, Any]:
        measured = clock.facts(images, self.input.seed, self.places)
        return {**facts, "conv_lowering": self.plan.conv_lowering, **measured}

    def battery(self) -> int:
        """Verifies every kind of block and network with random weights."""
        from flax_resblock.parity.battery import BATTERY
        from flax_resblock.parity.reference import ReferencePair

        reports = []
        for name, config in BATTERY.items():
            images = self.input.images(config)
            pair = ReferencePair.random(config, self.input.seed)
            subject = {"subject": name, "compared_with": REFERENCE, "architecture": name}
            verification, facts = self.pair(pair, images, subject)
            reports.append(facts)
            equal = f"[green]equal[/]  {len(verification.comparison.measurements)} tensors"
            verdict = equal if verification.passed else "[bold red]differs[/]"
            shape = list(images.shape)
            output.print(f"{verdict}  [bold]{escape(name)}[/]  input {shape}", soft_wrap=True)
            if not verification.passed:
                self.print(verification)
        self.write_all(reports)
        return 0 if all(facts["passed"] for facts in reports) else 1

    def module(self, spec: str, kwargs: str | None) -> int:
        """Examines a PyTorch module of the user's own and says what is wrong with it."""
        from flax_resblock.parity.report import Clock, examined_facts, report_json
        from flax_resblock.parity.user_code import load_factory
        from flax_resblock.parity.user_module import cases_of, examine

        arguments = arguments_of(kwargs)
        factory = load_factory(spec)
        reports: list[dict[str, Any]] = []
        cases: list[ExaminedModule] = []
        for call in cases_of(factory, arguments):
            clock = Clock()
            with status.status(f"examining {spec}") as spinner:
                case = examine(
                    factory,
                    call,
                    self.plan,
                    images=self.input.images,
                    any_size=self.input.is_default,
                    seed=self.input.seed,
                    devices=self.places,
                    progress=partial(_show, spinner, spec),
                )
            cases.append(case)
            if case.raised and not case.stated and arguments is not None:
                raise InputError(_cannot_run(case.title, case.raised, case.config))
            verdict = "[green]equals its Flax network[/]" if case.passed else "[bold red]wrong[/]"
            output.print(f"[bold]{escape(case.title)}[/]  {verdict}", soft_wrap=True)
            for finding in case.findings:
                say(f"  {finding}")
            if case.passed and case.verification is not None:
                print_notes(case.verification.notes)
            if case.verification is not None and (self.report.slots or not case.passed):
                self.print(case.verification, diagnosis=False)
            images = self.input.images(case.config) if case.images is None else case.images
            provenance = self._provenance(examined_facts(case), clock, images)
            comparison = case.verification.comparison if case.verification else None
            reports.append(report_json(comparison, provenance, case.diagnosis, self.precision))
        if all(case.raised and not case.stated for case in cases):
            raise InputError(_cannot_run(cases[0].title, cases[0].raised, cases[0].config))
        self.write_all(reports)
        passed = all(facts["passed"] for facts in reports)
        if not passed and all(isinstance(case.config, ResNetConfig) for case in cases):
            print_note(
                f"if {spec} is meant to differ from this library's network: flax-resblock port "
                f"{spec} FOLDER writes it as Flax source of its own"
            )
        return 0 if passed else 1

    def print(
        self, verification: Verification, *, diagnosis: bool = True, compared_with: str = ""
    ) -> None:
        """Prints tables, verdict and, unless it was printed before, the diagnosis."""
        from flax_resblock.parity.report import slot_table, summary_table, verdict_lines

        comparison = verification.comparison
        if self.report.slots:
            for group, quantity, rows in comparison.groups():
                print_table(slot_table(rows, f"{quantity}, {group}"))
        print_table(summary_table(comparison))
        for line in verdict_lines(comparison, compared_with):
            say(line, "bold green" if comparison.passed else "bold red")
        for cause in verification.diagnosis if diagnosis else ():
            say(f"  {cause}", "bold")
        print_notes(verification.notes)

    def write_all(self, reports: list[dict[str, Any]]) -> None:
        """Writes reports as one: the first that failed, or the first, with the others in it."""
        chosen = next((facts for facts in reports if not facts["passed"]), reports[0])
        others = [facts for facts in reports if facts is not chosen]
        self.write(chosen | ({"other_calls": others} if others else {}))

    def write(self, facts: dict[str, Any]) -> None:
        """Writes the files that were asked for."""
        flags, pages = self.report, {}
        if flags.json is not None:
            pages[flags.json] = json.dumps(facts, indent=1, allow_nan=False) + "\n"
        if flags.html is not None:
            from flax_resblock.parity.page import render_page

            pages[flags.html] = render_page(facts)
        for path, text in pages.items():
            write_text(path, text, flags.force)


def _show(spinner: Status, what: str, step: str) -> None:
    """Shows progress, and notices an interrupt that compiled code swallowed."""
    still_wanted()
    spinner.update(escape(f"{what}: {step}"))


def _cannot_run(title: str, raised: str | None, config: Config) -> str:
    return (
        f"{title}: {raised}. There is nothing to compare: its names and shapes are those of "
        f"{name_of(config)}, so it was fed (N, C, H, W) images with {config.in_channels} channels. "
        f"Repair its forward, or say other arguments with --kwargs."
    )
