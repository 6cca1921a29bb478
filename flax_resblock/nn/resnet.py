"""The residual network that a :class:`~flax_resblock.config.ResNetConfig` describes."""

from __future__ import annotations

from dataclasses import replace
from types import EllipsisType
from typing import Unpack, cast

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.config import Activation, Config, NetworkOptions, ResNetConfig, architecture
from flax_resblock.nn.blocks import (
    BottleneckBlock,
    LayerOptions,
    Layers,
    ResidualBlock,
    build_block,
)
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.layers import ACTIVATIONS, NormLayer
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.pooling import Blur, MaxPool
from flax_resblock.nn.scopes import in_slot
from flax_resblock.nn.transition import Transition


class BlurredMaxPool(nnx.Module):
    """3x3 max pooling of stride 1 and a blur that carries the stride."""

    def __init__(self) -> None:
        self.pool = MaxPool(3, stride=1, padding=1)
        self.blur = Blur(2)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / 2), ceil(W / 2), C)``."""
        return self.blur(self.pool(x))


class _Stem(nnx.Module):
    """What follows the last convolution of a stem.

    Pooling of ``"3x3_zeros"`` sees a border of zeros, where others see none."""

    def _finish(self, config: ResNetConfig) -> None:
        self.activation: Activation = config.activation
        self.border = config.stem_pooling == "3x3_zeros"
        if config.stem_pooling == "none":
            self.pool = None
        elif config.antialias == "blur":
            self.pool = BlurredMaxPool()
        else:
            size, sides = config.stem_window
            self.pool = MaxPool(size, stride=2, padding=sides)

    def _normalised(self, x: jax.Array, norm: NormLayer | None, average: bool | None) -> jax.Array:
        if norm is None:
            return x
        return ACTIVATIONS[self.activation](norm(x, use_running_average=average))

    def _pooled(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) if self.border else x
        return x if self.pool is None else self.pool(x)


class StemLayers(_Stem):
    """First convolution, norm and activation, and the max pooling where there is one; without norm
    and activation where the stem is bare."""

    def __init__(self, config: ResNetConfig, layers: Layers) -> None:
        self.conv = layers.conv(
            config.in_channels,
            config.stem_width,
            7 if config.stem == "imagenet" else 3,
            stride=config.stem_striding,
            use_bias=config.stem_bias,
            padding_rule=config.stem_padding_rule,
        )
        self.norm = None if config.stem_is_bare else layers.norm(config.stem_width)
        self._finish(config)

    @in_slot
    def __call__(self, images: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', stem_width)``."""
        x = self._normalised(self.conv(images), self.norm, use_running_average)
        return self._pooled(x)


