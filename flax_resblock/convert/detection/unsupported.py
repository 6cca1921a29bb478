"""What a state dict has that no network of this library has, so that a refusal names the cause."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax_resblock.errors import some

Shapes = Mapping[str, tuple[int, ...]]
_REPARAMETRISED = {"weight_g", "weight_v", "weight_mask", "weight_u", "weight_orig"}
"""Of weight norm, pruning and spectral norm."""


def _convolutions(shapes: Shapes) -> list[str]:
    return [key.rpartition(".")[0] for key, shape in shapes.items() if len(shape) == 4]


def _biased(shapes: Shapes) -> list[str]:
    return [name for name in _convolutions(shapes) if f"{name}.bias" in shapes]


def _without_statistics(shapes: Shapes) -> list[str]:
    if any(key.endswith("running_mean") for key in shapes):
        return []
    return [
        name
        for key, shape in shapes.items()
        if len(shape) == 1 and key.endswith(".weight")
        if f"{(name := key.removesuffix('.weight'))}.bias" in shapes
    ]


def _five_axes(shapes: Shapes) -> list[str]:
    return [key for key, shape in shapes.items() if len(shape) == 5]


def _reparametrised(shapes: Shapes) -> list[str]:
    found = [key for key in shapes if key.rpartition(".")[2] in _REPARAMETRISED]
    return found + [key for key in shapes if ".parametrizations." in key]


def _norm_first(shapes: Shapes) -> list[str]:
    """Modules whose first layer is a norm: pre-activation, or a norm of the input."""
    first: dict[str, str] = {}
    convs = {name.rpartition(".")[0] for name in _convolutions(shapes)}
    for key in shapes:
        name = key.rpartition(".")[0]
        first.setdefault(name.rpartition(".")[0], name)
    return [
        name
        for parent, name in first.items()
        if parent in convs and f"{name}.running_mean" in shapes
    ]


_SIGNS: tuple[tuple[Callable[[Shapes], list[str]], str], ...] = (
    (_five_axes, "kernels with five axes, of convolutions over volumes or video"),
    (
        _reparametrised,
        "weight norm, spectral norm or pruning masks; remove them in PyTorch first "
        "(torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove)",
    ),
    (
        _without_statistics,
        "norms without running statistics, such as GroupNorm or LayerNorm; the networks of this "
        "library have batch norms",
    ),
    (_biased, "convolutions with a bias, which the blocks of this library do not have"),
    (
        _norm_first,
        "a norm in front of the first convolution of a block: pre-activation order, which the "
        "blocks of this library do not have",
    ),
)


def unsupported(found: Mapping[str, Any]) -> list[str]:
    """A sentence on everything that no network of this library has.

    Args:
      found: Shape and dtype of every tensor.
    """
    shapes = {key: info.shape for key, info in found.items()}
    return [f"It has {words}: {some(names)}." for sign, words in _SIGNS if (names := sign(shapes))]
