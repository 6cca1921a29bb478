"""``flax-resblock convert``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

from flax_resblock import checkpoint
from flax_resblock.architecture import name_of
from flax_resblock.cli.common import Checkpoint, ReadingFlags, megabytes, output, print_notes, refuse_unhealthy, status
from flax_resblock.convert import LAYOUTS, StateMap
from flax_resblock.convert.source import Source, metadata_of, target_layout
from flax_resblock.convert.state_map import transcode
from flax_resblock.errors import InputError, some

Output = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="Name ending in .pth, .pt, .th, .safetensors, or none for an Orbax folder.")]


def convert(
    checkpoint_: Checkpoint,
    out: Output,
    reading: ReadingFlags,
    to_layout: str | None = None,
    allow_nonfinite: bool = False,
    force: bool = False,
) -> int:
    """Converts a checkpoint from any format to any other, in either direction, bit for bit.

    The suffix of OUT decides the format: .pth for PyTorch, .safetensors for either framework, no suffix for an Orbax folder with Flax names. The output
    is written under a temporary name, read back, compared by SHA-256, and only then renamed into place.

    Args:
      reading: How to read the checkpoint.
      to_layout: Naming scheme of the output: torchvision, sequential, kuangliu, akamaster, or flax (.safetensors only). By default the names stay.
      allow_nonfinite: Carry NaN, infinities and negative variances.
      force: Replace OUT if it exists.
    """
    format_name = checkpoint.output_format(out)
    checkpoint.refuse_existing(out, force)
    if to_layout is not None and to_layout not in LAYOUTS:
        raise InputError(f"layout {to_layout!r} is unknown; known: {', '.join(LAYOUTS)}.")
    with status.status(f"reading {checkpoint_}"):
        source = reading.open(checkpoint_)
        if source.afresh:
            raise InputError(f"{checkpoint_} lacks {some(list(source.afresh))}; convert writes what a checkpoint holds and starts nothing afresh.")
        refuse_unhealthy(source, allow_nonfinite)
        target = StateMap(source.config, LAYOUTS[target_layout(source, format_name, to_layout)])
        tensors = transcode(source.state_map, target, source.tensors)
    description, source = _describe(source), None  # lets go of the file's memory before the output is read back
    with status.status(f"writing {out}"):
        layout = description.layout if target.layout.name == "flax" else target.layout.name
        count, size = len(tensors), sum(value.nbytes for value in tensors.values())
        checkpoint.write(out, tensors, metadata=metadata_of(target.config, layout, description.norm_options), force=force, release=True)
    output.print(f"[bold]{name_of(target.config)}[/]: {count} tensors, {megabytes(size)}, read back and equal bit for bit", soft_wrap=True)
    output.print(f"  from  {checkpoint_} ({description.format}, layout '{description.layout}')", markup=False, soft_wrap=True)
    output.print(f"  to    {out} ({format_name}, layout '{target.layout.name}')", markup=False, soft_wrap=True)
    print_notes(description.notes)
    return 0


class _Description(NamedTuple):
    """What is still needed of a source once its tensors are converted."""

    format: str
    layout: str
    notes: tuple[str, ...]
    norm_options: Mapping[str, float | None]


def _describe(source: Source) -> _Description:
    return _Description(source.record.format, source.state_map.layout.name, source.notes, source.norm_options)
