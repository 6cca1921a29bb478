"""Random layers that a user wrote, recognised by what they do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flax_resblock.port.layer import Layer, layer

if TYPE_CHECKING:
    import torch

SAMPLES = 4000


@dataclass(frozen=True)
class ImageDropping:
    """What a module of the user's does that drops whole images at random in training mode.

    Attributes:
      layer: The layer that does the same.
      name: The attribute that holds the probability, of dropping or of staying.
      off: Its value with which nothing is dropped.
    """

    layer: Layer
    name: str
    off: float


def stochastic_depth(module: torch.nn.Module) -> ImageDropping | None:
    """What a module does if it drops whole images at random in training mode; else None.

    It has no tensors and no parts, and a number between 0 and 1 as an attribute. It is called with
    many images: in evaluation mode it returns them, in training mode each of them is either zero or
    scaled as a whole, and the share of zeros is that number within five standard deviations.
    """
    if [*module.parameters(), *module.buffers(), *module.children()]:
        return None
    attributes = {name: value for name, value in vars(module).items() if isinstance(value, float)}
    candidates = {name: value for name, value in attributes.items() if 0 < value < 1}
    factors = _factors(module) if candidates else None
    if factors is None:
        return None
    for name, value in candidates.items():
        for rate, off in ((value, 0.0), (1 - value, 1.0)):
            scale = _scale(factors, rate)
            if scale is None or not _is_off(module, name, off):
                continue
            options = {"scale_by_keep": scale != 1, "stateful": True, "random": True}
            return ImageDropping(layer("StochasticDepth", rate, **options), name, off)
    return None


def _is_off(module: torch.nn.Module, name: str, off: float) -> bool:
    """Whether the module drops nothing once the attribute has this value."""
    before = getattr(module, name)
    try:
        setattr(module, name, off)
        factors = _factors(module)
    finally:
        setattr(module, name, before)
    return factors is not None and bool((factors == 1).all())


def _factors(module: torch.nn.Module) -> Any:
    """What the module multiplies images by in training mode, ``(N, values)``; None if it raises or
    changes them in evaluation mode.
    """
    import torch

    from flax_resblock.parity.module_run import global_state_kept

    training = module.training
    with global_state_kept():
        generator = torch.Generator().manual_seed(0)
        images: Any = torch.randn(SAMPLES, 3, 2, 2, generator=generator)
        try:
            torch.manual_seed(0)
            if torch.equal(module.eval()(images.clone()), images):
                return (module.train()(images.clone()) / images).flatten(1)
        except Exception:  # whatever the user's code raises
            return None
        finally:
            module.train(training)
    return None


def _scale(factors: torch.Tensor, rate: float) -> float | None:
    """What the images are multiplied by that are not dropped; None if none is dropped, or something
    else is done to them.
    """
    first = factors[:, 0]
    scale = float(first.max())
    dropped = float((first == 0).float().mean())
    whole = bool(((factors - first[:, None]).abs() <= 1e-5 * scale).all())
    binary = bool(((first == 0) | ((first - scale).abs() <= 1e-5 * scale)).all())
    likely = abs(dropped - rate) <= 5 * (rate * (1 - rate) / SAMPLES) ** 0.5
    known = min(abs(scale - 1), abs(scale - 1 / (1 - rate))) <= 1e-5 * scale
    if not (whole and binary and likely and known and dropped):
        return None
    return 1.0 if abs(scale - 1) <= 1e-5 else scale
