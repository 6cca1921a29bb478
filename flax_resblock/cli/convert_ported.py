"""``flax-resblock convert`` for ported networks: back to PyTorch."""

from __future__ import annotations

from pathlib import Path

from flax_resblock import checkpoint
from flax_resblock.cli import common
from flax_resblock.convert.image_facts import read_images
from flax_resblock.convert.opening import read_entry
from flax_resblock.errors import InputError


def from_ported(
    path: Path,
    out: Path,
    reading: common.ReadingFlags,
    training: common.RunFlags,
    other: str | None,
    force: bool,
) -> int:
    """Writes the state dict of the user's own network, and its run, from the folder that ``port``
    wrote, or from a checkpoint or run of that network. ``other`` is a naming scheme, or code to
    compare with, for which there is no place here."""
    format_name = checkpoint.output_format(out)
    if other is not None or format_name == "orbax":
        raise InputError(
            f"{path} is a network of your own that was ported: it is converted to the names of "
            f"your PyTorch module, as .pth or .safetensors, without --torch or --to-naming."
        )
    from flax_resblock.port.folder import opened_folder, opened_ported
    from flax_resblock.runs.own import write_own

    kind = "a ported network"
    with common.status.status(f"reading {path}"):
        if checkpoint.is_ported(path):
            weights, opened = opened_folder(path, reading.limits)
        else:
            kind = "the run of a ported network"
            found = read_entry(path, reading.entry, run=training.carry, limits=reading.limits)
            weights, opened = opened_ported(found)
        run, left = training.carried(opened)
    name = str(weights.table.about.get("network"))
    with common.status.status(f"writing {out}"):
        images = read_images(opened.record.metadata, opened.record.source)
        about = images.metadata
        write_own(out, weights.values, weights.table, run, name, about, force=force)
    count, size = len(weights.table.entries), sum(one.nbytes for one in opened.tensors.values())
    common.print_title(
        path.name, f"{count} tensors, {common.megabytes(size)}, read back and equal bit for bit"
    )
    common.say(f"  from  {path} ({kind})")
    common.say(f"  to    {out} ({format_name}, the names of your PyTorch module)")
    common.print_carried(run, left)
    return 0
