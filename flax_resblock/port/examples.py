"""The inputs that a module is traced with: those that the caller gives, or images that are found by
trying."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flax_resblock.errors import InputError, raised, without_gpu
from flax_resblock.port.calls import Bounded, EndlessError, never_ends
from flax_resblock.port.inputs import Shapes, parsed_shapes

Size = tuple[int, int]
"""Height and width of images."""

SIZES: tuple[Size, ...] = ((64, 64), (32, 32), (96, 96), (224, 224), (299, 299))
"""Sizes of the images, in the order in which they are tried. At 32 pixels many networks end with
maps of one pixel, whose axes cannot be told from those that a reshape adds."""


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


def accepted(module: torch.nn.Module, sizes: Sequence[Size]) -> tuple[int, Size, bool | None]:
    """The channels and the first size of images that the module runs on, in training mode too if
    there is one; and whether it draws random numbers there, None if it does not run."""
    kinds = torch.nn.Conv2d | torch.nn.ConvTranspose2d
    convolutions: list[Any] = [one for one in module.modules() if isinstance(one, kinds)]
    found = [one.in_channels for one in convolutions]
    first: Exception | None = None
    tried = copy.deepcopy(module)  # a call may change it
    for channels in dict.fromkeys([*found[:1], 3, 1, *found]):
        runs: list[Size] = []
        for size in sizes:
            images = torch.randn(2, channels, *size)
            try:
                with Bounded():
                    tried(images)
            except EndlessError as error:
                raise InputError(never_ends(type(module).__name__, error)) from error
            except Exception as error:  # whatever the user's code raises
                first = first or error
                continue
            runs.append(size)
            random = _draws(module, [images])
            if random is not None:
                return channels, size, random
        if runs:
            return channels, runs[0], None
    shown = ", ".join(f"{height}x{width}" for height, width in sizes)
    assert first is not None
    advice = (
        "Give a size that it takes with `image_size=(HEIGHT, WIDTH)`. If it takes something else "
        "than one image, give the shapes of its inputs, with `example_inputs=...`."
    )
    raise InputError(
        f"{type(module).__name__} raises on images of {shown} pixels, with {(found or [3])[0]} and "
        f"other numbers of channels ({raised(first)}). {without_gpu(first, advice)}"
    ) from first


def runs_on(module: torch.nn.Module, shapes: Shapes) -> bool | None:
    """Whether the module draws random numbers in training mode; None if it does not run in it.

    Raises:
      InputError: It does not run in evaluation mode.
    """
    inputs = [torch.randn(2, *shape) for shape in shapes]
    try:
        with Bounded():
            copy.deepcopy(module)(*inputs)
    except EndlessError as error:
        raise InputError(never_ends(type(module).__name__, error)) from error
    except Exception as error:  # whatever the user's code raises
        shown = ", ".join(str(["N", *shape]).replace("'", "") for shape in shapes)
        advice = without_gpu(error, "Give those that its forward takes, in its order.")
        raise InputError(
            f"{type(module).__name__} raises on inputs of the shapes {shown} ({raised(error)}). "
            f"{advice}"
        ) from error
    return _draws(module, inputs)


def _draws(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> bool | None:
    """Whether the module draws random numbers in training mode; None if it does not run in it."""
    before = torch.get_rng_state()
    try:
        copy.deepcopy(module).train()(*inputs)
    except Exception:  # whatever the user's code raises
        return None
    return not torch.equal(before, torch.get_rng_state())
