"""``flax-resblock port``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import tyro

from flax_resblock import checkpoint
from flax_resblock.checkpoint import LIMITS, Limits
from flax_resblock.cli import common
from flax_resblock.cli.common import arguments_of
from flax_resblock.cli.verify_flags import torch_needed
from flax_resblock.errors import InputError


def port(
    network: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE.py:NAME", help="Your network.")
    ],
    checkpoint_: Annotated[
        Path,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="CKPT", help="Its weights; leave it out for those it starts with."),
    ],
    out: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="The folder to write.")
    ] = None,
    kwargs: str | None = None,
    image_size: tuple[int, int] | None = None,
    inputs: str | None = None,
    entry: str | None = None,
    exact: bool = False,
    expand: bool = False,
    fold_layout: bool = False,
    force: common.Force = False,
    limits: Limits = LIMITS,
) -> int:
    """Writes your PyTorch network as Flax source, with its weights and the proof that it computes
    the same.

    For example:

      flax-resblock port net.py:Net weights.pth out

      flax-resblock port net.py:Net weights.pth out --kwargs '{"num_classes": 10}' --exact

      flax-resblock convert out back.pth

    The network is created, loaded with the checkpoint, traced in evaluation mode and written as one
    Flax NNX class for each class of yours, with your names; images have their channels last. Then
    both are run on random images: every layer, in evaluation and in training mode, the running
    statistics and every gradient. Only what agrees is written: OUT/NAME.py, which needs jax, flax
    and flax_resblock but not torch, weights.safetensors, port.json (which tensor went where) and
    parity.json, the certificate.

    In Python: `from out.net import Net; model = flax_resblock.load_ported("out", Net)`.

    Args:
      network: The class or function that creates the network, FILE.py:NAME or package.module:NAME.
        Importing it runs its code.
      kwargs: Arguments of that class or function, as a JSON object.
      image_size: Height and width of the images that it is traced with; found by trying 64, 32,
        96, 224 and 299 if left out.
      inputs: The shapes of what it takes if that is something else than one image, in PyTorch, the
        batch first: '2,3,64,64;2,10'.
      entry: The entry of the checkpoint that holds the weights.
      exact: Train both for five steps as well, and compare weights and statistics to 1e-10.
      expand: Write out a network that this library has already, such as a ResNet of torchvision,
        which is otherwise one line that creates it.
      fold_layout: Let a linear layer take a flattened map with channels last, with the rows of its
        weight in that order, instead of a transpose in front of it.
      limits: Limits on what the file may declare before it is refused.
    """
    if image_size is not None and inputs is not None:
        raise InputError("--inputs has the size of images too; leave --image-size out.")
    weights, folder = (None, checkpoint_) if out is None else (checkpoint_, out)
    if image_size is not None and min(image_size) < 1:
        raise InputError("--image-size takes two positive numbers, height and width.")
    with torch_needed():
        from flax_resblock.parity.live_module import load_into, source_hash
        from flax_resblock.parity.user_code import load_factory
        from flax_resblock.parity.user_module import made_by
        from flax_resblock.port.porting import port as port_module
    from flax_resblock.parity.certificate import hashes
    from flax_resblock.port.folder import save_ported

    checkpoint.refuse_existing(folder, force, checkpoint.is_ported)
    factory = load_factory(network, "")
    module = made_by(factory, arguments_of(kwargs) or {}, f"{network}: calling it")
    source = None
    if weights is not None:
        with common.status.status(f"reading {weights}"):
            record = checkpoint.read(weights, entry=entry, limits=limits)
            load_into(module, record.tensors, record.source)
            source = {"path": weights.name, "sha256": hashes(Path(record.source))}
    with common.status.status(f"porting {network} and comparing both"):
        ported = port_module(
            module,
            image_size=image_size,
            example_inputs=inputs,
            exact=exact,
            expand=expand,
            fold_layout=fold_layout,
            origin=network,
        )
    stem = _stem(network, ported.name)
    about = {"spec": network, "sha256": source_hash(factory)}
    with common.status.status(f"writing {folder}"):
        save_ported(ported, folder, stem=stem, source=source, module=about, force=force)
    lines, count = len(ported.source.splitlines()), len(ported.table.entries)
    common.print_title(ported.name, f"{lines} lines, {count} tensors, from {network}")
    common.say(f"  code     {folder / f'{stem}.py'}")
    common.say(f"  weights  {folder / 'weights.safetensors'}")
    sizes = [shape[1:] for shape in ported.inputs] or [ported.image_size]
    shown = " and ".join("x".join(map(str, size)) for size in sizes if size)
    shown = f", {'inputs' if ported.inputs else 'images'} of {shown}" if shown else ""
    for name, figure in ported.figures.items():
        common.say(
            f"  equal    {name}: {figure['error']:.1e} at most (relative, {figure['tensors']} "
            f"compared{shown})"
        )
    common.print_notes(ported.notes)
    return 0


def _stem(network: str, name: str) -> str:
    """Of the Python file: that of the user's file where there is one."""
    where = network.rpartition(":")[0]
    stem = Path(where).stem if where.endswith(".py") else name.lower()
    return re.sub(r"\W", "_", stem)
