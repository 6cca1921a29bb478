"""``flax-resblock convert``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resblock import checkpoint
from flax_resblock.cli import common
from flax_resblock.cli.common import arguments_of
from flax_resblock.cli.convert_ported import from_ported
from flax_resblock.cli.verify_flags import be_frugal, torch_needed
from flax_resblock.cli.wording import in_flags
from flax_resblock.config import name_of
from flax_resblock.convert import StateMap, naming_of
from flax_resblock.convert.hubs import files_of
from flax_resblock.convert.metadata import PORT, metadata_of
from flax_resblock.convert.opened import OpenedCheckpoint, ReadOptions, target_naming
from flax_resblock.convert.state_map import transcode
from flax_resblock.errors import InputError
from flax_resblock.export.torch_code import torch_code as torch_code_of
from flax_resblock.parity.certificate import certificate_of
from flax_resblock.parity.certify import certify, provenance, refuse_foreign_certificate
from flax_resblock.runs.run_file import write_with_run

Output = Annotated[
    Path,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="OUT",
        help="The output: .pth, .pt, .th, .safetensors, or no suffix for an Orbax folder.",
    ),
]


def convert(
    checkpoint_: common.Checkpoint,
    out: Output,
    reading: common.ReadingFlags,
    training: common.RunFlags,
    to_naming: str | None = None,
    torch: str | None = None,
    kwargs: str | None = None,
    image_size: tuple[int, int] | None = None,
    allow_nonfinite: common.AllowNonfinite = False,
    force: common.Force = False,
    no_certificate: bool = False,
    torch_code: Path | None = None,
) -> int:
    """Converts a checkpoint from any format to any other, in either direction, bit for bit.

    For example:

      flax-resblock convert resnet50.pth resnet50.safetensors

      flax-resblock convert resnet50.pth resnet50_flax

      flax-resblock convert net.pth net.safetensors --torch net.py:Net

      flax-resblock convert runs/digits run.pth --with-optimizer

      flax-resblock convert ported_folder back.pth

      flax-resblock convert runs/own back.pth --with-optimizer

    The suffix of OUT decides the format: .pth for PyTorch, .safetensors for either framework, none
    for an Orbax folder with Flax names, or, with --to-naming huggingface or timm, for a folder with
    a config.json that transformers or timm loads. The output is written under a temporary name,
    read back, compared by SHA-256, and only then renamed. Then Flax and the reference
    network in PyTorch compute with it, every slot, in float64, and the certificate,
    OUT.parity.json (or parity.json in OUT, if that is a folder), records the result, what was
    assumed, and the SHA-256 of everything. Your own code is seen with --torch
    alone: then nothing is assumed, and your module is run and compared as well. Exit status 1 if
    the frameworks differ.

    Args:
      training: What to do with the training run in it.
      to_naming: Naming scheme of the output: torchvision, huggingface, timm and others listed in
        docs/families.md, or flax (.safetensors only). By default the names stay.
      torch: The class or function that creates the network, FILE.py:NAME or package.module:NAME.
        Importing it runs its code. CKPT is loaded into it, strictly, and Flax has to compute what
        it computes, in float32 and float64.
      kwargs: Arguments of that class or function, as a JSON object.
      image_size: Height and width of the images that it is run on; found by trying 32, 64 and 224
        if left out.
      no_certificate: Write no certificate, and do not run the two frameworks.
      torch_code: Also write the network as a file of plain PyTorch, whose network() takes the
        converted weights with strict=True. Networks that pad as JAX programs do are in no package
        of PyTorch's.
    """
    be_frugal()
    format_name = checkpoint.output_format(out)
    checkpoint.refuse_existing(out, force, checkpoint.is_orbax)
    common.refuse_all_existing(force, torch_code)
    if checkpoint.is_ported(checkpoint_) or PORT in checkpoint.metadata_in(checkpoint_):
        return from_ported(checkpoint_, out, reading, training, to_naming or torch, force)
    if not no_certificate:
        refuse_foreign_certificate(out)
    if to_naming is not None:
        naming_of(to_naming)  # refuses an unknown name before anything is read
    with common.status.status(f"reading {checkpoint_}"):
        its = torch, kwargs, image_size
        source, module = _opened(checkpoint_, out, reading, training.carry, *its)
        common.refuse_unhealthy(source, allow_nonfinite)
        target = StateMap(source.config, target_naming(source, format_name, to_naming))
        code = None if torch_code is None else _torch_code(target, source.norm_options)
        files = None
        if format_name == "orbax" and target.naming.hub:
            format_name = f"folder for {target.naming.hub}"
            about = source.record.metadata
            files = files_of(target.naming.hub, source.config, about, source.images)
        tensors = target.written(transcode(source.state_map, target, source.tensors))
        origin = None if no_certificate else provenance(source)  # now, as OUT may replace it
        if origin is not None and module is not None:
            origin["module"] = module
        run, left = training.carried(source)
    # lets go of the file's memory before the output is read back
    origin_format, scheme = source.record.format, source.state_map.naming
    notes, options = tuple(map(in_flags, source.all_notes)), source.norm_options
    about, source = source.record.metadata, None
    with common.status.status(f"writing {out}"):
        naming = scheme if target.naming.name == "flax" else target.naming
        count, size = len(tensors), sum(value.nbytes for value in tensors.values())
        metadata = metadata_of(target.config, naming, options, about)
        write_with_run(out, tensors, metadata, run, target, files=files, force=force, release=True)
    facts = f"{count} tensors, {common.megabytes(size)}, read back and equal bit for bit"
    common.print_title(name_of(target.config), facts)
    common.say(f"  from  {checkpoint_} ({origin_format}, naming scheme '{scheme.name}')")
    common.say(f"  to    {out} ({format_name}, naming scheme '{target.naming.name}')")
    common.print_notes(notes)
    if module is not None:
        common.say(
            f"  equal {module['spec']} computes the same: float64 {_figure(module['float64'])}, "
            f"float32 {_figure(module['float32'])} (relative, images of "
            f"{'x'.join(map(str, module['image_size']))})"
        )
    common.print_carried(run, left)
    if code is not None and torch_code is not None:
        common.write_text(torch_code, code, force)
    elif getattr(target.config, "padding", "") == "same" and not target.naming.as_in_flax:
        common.print_note(OTHER_PADDING)
    if origin is None:
        return 0
    options = ReadOptions(architecture=target.config, naming=target.naming, limits=reading.limits)
    return _certify(out, options, origin, notes)


OTHER_PADDING = (
    "strided convolutions and pooling pad as in TensorFlow and Flax ('SAME'); PyTorch's own "
    "classes load these weights and compute something else (--torch-code FILE.py writes the "
    "network)"
)
"""Said of weights under names that a class of another function has, too."""


def _torch_code(target: StateMap, norm_options: Mapping[str, float | None]) -> str:
    names = [one.torch_key for one in StateMap(target.config, "torchvision").entries]
    if names != [one.torch_key for one in target.entries]:
        raise InputError(
            f"--torch-code writes a network with torchvision's names, and the output has those of "
            f"{target.naming.name!r}. Add --to-naming torchvision."
        )
    return torch_code_of(target.config, norm_options)


def _figure(value: float | None) -> str:
    return "not compared" if value is None else f"{value:.1e}"


def _opened(
    path: Path,
    out: Path,
    reading: common.ReadingFlags,
    run: bool,
    torch: str | None,
    kwargs: str | None,
    image_size: tuple[int, int] | None,
) -> tuple[OpenedCheckpoint, dict[str, Any] | None]:
    """The checkpoint, and what its own module was found to compute; None where there is none."""
    if torch is None:
        if kwargs is not None or image_size is not None:
            raise InputError("--kwargs and --image-size go with --torch FILE.py:NAME.")
        return reading.open(path, run=run), None
    with torch_needed():
        from flax_resblock.parity.forward_check import SIZES
        from flax_resblock.parity.live_module import OwnNetwork

    if image_size is not None and min(image_size) < 1:
        raise InputError("--image-size takes two positive numbers, height and width.")
    sizes = SIZES if image_size is None else (image_size,)
    record = checkpoint.read(path, entry=reading.entry, run=run, limits=reading.limits)
    ported_by = ["flax-resblock", "port", torch, str(path), _new_folder(out)]
    ported_by += ["--kwargs", kwargs] if kwargs is not None else []
    ported_by += ["--image-size", *map(str, image_size)] if image_size is not None else []
    ported_by += ["--entry", reading.entry] if reading.entry is not None else []
    # port drops no tensors, so that it is no way out for a file of which some are ignored
    command = "" if reading.ignore else shlex.join(ported_by)
    network = OwnNetwork(torch, arguments_of(kwargs) or {}, sizes, command)
    return network.read(record, reading.options())


def _new_folder(out: Path) -> str:
    """A folder beside the output that is not there yet."""
    folder = out.with_suffix("")
    return str(folder.with_name(f"{folder.name}_ported") if folder.exists() else folder)


def _certify(
    out: Path, reading: ReadOptions, origin: Mapping[str, Any], notes: tuple[str, ...]
) -> int:
    with common.status.status(f"verifying {out}"):
        verification = certify(out, reading, origin, notes)
    path = certificate_of(out)
    if "skipped" in verification:
        common.say(f"  parity  not verified: {verification['skipped']}", "yellow")
        common.say(f"  wrote   {path}, the SHA-256 of all files and tensors")
        return 0
    worst = verification["worst"]
    measured = (
        f"{worst['slot']} ({worst['quantity']}) differs by {float(worst['error']):.1e} in "
        f"float64, limit {worst['limit']:g}"
    )
    if verification["passed"]:
        common.say(
            f"  parity  {verification['tensors']} tensors of Flax agree with PyTorch, compared "
            f"with {verification['compared_with']}; the worst, {measured}"
        )
        common.say(
            f"  wrote   {path}, the certificate: this result, what was assumed, and the SHA-256 of "
            f"all files and tensors; `verify --certificate` checks them again"
        )
        return 0
    print(
        f"flax-resblock: {out} holds every tensor bit for bit, but PyTorch and Flax do not "
        f"compute the same with it: {measured}. {path} records it. "
        f"Do not use it in Flax yet; see `flax-resblock verify {out} --slots` for every slot.",
        file=sys.stderr,
    )
    return 1
