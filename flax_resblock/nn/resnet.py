"""The residual network that a :class:`~flax_resblock.config.ResNetConfig` describes."""

from __future__ import annotations

from dataclasses import replace
from types import EllipsisType
from typing import Unpack

import jax
import jax.numpy as jnp
from flax import nnx

from flax_resblock.config import Activation, Config, NetworkOptions, ResNetConfig, architecture
from flax_resblock.config.slots import padded
from flax_resblock.nn.blocks import BottleneckBlock, ResidualBlock, build_block
from flax_resblock.nn.conv import Conv
from flax_resblock.nn.layers import ACTIVATIONS, LayerOptions, Layers, divided
from flax_resblock.nn.linear import Linear
from flax_resblock.nn.pooling import Blur, MaxPool
from flax_resblock.nn.scopes import in_slot


class BlurredMaxPool(nnx.Module):
    """3x3 max pooling of stride 1 and a blur that carries the stride."""

    def __init__(self) -> None:
        self.pool = MaxPool(3, stride=1, padding=1)
        self.blur = Blur(2)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, H, W, C)`` to ``(N, ceil(H / 2), ceil(W / 2), C)``."""
        return self.blur(self.pool(x))


class StemLayers(nnx.Module):
    """The first convolution, with norm and activation, and max pooling where there is any; in a
    deep stem three 3x3 convolutions, ``conv1`` to ``conv3``, the first with the stride (ResNet-C,
    He et al. 2019, arXiv:1812.01187). The last is without norm and activation where the stem is
    bare.

    Pooling of ``"3x3_zeros"`` sees a border of zeros, where others see none."""

    def __init__(self, config: ResNetConfig, layers: Layers) -> None:
        widths = (*config.stem_hidden, config.stem_width)
        self.names = ("1", "2", "3") if config.stem == "deep" else ("",)
        self.activation: Activation = config.activation
        inputs, size = config.in_channels, 7 if config.stem == "imagenet" else 3
        first = {"stride": config.stem_striding, "padding_rule": config.stem_padding_rule}
        for name, width in zip(self.names, widths, strict=True):
            conv = layers.conv(inputs, width, size, use_bias=config.stem_bias, **first)
            bare = name == self.names[-1] and config.stem_is_bare
            setattr(self, f"conv{name}", conv)
            setattr(self, f"norm{name}", None if bare else layers.norm(width))
            inputs, first = width, {}
        self.border = config.stem_pooling == "3x3_zeros"
        if config.stem_pooling == "none":
            self.pool = None
        elif config.antialias == "blur":
            self.pool = BlurredMaxPool()
        else:
            window, sides = config.stem_window
            self.pool = MaxPool(window, stride=2, padding=sides)

    @in_slot
    def __call__(self, images: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, in_channels)`` to ``(N, H', W', stem_width)``, of ImageNet's stems a quarter
        of the size."""
        x = images
        for name in self.names:
            x, norm = getattr(self, f"conv{name}")(x), getattr(self, f"norm{name}")
            if norm is not None:
                x = ACTIVATIONS[self.activation](norm(x, use_running_average=use_running_average))
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))) if self.border else x
        return x if self.pool is None else self.pool(x)


class Transition(nnx.Module):
    """A 3x3 convolution with norm and activation, and max pooling that has the stride.

    Args:
      stride: Size and stride of the pooling window, in pixels; 1: no pooling.
    """

    def __init__(
        self, config: ResNetConfig, inputs: int, outputs: int, stride: int, layers: Layers
    ) -> None:
        self.conv = layers.conv(inputs, outputs, 3, use_bias=config.conv_bias)
        self.norm = layers.norm(outputs)
        self.activation: Activation = config.activation
        sides = padded(stride, stride, config.padding, 0)
        self.pool = MaxPool(stride, stride, sides) if stride > 1 else None

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, H, W, inputs)`` to ``(N, H // stride, W // stride, outputs)``, rounded up where
        the network pads as TensorFlow does."""
        y = self.norm(self.conv(x), use_running_average=use_running_average)
        y = ACTIVATIONS[self.activation](y)
        return y if self.pool is None else self.pool(y)


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
        self.stem = StemLayers(config, layers)
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
        self.head = None
        if num_classes is not None:
            as_conv = {"dtype": conv.dtype, "precision": conv.precision}
            sizes, kept = (self.config.feature_channels, num_classes), conv.kernel[...].dtype
            self.head = Linear(*sizes, **as_conv, param_dtype=kept, rngs=rngs)


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
    of_layers, of_network = divided(options)
    if num_classes is not ...:
        of_network["num_classes"] = num_classes
    config = architecture(name, in_channels=in_channels, **of_network)
    return ResNet(config, rngs=rngs, **of_layers)
