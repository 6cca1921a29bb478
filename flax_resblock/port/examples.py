"""The example inputs that the caller gives to port."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from flax_resblock.errors import InputError
from flax_resblock.port.inputs import Shapes, parsed_shapes


def shapes_of(module: torch.nn.Module, example_inputs: Any) -> Shapes:
    """The shapes of inputs that the caller gives, without the batch.

    Raises:
      InputError: They are not tensors with a batch, or not the first arguments of the module.
    """
    if example_inputs is None or isinstance(example_inputs, str):
        return () if example_inputs is None else parsed_shapes(example_inputs)
    name = type(module).__name__
    given = example_inputs
    if isinstance(given, Mapping):
        try:
            bound = inspect.signature(module.forward).bind(**given)
        except TypeError as error:
            raise InputError(f"example_inputs do not fit {name}.forward: {error}.") from error
        if bound.kwargs:
            raise InputError(
                f"example_inputs {list(bound.kwargs)} of {name}.forward cannot be given by "
                f"position; give all arguments before them, or put a module around it."
            )
        given = bound.args
    given = list(given) if isinstance(given, tuple | list) else [given]
    shapes = tuple(tuple(one.shape[1:]) for one in given if isinstance(one, torch.Tensor))
    if len(shapes) < max(1, len(given)) or not all(shapes):
        raise InputError(
            f"example_inputs of {name} must be tensors, each with the batch first and at least one "
            f"more axis. Unpack tuples and dictionaries of tensors in a module around it."
        )
    return shapes
