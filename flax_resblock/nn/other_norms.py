"""Normalisation over groups of channels, over features, over single images and over neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from flax_resblock.nn.initializers import initial_value, parameter
from flax_resblock.nn.norm_functions import batch_norm, group_norm, instance_norm, layer_norm
from flax_resblock.nn.scopes import in_slot


class _Affine(nnx.Module):
    """``scale``, ones, and ``bias``, zeros, at the start; each may be None."""

    def __init__(
        self, shape: tuple[int, ...], scale: bool, bias: bool, dtype: Any, rngs: nnx.Rngs | None
    ) -> None:
        self.scale = parameter(1.0, rngs, shape, dtype, scale)
        self.bias = parameter(0.0, rngs, shape, dtype, bias)

    def _values(self) -> tuple[jax.Array | None, jax.Array | None]:
        scale = None if self.scale is None else self.scale[...]
        return scale, None if self.bias is None else self.bias[...]


class GroupNorm(_Affine):
    """Group normalisation over the last axis, equal to ``torch.nn.GroupNorm`` up to the layout.

    Attributes:
      scale, bias: ``nnx.Param``, ``(num_channels,)``, or None.

    Args:
      num_groups: Must divide ``num_channels``.
      num_channels: Size of the last axis.
      eps: Added to the variance.
      affine: Whether there are ``scale`` and ``bias``.
      use_bias: Whether there is a ``bias`` if there is a ``scale``.
      dtype: Dtype of the output; None: the promotion of input and parameters. The normalisation is
        computed in float32 at least.
      param_dtype: Dtype of the parameters at initialisation.
      rngs: Not drawn from; None builds the module without values.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        *,
        eps: float = 1e-5,
        affine: bool = True,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        super().__init__((num_channels,), affine, affine and use_bias, param_dtype, rngs)
        self.num_groups = num_groups
        self.eps = eps
        self.dtype = dtype

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(N, *spatial, C)`` to the same shape; there are no running statistics to use."""
        y = group_norm(x, self.num_groups, *self._values(), self.eps)
        return y if self.dtype is None else y.astype(self.dtype)


class LayerNorm(_Affine):
    """Layer normalisation over the last axes, equal to ``torch.nn.LayerNorm``.

    Attributes:
      scale, bias: ``nnx.Param``, of the shape that is normalised, or None.

    Args:
      shape: Sizes of the last axes.
      eps: Added to the variance.
      affine, use_bias, param_dtype, rngs: As for :class:`GroupNorm`.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        *,
        eps: float = 1e-5,
        affine: bool = True,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        super().__init__(self.shape, affine, affine and use_bias, param_dtype, rngs)
        self.eps = eps

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(..., *shape)`` to the same shape."""
        return layer_norm(x, *self._values(), self.eps, len(self.shape))


class InstanceNorm(_Affine):
    """Instance normalisation, equal to ``torch.nn.InstanceNorm2d`` up to the layout.

    Attributes:
      scale, bias: ``nnx.Param``, ``(C,)``, or None.
      mean, var: ``nnx.BatchStat``, ``(C,)``: running statistics, or None.
      num_batches_tracked: ``nnx.BatchStat`` that PyTorch keeps too and never changes, or None.

    Args:
      num_features: ``C``.
      eps: Added to the variance.
      momentum: The weight of the new images in the running statistics; None is 0, as in PyTorch.
      affine: Whether there are ``scale`` and ``bias``.
      track_running_stats: Whether there are running statistics, which normalise in evaluation mode.
      use_bias, param_dtype, rngs: As for :class:`GroupNorm`.
    Raises:
      ValueError: On a call in training mode with images of one pixel.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        use_bias: bool = True,
        track_running_stats: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        super().__init__((num_features,), affine, affine and use_bias, param_dtype, rngs)
        self.eps = eps
        self.momentum = 0.0 if momentum is None else momentum
        self.use_running_average = False
        dtype = jnp.promote_types(param_dtype, jnp.float32)

        def tracked(init: Any, shape: tuple[int, ...], dtype: Any) -> Any:
            value = initial_value(init, rngs, shape, dtype)
            return nnx.BatchStat(value) if track_running_stats else None

        self.mean = tracked(0.0, (num_features,), dtype)
        self.var = tracked(1.0, (num_features,), dtype)
        self.num_batches_tracked = tracked(0.0, (), jnp.int32)

    @in_slot
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(N, *spatial, C)`` to the same shape; in training mode also updates the running
        statistics."""
        if self.mean is None:
            return instance_norm(x, *self._values(), self.eps)
        if self.use_running_average:
            mean, var = (jnp.asarray(value[...], x.dtype) for value in (self.mean, self.var))
            return batch_norm(x, mean, var, *self._values(), eps=self.eps)
        y = instance_norm(x, *self._values(), self.eps)
        axes = tuple(range(1, x.ndim - 1))
        for running, new in ((self.mean, jnp.mean(x, axes)), (self.var, jnp.var(x, axes, ddof=1))):
            old, new = running[...], lax.stop_gradient(jnp.mean(new, 0))
            running.set_value(((1 - self.momentum) * old + self.momentum * new).astype(old.dtype))
        return y


class FrozenBatchNorm(nnx.Module):
    """Batch normalisation that is never trained, equal to ``torchvision.ops.FrozenBatchNorm2d``.

    Attributes:
      scale, bias, mean, var: ``nnx.BatchStat``, ``(num_features,)``.

    Args:
      num_features: Size of the last axis.
      eps: Added to the variance.
      dtype: Dtype of the output; None: that of the input.
      param_dtype: Dtype of all four at initialisation.
      rngs: Not drawn from; None builds the module without values.
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.eps = eps
        self.dtype = dtype
        self.scale, self.bias, self.mean, self.var = (
            nnx.BatchStat(initial_value(start, rngs, (num_features,), param_dtype))
            for start in (1.0, 0.0, 0.0, 1.0)
        )

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """``(..., C)`` to the same shape; the running statistics are always used."""
        wide = jnp.promote_types(x.dtype, jnp.float32)
        mean, var, scale, bias = (
            jnp.asarray(value[...], wide) for value in (self.mean, self.var, self.scale, self.bias)
        )
        y = batch_norm(x.astype(wide), mean, var, scale, bias, self.eps)
        return y.astype(self.dtype or x.dtype)
