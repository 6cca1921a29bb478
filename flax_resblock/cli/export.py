"""``flax-resblock export``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from flax_resblock.checkpoint.atomic import refuse_existing
from flax_resblock.cli import common
from flax_resblock.cli.images import normalisation_of, preprocessing_of
from flax_resblock.config import name_of
from flax_resblock.convert.image_facts import IMAGES
from flax_resblock.errors import InputError

Output = Annotated[
    Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT", help="The folder to write.")
]


def export(
    checkpoint: common.Checkpoint,
    out: Output,
    reading: common.ReadingFlags,
    platforms: str = "cpu,cuda,rocm,tpu",
    image_size: int | None = None,
    any_image_size: bool = False,
    model: str | None = None,
    precision: Literal["default", "high", "highest"] = "highest",
    bake_weights: bool = False,
    fold_batch_norm: bool = False,
    mean: common.Mean = None,
    std: common.Std = None,
    allow_nonfinite: common.AllowNonfinite = False,
    force: common.Force = False,
) -> int:
    """Writes a network as a StableHLO program that runs with jax alone.

    For example:

      flax-resblock export resnet50.pth resnet50_exported

      flax-resblock predict resnet50_exported cat.jpg

    OUT holds model.stablehlo, weights.safetensors and manifest.json; docs/export.md has ten lines
    that run it without this library. The batch size is free. Outputs on the CPU equal the
    checkpoint's bit for bit; with --any-image-size, attention may move their last digits.

    Args:
      platforms: Platforms to export for, separated by commas.
      image_size: Side of the images. By default that of the checkpoint; where it does not say, 224
        for ImageNet stems and 32 for small ones.
      model: FILE.py:NAME, the code of a network of your own, such as `port` writes; CKPT is its
        folder, a run or a checkpoint. Importing it runs the code.
      any_image_size: Leave height and width free, from 32 pixels on.
      precision: Precision of convolutions and products: highest is float32; default is bfloat16 on
        TPU and TF32 on CUDA.
      bake_weights: Make the weights constants of the program. weights.safetensors is then empty,
        and the last bits of the outputs may change.
      fold_batch_norm: Fold the batch norms into the convolutions. This is faster but no longer
        equal bit for bit; the error is measured and reported.
    """
    from flax_resblock.export.exported import PROGRAM, WEIGHTS, is_exported
    from flax_resblock.export.stablehlo import export_model
    from flax_resblock.io import to_model

    refuse_existing(out, force, is_exported)
    if any_image_size and image_size is not None:
        raise InputError("--image-size fixes what --any-image-size leaves free; give one of them.")
    if model is not None and fold_batch_norm:
        raise InputError("--fold-batch-norm is for networks of this library; leave it out.")
    if model is not None:
        from flax_resblock.cli.train_own import own_network

        network, images, wanted = own_network(model, checkpoint, reading, allow_nonfinite)
        name, channels, notes = model.rpartition(":")[2], len(wanted.mean), ()
        usual = wanted.size[0]
    else:
        source = reading.open(checkpoint)
        common.refuse_unhealthy(source, allow_nonfinite)
        network, images, notes = to_model(source), source.images, source.all_notes
        wanted, channels = preprocessing_of(source), source.config.in_channels
        name, usual = name_of(source.config), source.config.image_size
    shift, scale, origin = normalisation_of((None, None), wanted, channels, mean, std)
    size = None if any_image_size else image_size
    if not any_image_size and image_size is None:
        size, width = wanted.size
        if size != width:
            raise InputError(
                f"{checkpoint} takes images of {size}x{width} pixels, and the sides of an export "
                f"are equal or free. Choose --image-size, or leave them free (--any-image-size)."
            )
    normalisation = {"mean": shift.tolist(), "std": scale.tolist()}
    facts: dict[str, Any] = {"source": checkpoint.name, IMAGES: asdict(images)}
    facts["preprocessing"] = {"pixels": "RGB from 0 to 1", **normalisation}
    with common.status.status(f"exporting {checkpoint}"):
        if fold_batch_norm:
            from flax_resblock.export.fold import fold_batch_norm as fold
            from flax_resblock.export.fold import folding_error

            original, network = network, fold(network)
            facts["batch_norm_folded"] = folding_error(original, network, size or usual)
        manifest = export_model(
            network,
            out,
            image_size=size,
            channels=channels,
            platforms=platforms.split(","),
            precision=precision,
            bake_weights=bake_weights,
            facts=facts,
            force=force,
        )
    shape = ", ".join(map(str, manifest["input"]["shape"]))
    platforms = ", ".join(manifest["platforms"])
    common.print_title(name, f"({shape}) float32, precision {precision}, for {platforms}")
    for name in (PROGRAM, WEIGHTS):
        common.say(f"  {out / name}  {common.megabytes((out / name).stat().st_size)}")
    common.say(f"  normalisation {origin}")
    if fold_batch_norm:
        errors = facts["batch_norm_folded"]
        common.say(
            f"  batch norms folded: error against float64 {errors['folded']:.1e}, unfolded "
            f"{errors['unfolded']:.1e} (relative, float32 on the CPU)",
            "yellow" if errors["folded"] > 2 * errors["unfolded"] else "",
        )
    common.print_notes(notes)
    return 0