class DeepStemLayers(_Stem):
    """Three 3x3 convolutions, the first with the stride, each with norm and activation, and the
    max pooling (ResNet-C, He et al. 2019, arXiv:1812.01187); the last without norm and activation
    where the stem is bare.
    """

    def __init__(self, config: ResNetConfig, layers: Layers) -> None:
        (first, second), bias = config.stem_hidden, config.stem_bias
        start = {"stride": config.stem_striding, "padding_rule": config.stem_padding_rule}
        self.conv1 = layers.conv(config.in_channels, first, 3, use_bias=bias, **start)
        self.norm1 = layers.norm(first)
        self.conv2 = layers.conv(first, second, 3, use_bias=bias)
        self.norm2 = layers.norm(second)
        self.conv3 = layers.conv(second, config.stem_width, 3, use_bias=bias)
        self.norm3 = None if config.stem_is_bare else layers.norm(config.stem_width)
        self._finish(config)

    @in_slot
    def __call__(self, images: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', stem_width)``, usually a quarter of the
        size."""
        x = images
        convs, norms = (self.conv1, self.conv2, self.conv3), (self.norm1, self.norm2, self.norm3)
        for conv, norm in zip(convs, norms, strict=True):
            x = self._normalised(conv(x), norm, use_running_average)
        return self._pooled(x)


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, global pooling and a linear head.

    The stages are attributes ``stage1``, ``stage2`` ..., each an ``nnx.List`` of blocks;
    ``transition1`` ... come before them where ``config.transition`` is ``"pooled"``; ``norm``
    follows the last stage where ``config.ends_with_norm``, and ``head`` is None where
    ``config.num_classes`` is None.

    Args:
      config: What to build.
      rngs: Source of the ``params`` stream; None builds the network without values.
      **options: See :class:`flax_resblock.nn.blocks.LayerOptions`; ``init`` defaults to
        ``"kaiming_fan_out"``.
    """

    def __init__(
        self, config: ResNetConfig, *, rngs: nnx.Rngs | None, **options: Unpack[LayerOptions]
    ) -> None:
        self.config = config
        options.setdefault("init", "kaiming_fan_out")
        layers = Layers(rngs, options, config)
        self.stem = (
            DeepStemLayers(config, layers) if config.stem == "deep" else StemLayers(config, layers)
        )
        stages: dict[str, list[ResidualBlock | BottleneckBlock]] = {
            name: [] for name in config.stage_names
        }
        for stage, _, block in config.blocks():
            stages[stage].append(build_block(block, rngs=rngs, **options))
        for name, sizes in config.transitions().items():
            setattr(self, name, Transition(config, *sizes, layers))
        for name, blocks in stages.items():
            setattr(self, name, nnx.List(blocks))
        self.norm = layers.norm(config.feature_channels) if config.ends_with_norm else None
        head, precision = None, options.get("precision")
        if config.num_classes is not None:
            sizes = (config.feature_channels, config.num_classes)
            head = Linear(*sizes, precision=precision, rngs=rngs, **layers.shared)
        self.head = head

    @in_slot
    def __call__(self, images: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """Logits of a batch of images.

        Args:
          images: ``(N, H, W, in_channels)``, normalised.
          use_running_average: Overrides the mode of every norm for this call.
        Returns:
          Logits ``(N, num_classes)``, or pooled features ``(N, feature_channels)`` of a network
          without head.
        """
        *_, last = self.features(images, use_running_average=use_running_average).values()
        pooled = self.pooled(last, use_running_average=use_running_average)
        return pooled if self.head is None else self.head(pooled)

    def pooled(self, last: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """What the head is given, ``(N, feature_channels)``, of the last stage's output."""
        if self.norm is not None:
            last = self.norm(last, use_running_average=use_running_average)
            last = ACTIVATIONS[self.config.activation](last)
        over = jnp.max if self.config.head_pool == "max" else jnp.mean
        return over(last, axis=(1, 2))

    @in_slot
    def features(
        self, images: jax.Array, *, use_running_average: bool | None = None
    ) -> dict[str, jax.Array]:
        """Outputs of the stem and of every stage, for detection and segmentation.

        Args:
          images: ``(N, H, W, in_channels)``, normalised.
          use_running_average: Overrides the mode of every norm for this call.
        Returns:
          ``{"stem": ..., "stage1": ..., ...}``, each ``(N, H', W', C)``; an ImageNet network's have
          1/4, 1/4, 1/8, 1/16 and 1/32 of the resolution.
        """
        x = self.stem(images, use_running_average=use_running_average)
        found = {"stem": x}
        for name in self.config.stage_names:
            before = getattr(self, name.replace("stage", "transition"), None)
            for part in (*(() if before is None else (before,)), *getattr(self, name)):
                x = part(x, use_running_average=use_running_average)
            found[name] = x
        return found

    def replace_head(self, num_classes: int | None, *, rngs: nnx.Rngs | None) -> None:
        """Puts a fresh head on the network, in the dtypes that it computes and keeps its parameters
        in.

        Args:
          num_classes: Size of the logits; None takes the head off, and the network returns pooled
            features.
          rngs: ``nnx.Rngs(seed)``; the ``params`` stream is drawn from.
        Raises:
          ValueError: ``num_classes`` below 1.
        """
        self.config = replace(self.config, num_classes=num_classes)
        conv = next(module for _, module in nnx.iter_modules(self.stem) if isinstance(module, Conv))
        self.head = (
            None
            if num_classes is None
            else Linear(
                self.config.feature_channels,
                num_classes,
                dtype=conv.dtype,
                param_dtype=conv.kernel[...].dtype,
                precision=conv.precision,
                rngs=rngs,
            )
        )


Model = ResNet | ResidualBlock | BottleneckBlock


def build(config: Config, *, rngs: nnx.Rngs | None, **options: Unpack[LayerOptions]) -> Model:
    """The network or bare block that ``config`` describes."""
    if isinstance(config, ResNetConfig):
        return ResNet(config, rngs=rngs, **options)
    return build_block(config, rngs=rngs, **options)


class CreateOptions(NetworkOptions, LayerOptions, total=False):
    """Fields of :class:`~flax_resblock.ResNetConfig` and options of its layers."""


def create(
    name: str,
    *,
    rngs: nnx.Rngs | None,
    num_classes: int | EllipsisType | None = ...,
    in_channels: int = 3,
    **options: Unpack[CreateOptions],
) -> ResNet:
    """A named architecture with fresh weights, in training mode.

    Args:
      name: One of :func:`flax_resblock.architectures`.
      rngs: ``nnx.Rngs(seed)``; the ``params`` stream is drawn from. None builds the network without
        values.
      num_classes: Size of the logits; default as published (1000 or 10); None: no head.
      in_channels: Channels of the images.
      **options: Fields of :class:`flax_resblock.ResNetConfig` (``widths=...``) and of
        :class:`flax_resblock.nn.layers.LayerOptions` (``dtype=...``).
    Raises:
      ValueError: An unknown name, or values that make no network.
      TypeError: An unknown option.
    Example:
      >>> model = create("resnet18", num_classes=10, rngs=nnx.Rngs(0))
    """
    known = (*ResNetConfig.__dataclass_fields__, *LayerOptions.__annotations__)
    if unknown := set(options) - set(known):
        raise TypeError(
            f"create() got unknown option {', '.join(sorted(unknown))}; known: {', '.join(known)}."
        )
    of_layers = {
        key: value for key, value in options.items() if key in LayerOptions.__annotations__
    }
    of_network = {key: value for key, value in options.items() if key not in of_layers}
    if num_classes is not ...:
        of_network["num_classes"] = num_classes
    config = architecture(name, in_channels=in_channels, **of_network)
    return ResNet(config, rngs=rngs, **cast(LayerOptions, of_layers))
