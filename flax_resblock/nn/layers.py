"""How a block or network builds its layers: all with the same options."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.config import Activation, Lowering
from flax_resblock.config.slots import padded
from flax_resblock.nn.activations import ACTIVATIONS, relu_by_output
from flax_resblock.nn.conv import ChannelConv, Conv, cpu_forms, on_accelerator
from flax_resblock.nn.initializers import INITIALIZERS, Initializer, InitName
from flax_resblock.nn.norm import BatchNorm


class LayerOptions(TypedDict, total=False):
    """Options that a block or network hands to each of its layers.

    Keys:
      dtype: Dtype of the computation; None (default): the promotion of input and parameters. Batch
        statistics stay in float32 at least.
      param_dtype: Dtype of the parameters at initialisation, float32 by default.
      precision: ``lax.Precision`` of convolutions and products; for true float32 on TPU and GPU use
        ``lax.Precision.HIGHEST``.
      conv_lowering: ``"auto"`` (default) or ``"xla"``; see :func:`flax_resblock.conv_lowering`.
      eps, momentum, axis_name: See :class:`flax_resblock.BatchNorm`.
      init: ``"torch_default"`` as a bare ``nn.Conv2d`` (default of a block) or
        ``"kaiming_fan_out"`` (default of a network).
      zero_init_residual: Start the last norm's scale of every block at zero (Goyal et al. 2017);
        False by default, as in torchvision.
    """

    dtype: Any
    param_dtype: Any
    precision: lax.PrecisionLike
    conv_lowering: Lowering
    eps: float
    momentum: float | None
    axis_name: Hashable | None
    init: InitName
    zero_init_residual: bool


def joined(
    main: jax.Array, skip: jax.Array, activation: Activation, lowering: Lowering
) -> jax.Array:
    """``activation(main + skip)``, the output of a block.

    In training a CPU keeps it: XLA would compute it, and with it all blocks before it from their
    convolutions on, once for each of its users.
    """
    act = ACTIVATIONS[activation]
    if activation == "relu" and on_accelerator(lowering):
        act = relu_by_output
    y = act(main + skip)
    forms = cpu_forms(lowering)
    return y if forms is None else forms.kept(y)


class Layers:
    """Builds the layers of one block or stem with the same options."""

    def __init__(self, rngs: nnx.Rngs | None, options: LayerOptions) -> None:
        unknown = set(options) - set(LayerOptions.__annotations__)
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(sorted(unknown))}; known: "
                f"{', '.join(LayerOptions.__annotations__)}."
            )
        self.rngs = rngs
        self.options = options
        self.shared: dict[str, Any] = {
            key: value for key, value in options.items() if key in ("dtype", "param_dtype")
        }

    def conv(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        use_bias: bool = False,
        padding_rule: str = "symmetric",
    ) -> Conv:
        """A convolution padded so that stride 1 keeps the resolution."""
        return Conv(
            in_channels,
            out_channels,
            size,
            stride=stride,
            padding=padded(size, stride, padding_rule, dilation * (size // 2)),
            dilation=dilation,
            groups=groups,
            use_bias=use_bias,
            precision=self.options.get("precision"),
            conv_lowering=self.options.get("conv_lowering", "auto"),
            kernel_init=self._kernel_init(),
            rngs=self.rngs,
            **self.shared,
        )

    def channel_conv(self, window: int) -> ChannelConv:
        """A convolution along the channels."""
        return ChannelConv(
            window,
            precision=self.options.get("precision"),
            kernel_init=self._kernel_init(),
            rngs=self.rngs,
            **self.shared,
        )

    def _kernel_init(self) -> Initializer:
        init = self.options.get("init", "torch_default")
        if init not in INITIALIZERS:
            raise ValueError(f"init {init!r} is unknown; choose from {', '.join(INITIALIZERS)}.")
        return INITIALIZERS[init]

    def norm(self, channels: int, *, ends_residual: bool = False) -> BatchNorm:
        """A batch norm; ``ends_residual``: the one that ``zero_init_residual`` starts at zero."""
        norm = BatchNorm(
            channels,
            eps=self.options.get("eps", 1e-5),
            momentum=self.options.get("momentum", 0.1),
            axis_name=self.options.get("axis_name"),
            rngs=self.rngs,
            **self.shared,
        )
        zero = ends_residual and self.options.get("zero_init_residual", False)
        if zero and self.rngs is not None:
            norm.scale.set_value(jnp.zeros_like(norm.scale[...]))
        return norm
