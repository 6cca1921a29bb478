"""What a folder's ``config.json`` says beyond the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """What becomes of an image before the network sees it.

    Attributes:
      mean, std: Of the channels, for pixels from 0 to 1.
      size: Height and width that the network is given, in pixels.
      crop_pct: The part of the resized image's shorter side that the central crop keeps.
      interpolation: ``"nearest"``, ``"bilinear"``, ``"bicubic"`` or ``"lanczos"``.
      keep_ratio: Whether resizing keeps the image's proportions.
      origin: Where this was found.
      white: The value of a white pixel in arrays of integers. None: the network's images have
        units of their own, and image files cannot be brought to them.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    crop_pct: float
    interpolation: str
    keep_ratio: bool
    origin: str
    white: float | None = 255.0


@dataclass(frozen=True)
class HubConfig:
    """A ``config.json`` of the package ``hub`` that was understood: ``told`` are fields of the
    configuration that cannot be inferred from the weights, ``labels`` the class names in order."""

    hub: str
    told: Mapping[str, Any]
    labels: Sequence[str] = ()
    preprocessing: Preprocessing | None = None

    @property
    def sentence(self) -> str:
        """What it says of the network, for people."""
        said = ", ".join(f"{name} {value}" for name, value in self.told.items())
        return f"its config.json ({self.hub}) says {said}" + (
            f" and names {len(self.labels)} classes" if self.labels else ""
        )
