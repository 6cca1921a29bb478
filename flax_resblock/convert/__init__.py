"""PyTorch names and layouts to Flax paths and layouts, and back."""

from flax_resblock.convert.identification import Match, identify
from flax_resblock.convert.layouts import LAYOUTS, Layout
from flax_resblock.convert.state_map import Entry, StateMap, TensorInfo, describe, unhealthy

__all__ = ["LAYOUTS", "Entry", "Layout", "Match", "StateMap", "TensorInfo", "describe", "identify", "unhealthy"]
