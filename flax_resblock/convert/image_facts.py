"""What a checkpoint says of the images that its network takes, and of the classes that it tells."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flax_resblock.convert.hubs.common import INTERPOLATIONS, Preprocessing
from flax_resblock.errors import damaged, raised

IMAGES = "images"
"""Metadata beside the tensors, as JSON."""
_CARRIED = "_flax_resblock_images"
_LARGEST = 1 << 13
"""Pixels of a side; more than any network of images is given."""


@dataclass(frozen=True, repr=False)
class ImageFacts:
    """Images and classes of a network: class names are in order, and may be fewer than the
    network's logits; where nothing is known, ``preprocessing`` is None and ``labels`` are empty."""

    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()

    def __repr__(self) -> str:  # a model shows its attributes, and a thousand names say little
        return f"ImageFacts({self.preprocessing}, {len(self.labels)} class names)"

    @property
    def metadata(self) -> dict[str, str]:
        """As it is stored beside tensors; empty where nothing is known."""
        return {IMAGES: json.dumps(asdict(self))} if self else {}

    def __bool__(self) -> bool:
        return self.preprocessing is not None or bool(self.labels)


def carry_images(model: Any, facts: ImageFacts) -> None:
    """Gives a model what is known of its images, which its copies carry too."""
    if facts:
        setattr(model, _CARRIED, facts)


def carried_images(model: Any) -> ImageFacts:
    """What :func:`carry_images` gave a model."""
    return getattr(model, _CARRIED, ImageFacts())


def read_images(metadata: Mapping[str, str], source: str) -> ImageFacts:
    """What this library stored beside tensors; raises CheckpointError if it is damaged."""
    if IMAGES not in metadata:
        return ImageFacts()
    words = f"{source}: what it says of its images is damaged"
    with damaged(words, "Copy the file again.", says=raised):
        content = json.loads(metadata[IMAGES])
        labels, stored = content["labels"], content["preprocessing"]
        if not isinstance(labels, list) or not all(isinstance(one, str) for one in labels):
            raise ValueError("its class names are no texts")
        return ImageFacts(None if stored is None else _preprocessing(stored), tuple(labels))


def _preprocessing(stored: Mapping[str, Any]) -> Preprocessing:
    """Raises ValueError or TypeError for anything but sizes and finite numbers."""
    white, (height, width) = stored["white"], stored["size"]
    found = Preprocessing(
        tuple(map(float, stored["mean"])),
        tuple(map(float, stored["std"])),
        (int(height), int(width)),
        float(stored["crop_pct"]),
        str(stored["interpolation"]),
        bool(stored["keep_ratio"]),
        str(stored["origin"]),
        None if white is None else float(white),
    )
    numbers = (*found.mean, *found.std, found.white or 1.0)
    if (
        len(found.mean) != len(found.std)
        or not all(map(math.isfinite, numbers))
        or min((*found.std, found.white or 1.0)) <= 0
        or not all(1 <= side <= _LARGEST for side in found.size)
        or not 0 < found.crop_pct <= 1
        or found.interpolation not in INTERPOLATIONS
    ):
        raise ValueError(f"{found} is out of range")
    return found
