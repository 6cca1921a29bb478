"""PyTorch's names and memory layouts to Flax's, and back."""

from flax_resblock.convert.detection.candidates import Match, identify
from flax_resblock.convert.health import unhealthy
from flax_resblock.convert.naming import Naming
from flax_resblock.convert.namings import NAMINGS, naming_of
from flax_resblock.convert.state_map import Entry, StateMap, TensorInfo, TensorMap, describe

__all__ = [
    "NAMINGS", "Entry", "Match", "Naming", "StateMap", "TensorInfo", "TensorMap", "describe",
    "identify", "naming_of", "unhealthy",
]  # fmt: skip
