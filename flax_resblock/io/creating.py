"""Networks by the name of their architecture, with fresh weights or with weights by name."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from types import EllipsisType
from typing import Unpack, cast

from flax import nnx

from flax_resblock.config import ResNetConfig, architecture, name_of
from flax_resblock.convert.image_facts import carried_images, carry_images
from flax_resblock.errors import InputError
from flax_resblock.io.reading import load
from flax_resblock.nn import resnet
from flax_resblock.nn.layers import LayerOptions
from flax_resblock.nn.resnet import CreateOptions, ResNet


def create(
    name: str,
    *,
    rngs: nnx.Rngs | EllipsisType | None = ...,
    weights: str | PathLike[str] | None = None,
    num_classes: int | EllipsisType | None = ...,
    in_channels: int = 3,
    **options: Unpack[CreateOptions],
) -> ResNet:
    """A named architecture with fresh weights, in training mode; or with the weights of a
    checkpoint, in evaluation mode.

    Args:
      name: One of :func:`flax_resblock.architectures`.
      rngs: ``nnx.Rngs(seed)``; the ``params`` stream is drawn from. None builds the network without
        values. Needed unless ``weights`` have all of them.
      weights: Whatever :func:`flax_resblock.load` takes: a path, ``"hf-hub:USER/NAME"``,
        ``"torchvision:ResNet50_Weights.IMAGENET1K_V2"``.
      num_classes: Size of the logits; default as published (1000 or 10), or as the weights have;
        None: no head. Weights with another number get a fresh head from ``rngs``.
      in_channels: Channels of the images.
      **options: Fields of :class:`flax_resblock.ResNetConfig` (``widths=...``) and of
        :class:`flax_resblock.nn.layers.LayerOptions` (``dtype=...``); with ``weights``, the latter.
    Raises:
      ValueError: An unknown name, values that make no network, or weights of another one.
      TypeError: An unknown option, or no ``rngs`` for values that are drawn.
    Example:
      >>> model = create("resnet18", num_classes=10, rngs=nnx.Rngs(0))
    """
    if weights is None:
        if rngs is ...:
            raise TypeError("create() needs rngs=nnx.Rngs(seed) for fresh weights, or weights=.")
        return resnet.create(
            name, rngs=rngs, num_classes=num_classes, in_channels=in_channels, **options
        )
    if of_network := set(options) - set(LayerOptions.__annotations__):
        raise TypeError(
            f"create() takes no {', '.join(sorted(of_network))} beside weights, which say what the "
            f"network is. Give them as assumptions to flax_resblock.load."
        )
    wanted = architecture(name, in_channels=in_channels)
    model = load(weights, architecture=name, **cast(LayerOptions, options))
    found = model.config
    if (
        not isinstance(model, ResNet)
        or not isinstance(found, ResNetConfig)
        or (replace(wanted, num_classes=found.num_classes) != found)
    ):
        raise InputError(
            f"{weights} holds a {name_of(found)} for {found.in_channels} channels, not {name} for "
            f"{in_channels}."
        )
    if num_classes is not ... and num_classes != found.num_classes:
        if num_classes is not None and (rngs is ... or rngs is None):
            raise TypeError(
                f"{weights} has {found.num_classes} classes: create() needs rngs=nnx.Rngs(seed) "
                f"for a fresh head with {num_classes}."
            )
        model.replace_head(num_classes, rngs=None if rngs is ... else rngs)
        carry_images(model, replace(carried_images(model), labels=()))
        model.eval()
    return model
