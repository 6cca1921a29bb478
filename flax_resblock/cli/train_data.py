"""Which data a run has, what a batch of it is, and what is said of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_resblock.cli import common
from flax_resblock.config import ResNetConfig
from flax_resblock.errors import InputError
from flax_resblock.training.config import TrainConfig
from flax_resblock.training.data import (
    Dataset,
    DataSource,
    FolderDataset,
    Splits,
    open_data,
    steps_per_epoch,
)

if TYPE_CHECKING:
    from flax_resblock.cli.train_start import Start

OF_DATA = ("data", "image_size", "val_fraction")
"""Settings of a run that say what its images are."""


def refuse_unnamed_data(path: Path, preset: TrainConfig, *said: Mapping[str, Any]) -> None:
    """Raises InputError if neither the preset nor the settings that were ``said`` tell which images
    a checkpoint is for: digits are the default of a new run alone."""
    if preset.data == TrainConfig.data and not any("data" in settings for settings in said):
        raise InputError(
            f"{path} does not say which images it is for. Name them with --data: an image folder, "
            f"an .npz archive, an IDX or CIFAR folder, or digits for the handwritten digits of "
            f"scikit-learn."
        )


def opened(config: TrainConfig, strict: bool, channels: int | None) -> Splits[DataSource]:
    """Opens the data; grey images are repeated for a network with three channels."""
    with common.status.status(f"opening {config.data}") as shown:
        splits = open_data(
            config.data,
            strict=strict,
            image_size=config.image_size,
            val_fraction=config.val_fraction,
            on_progress=shown.update,
        )
    for part in splits:
        common.print_notes(part.notes)
    return Splits(*(with_channels(part, channels) for part in splits))


def at_own_size(
    config: TrainConfig, splits: Splits[DataSource], network: ResNetConfig
) -> tuple[TrainConfig, Splits[DataSource]]:
    """Keeps small pictures small for a network whose stem keeps every pixel: at 224 pixels it takes
    thirty times as long for what is in a picture of 40. The size becomes part of the configuration.
    """
    parts = [part for part in splits if isinstance(part, FolderDataset)]
    if not parts or config.image_size is not None or network.stem_reduction > 1:
        return config, splits
    side = max(part.largest_side() for part in parts)
    if side >= parts[0].size:
        return config, splits
    common.print_note(
        f"the images have at most {side} pixels on their shorter side and are trained at {side}x"
        f"{side} (--image-size {parts[0].size} enlarges them)"
    )
    return replace(config, image_size=side), Splits(*(replace(part, size=side) for part in parts))


def with_channels(dataset: DataSource, channels: int | None) -> DataSource:
    """The images as a network with so many channels takes them; None if that is unknown."""
    if not isinstance(dataset, Dataset) or dataset.shape[-1] != 1 or channels != 3:
        return dataset
    common.print_note(f"{dataset.name}: grey images, repeated for the network's 3 channels")
    images = np.repeat(dataset.images, 3, axis=-1)
    return replace(dataset, images=images, mean=dataset.mean * 3, std=dataset.std * 3)


def filled_batches(
    config: TrainConfig, train: DataSource, devices: int | None, *said: Mapping[str, Any]
) -> TrainConfig:
    """The configuration, with the largest batch that the images can fill if none of the settings
    that were ``said`` has its size; ``devices`` of this host share it, None is all of them."""
    count = len(train)
    if config.batch_size <= count or any("batch_size" in settings for settings in said):
        return config
    from flax_resblock.training import data_mesh

    pieces = data_mesh(devices).size * config.accumulate
    if count < pieces:
        return config  # refused by the run, with the reason
    size = count - count % pieces
    common.print_note(
        f"a batch has {size} images instead of {config.batch_size}, as {train.name} has no more "
        f"than {count} (--batch-size)"
    )
    return replace(config, batch_size=size)


def print_data(begin: Start) -> None:
    """Prints the images and the steps of a run that begins."""
    config, (train, test) = begin.config, begin.splits
    height, width, channels = train.shape
    per_epoch = steps_per_epoch(train, config.batch_size)
    common.say(
        f"  data   {config.data}: {_count(len(train), 'training image')} and "
        f"{_count(len(test), 'test image')} of {height}x{width} pixels, "
        f"{_count(channels, 'channel')}, {_count(train.num_classes, 'class', 'classes')}; "
        f"normalised by the pixel mean {_shown(train.mean)}, std {_shown(train.std)}"
    )
    over = len(train) % config.batch_size
    left_out = (
        f"; each epoch leaves out {_count(over, 'image')}, too few for a batch, and every epoch "
        f"leaves out others"
        if over
        else ""
    )
    common.say(
        f"  steps  {config.end(per_epoch):,} in all, {per_epoch:,} per epoch, "
        f"{config.batch_size} images each{left_out}"
    )


def _shown(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def classes_note(
    had: tuple[int, int | None], now: tuple[int, int], asked: int | None, splits: Splits[DataSource]
) -> str | None:
    """Where a new network's channels and classes come from; None where nothing was changed."""
    if had == now:
        return None
    name, there = splits.train.name, splits.train.num_classes
    channels, classes = now
    if asked is None or asked == there:
        return f"the network gets {channels} channels and {classes} classes, as {name} has"
    return (
        f"the network gets {channels} channels, as {name} has, and {classes} classes, as "
        f"--num-classes says; {name} has {there}"
    )
