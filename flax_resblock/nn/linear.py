"""Parameters along the last axis: the affine map, and the rectifier with a learned slope."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.nn.activations import prelu
from flax_resblock.nn.initializers import parameter, torch_default, uniform_bias
from flax_resblock.nn.norm_functions import broadcast_over
from flax_resblock.nn.scopes import in_slot
from flax_resblock.nn.variables import refuse_integers


class Linear(nnx.Module):
    """Affine map of the last axis, equal to ``torch.nn.Linear`` up to the transposed kernel.

    Attributes:
      kernel: ``nnx.Param``, ``(in_features, out_features)``.
      bias: ``nnx.Param``, ``(out_features,)``, or None.

    Args:
      in_features, out_features: Sizes of the last axis.
      use_bias: Whether there is a bias.
      dtype, param_dtype, precision, rngs: As for :class:`flax_resblock.nn.conv.Conv`. Both
        parameters start as ``nn.Linear`` starts them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.dtype = dtype
        self.precision = precision
        self.kernel = parameter(torch_default, rngs, (in_features, out_features), param_dtype)
        start = uniform_bias(in_features)
        self.bias = parameter(start, rngs, (out_features,), param_dtype, use_bias)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(..., in_features)`` to ``(..., out_features)``."""
        refuse_integers(self, x)
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = self.dtype or jnp.result_type(x, *(v for v in (kernel, bias) if v is not None))
        y = lax.dot_general(
            x.astype(dtype),
            jnp.asarray(kernel, dtype),
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
        )
        return y if bias is None else y + broadcast_over(jnp.asarray(bias, dtype), y.shape)


class PReLU(nnx.Module):
    """The rectifier whose slope below zero is learned, equal to ``torch.nn.PReLU``.

    Attributes:
      weight: ``nnx.Param``, ``(num_parameters,)``: the slopes.

    Args:
      num_parameters: 1, or the number of channels.
      init: The slopes at the start.
      param_dtype: Dtype of the slopes at initialisation.
      rngs: Not drawn from; None builds the module without values.
    """

    def __init__(
        self,
        num_parameters: int = 1,
        *,
        init: float = 0.25,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.weight = parameter(init, rngs, (num_parameters,), param_dtype)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(..., C)`` to the same shape, ``C`` any or ``num_parameters``."""
        return prelu(x, self.weight[...])
