"""Models of this library from and to PyTorch's modules, state dicts and checkpoints."""

from flax_resblock.io.creating import create
from flax_resblock.io.reading import arrays_of, from_torch, load, load_run, to_model
from flax_resblock.io.writing import save, to_torch

__all__ = ["arrays_of", "create", "from_torch", "load", "load_run", "save", "to_model", "to_torch"]
