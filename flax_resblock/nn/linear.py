"""The affine map of the last axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.nn.initializers import initial_value, torch_default, uniform_bias
from flax_resblock.nn.scopes import in_slot


class Linear(nnx.Module):
    """Affine map of the last axis, equal to ``torch.nn.Linear`` up to the transposed kernel.

    Attributes:
      kernel: ``nnx.Param``, ``(in_features, out_features)``.
      bias: ``nnx.Param``, ``(out_features,)``.

    Args:
      in_features, out_features: Sizes of the last axis.
      dtype, param_dtype, precision, rngs: As for :class:`flax_resblock.nn.conv.Conv`. Both
        parameters start as ``nn.Linear`` starts them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: lax.PrecisionLike = None,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.dtype = dtype
        self.precision = precision
        self.kernel = nnx.Param(
            initial_value(torch_default, rngs, (in_features, out_features), param_dtype)
        )
        self.bias = nnx.Param(
            initial_value(uniform_bias(in_features), rngs, (out_features,), param_dtype)
        )

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(..., in_features)`` to ``(..., out_features)``."""
        kernel, bias = self.kernel[...], self.bias[...]
        dtype = self.dtype or jnp.result_type(x, kernel, bias)
        return lax.dot_general(
            x.astype(dtype),
            jnp.asarray(kernel, dtype),
            (((x.ndim - 1,), (0,)), ((), ())),
            precision=self.precision,
        ) + jnp.asarray(bias, dtype)
