"""How a block or network builds its layers: all with the same options."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any, TypedDict

import jax
from flax import nnx
from jax import lax

from flax_resblock.config import Activation, BlockOptions, Lowering
from flax_resblock.config.slots import padded
from flax_resblock.nn.activations import ACTIVATIONS, relu_by_output
from flax_resblock.nn.conv import ChannelConv, Conv, cpu_forms, on_accelerator
from flax_resblock.nn.initializers import INITIALIZERS, Initializer, InitName, initial_value
from flax_resblock.nn.norm import BatchNorm
from flax_resblock.nn.other_norms import FrozenBatchNorm, GroupNorm
from flax_resblock.nn.stochastic import Dropout

NormLayer = BatchNorm | GroupNorm | FrozenBatchNorm


class LayerOptions(TypedDict, total=False):
    """Options that a block or network hands to each of its layers.

    Keys:
      dtype: Dtype of the computation; None (default): the promotion of input and parameters. Batch
        statistics stay in float32 at least.
      param_dtype: Dtype of the parameters at initialisation, float32 by default.
      precision: ``lax.Precision`` of convolutions and products; for true float32 on TPU and GPU use
        ``lax.Precision.HIGHEST``.
      conv_lowering: ``"auto"`` (default) or ``"xla"``; see :func:`flax_resblock.conv_lowering`.
      eps, momentum, axis_name: See :class:`flax_resblock.BatchNorm`; other norms have eps alone.
      init: ``"torch_default"`` as a bare ``nn.Conv2d`` (default of a block) or
        ``"kaiming_fan_out"`` (default of a network).
      zero_init_residual: Start the last norm's scale of every block at zero (Goyal et al. 2017), or
        its last kernel in pre-activation order; False by default, as in torchvision.
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


def divided(options: Mapping[str, Any]) -> tuple[LayerOptions, dict[str, Any]]:
    """Those of the options that are :class:`LayerOptions`, and the others."""
    of_layers: Any = {
        name: value for name, value in options.items() if name in LayerOptions.__annotations__
    }
    return of_layers, {name: value for name, value in options.items() if name not in of_layers}


def joined(
    main: jax.Array, skip: jax.Array | None, activation: Activation | None, lowering: Lowering
) -> jax.Array:
    """``activation(main + skip)``, the output of a block; without what is None.

    In training a CPU keeps it: XLA would compute it, and with it all blocks before it from their
    convolutions on, once for each of its users.
    """
    y = main if skip is None else main + skip
    if activation == "relu" and on_accelerator(lowering):
        y = relu_by_output(y)
    elif activation is not None:
        y = ACTIVATIONS[activation](y)
    forms = cpu_forms(lowering)
    return y if forms is None else forms.kept(y)


class Layers:
    """Builds the layers of one block or stem with the same options.

    Args:
      config: Says what every norm and every kernel is.
    """

    def __init__(self, rngs: nnx.Rngs | None, options: LayerOptions, config: BlockOptions) -> None:
        unknown = set(options) - set(LayerOptions.__annotations__)
        if unknown:
            raise TypeError(
                f"unknown option {', '.join(sorted(unknown))}; known: "
                f"{', '.join(LayerOptions.__annotations__)}."
            )
        self.rngs = rngs
        self.options = options
        self.config = config
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
        standardized: bool = True,
        padding_rule: str | None = None,
        ends_residual: bool = False,
    ) -> Conv:
        """A convolution padded so that stride 1 keeps the resolution; ``standardized``: where all
        kernels of the network are. ``padding_rule``: None is that of the network.
        ``ends_residual``: as for :meth:`norm`."""
        config = self.config
        rule = config.padding if padding_rule is None else padding_rule
        conv = Conv(
            in_channels,
            out_channels,
            size,
            stride=stride,
            padding=padded(size, stride, rule, dilation * (size // 2)),
            dilation=dilation,
            groups=groups,
            use_bias=use_bias,
            standardized=config.layer_numbers["standardized"] if standardized else None,
            precision=self.options.get("precision"),
            conv_lowering=self.options.get("conv_lowering", "auto"),
            kernel_init=self._kernel_init(),
            rngs=self.rngs,
            **self.shared,
        )
        if ends_residual:
            self._start_at_zero(conv.kernel)
        return conv

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

    def norm(self, channels: int, *, ends_residual: bool = False) -> NormLayer:
        """A norm; ``ends_residual``: the one that ``zero_init_residual`` starts at zero."""
        eps, shared = self.options.get("eps", 1e-5), {**self.shared, "rngs": self.rngs}
        if self.config.norm == "group":
            norm: NormLayer = GroupNorm(self.config.norm_groups, channels, eps=eps, **shared)
        elif self.config.norm == "frozen":
            norm = FrozenBatchNorm(channels, eps=eps, **shared)
        else:
            momentum, axis_name = self.options.get("momentum", 0.1), self.options.get("axis_name")
            norm = BatchNorm(channels, eps=eps, momentum=momentum, axis_name=axis_name, **shared)
        if ends_residual:
            self._start_at_zero(norm.scale)
        return norm

    def _start_at_zero(self, variable: nnx.Variable[jax.Array] | None) -> None:
        if self.options.get("zero_init_residual", False) and variable is not None:
            old = variable[...]
            variable.set_value(initial_value(0.0, self.rngs, old.shape, old.dtype))

    def dropout(self) -> nnx.Module | None:
        """The dropout of a block; None where it has none."""
        rate = self.config.dropout
        return Dropout(rate, rngs=self.rngs) if rate else None
