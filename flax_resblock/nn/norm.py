"""Batch normalisation with PyTorch's statistics.

``flax.nnx.BatchNorm`` differs from ``torch.nn.BatchNorm2d`` where only a later evaluation shows it:
it updates the running variance with the biased estimate, computes the variance as ``E[x^2] -
E[x]^2``, counts momentum the other way round and has no ``num_batches_tracked``. This one agrees.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from flax_resblock.nn.conv import cpu_forms, on_accelerator
from flax_resblock.nn.initializers import initial_value
from flax_resblock.nn.norm_functions import batch_norm
from flax_resblock.nn.scopes import in_slot


class Moments(NamedTuple):
    """Per-channel batch statistics, each ``(C,)``."""

    mean: jax.Array
    biased_var: jax.Array
    unbiased_var: jax.Array


def batch_moments(
    x: jax.Array, *, axis_name: Hashable | None = None, about: jax.Array | None = None
) -> Moments:
    """Per-channel mean and both variances, as PyTorch computes them.

    Two passes, the second one corrected: with ``shift`` the mean as the first pass found it, the
    mean is ``shift + mean(x - shift)`` and the variance ``mean((x - shift)^2) - mean(x -
    shift)^2``. Both stay accurate when the mean is large against the standard deviation.

    Args:
      x: Activations, ``(..., C)``, floating; computed in float32 at least.
      about: A shift that is known beforehand, ``(C,)``, which saves the first pass. The variance
        loses about ``((mean - about) / deviation)^2`` units in the last place of float32.
      axis_name: Mapped axis (``shard_map``, ``pmap``, ``vmap``) over which the batch is spread.
        None: statistics of ``x`` as given, which under ``jit`` with a sharded batch are those of
        the global batch.
    Returns:
      ``mean``, ``biased_var`` (normalises), ``unbiased_var`` (divisor ``n - 1`` with the global
      ``n``; updates the running statistics), each ``(C,)``, float32 or wider.
    Raises:
      ValueError: Fewer than two values per channel; PyTorch refuses to train on them too.
    Reference: Ioffe & Szegedy 2015, arXiv:1502.03167, algorithms 1 and 2.
    """
    axes = tuple(range(x.ndim - 1))
    n = int(np.prod([x.shape[axis] for axis in axes]))
    if axis_name is not None:
        n *= lax.axis_size(axis_name)
    if n < 2:
        raise ValueError(
            "BatchNorm needs more than one value per channel in training mode; the input has "
            f"shape {tuple(x.shape)}. Use a larger batch or image, or evaluate with model.eval()."
        )
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))

    def mean_over_batch(values: jax.Array) -> jax.Array:
        mean = jnp.mean(values, axes)
        return mean if axis_name is None else lax.pmean(mean, axis_name)

    shift = lax.stop_gradient(mean_over_batch(x) if about is None else about)
    centred = x - shift
    rest = mean_over_batch(centred)
    biased_var = jnp.maximum(mean_over_batch(jnp.square(centred)) - jnp.square(rest), 0)
    return Moments(shift + rest, biased_var, biased_var * (n / (n - 1)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalised_by_batch(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    eps: float,
    about: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    r"""Normalises by the batch's own moments, with a gradient that needs two sums over the batch.

    .. math::
        dx = \frac{scale}{\sigma}
            \left(dy - \overline{dy} - \hat x\; \overline{dy\, \hat x}\right)

    The gradient that jax derives has four, each of which may be a pass over memory. No gradient
    flows into the moments. ``x`` is kept for the backward pass as it is, also where it is narrow.

    Args:
      x: ``(..., C)``, floating.
      scale, bias: ``(C,)``, float32 or wider, the dtype of the computation and of the result.
      eps: Added to the variance.
      about: See :func:`batch_moments`; no gradient flows into it.
    """
    return _forward(x, scale, bias, eps, about)[0]


def _forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float, about: jax.Array | None
) -> tuple[tuple[jax.Array, Moments], tuple[Any, ...]]:
    forms = cpu_forms()
    x = x if forms is None else forms.materialised(x)
    wide = x.astype(scale.dtype)
    moments = batch_moments(wide, about=about)
    inverse = lax.rsqrt(moments.biased_var + eps)
    y = (wide - moments.mean) * (inverse * scale) + bias
    return (y, moments), (x, moments.mean, inverse, scale, about)


def _backward(
    eps: float, kept: tuple[Any, ...], cotangents: tuple[jax.Array, Moments]
) -> tuple[Any, ...]:
    x, mean, inverse, scale, about = kept
    dy, n = cotangents[0], x.size // x.shape[-1]
    centred = x.astype(scale.dtype) - mean
    steps = cpu_forms() is not None or x.dtype == scale.dtype
    total, along = _channel_sum(dy, steps), _channel_sum(dy * centred, steps)
    dx = (scale * inverse) * (dy - total / n - centred * (jnp.square(inverse) * along / n))
    return dx.astype(x.dtype), along * inverse, total, jax.tree.map(jnp.zeros_like, about)


normalised_by_batch.defvjp(_forward, _backward)


def _channel_sum(values: jax.Array, steps: bool) -> jax.Array:
    """``(..., C)`` to ``(C,)``, with ``steps`` in the two of :func:`per_channel`.

    The gradient that leaves a norm sums to zero, so that the error of these sums is what the bias
    of the norm before it receives. Where activations are narrow, an accelerator saves a kernel."""
    steps = steps and values.ndim > 2
    rows = lax.optimization_barrier(jnp.sum(values, axis=-2)) if steps else values
    return jnp.sum(rows, axis=tuple(range(rows.ndim - 1)))


def batch_norm_by_batch(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """Normalises by the batch's own moments, as ``torch.nn.functional.batch_norm`` in training.

    Args:
      x: ``(..., C)``, float32 or wider, as are ``scale`` and ``bias``, ``(C,)``.
      scale, bias, eps: As for :func:`batch_norm`.
    Raises:
      ValueError: Fewer than two values per channel.
    """
    return _by_batch(x, x.dtype, scale, bias, eps, None)[0]


def _by_batch(
    x: jax.Array,
    dtype: Any,
    scale: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
    axis_name: Hashable | None,
    running_mean: jax.Array | None = None,
) -> tuple[jax.Array, Moments]:
    """``x`` normalised, and its moments, in ``dtype``.

    On an accelerator the statistics of a narrow ``x`` take one pass, about the running mean. What
    that may lose is far less than what rounding to so few bits has lost before."""
    accelerator = on_accelerator()
    if axis_name is None and (accelerator or cpu_forms() is not None):
        channels = x.shape[-1:]
        scale = jnp.ones(channels, dtype) if scale is None else scale
        bias = jnp.zeros(channels, dtype) if bias is None else bias
        about = running_mean if accelerator and jnp.finfo(x.dtype).bits < 32 else None
        found: Any = normalised_by_batch(x, scale, bias, eps, about)
        return found
    x = x.astype(dtype)
    moments = batch_moments(x, axis_name=axis_name)
    return batch_norm(x, moments.mean, moments.biased_var, scale, bias, eps), moments


class BatchNorm(nnx.Module):
    r"""Batch normalisation over the last axis, equal to ``torch.nn.BatchNorm2d`` up to the layout.

    .. math:: y = \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} \cdot scale + bias

    In training mode :math:`\mu, \sigma^2` are the batch's mean and *biased* variance, and the
    running statistics move towards the mean and the *unbiased* variance: ``running = (1 - momentum)
    * running + momentum * batch``. In evaluation mode the running statistics normalise.
    ``model.train()`` and ``model.eval()`` switch between the two; a new module is in training mode,
    as in PyTorch.

    Attributes:
      scale, bias: ``nnx.Param``, ``(C,)``, or None.
      mean, var: ``nnx.BatchStat``, ``(C,)``, running statistics in float32 or wider; None without
        ``track_running_stats``.
      num_batches_tracked: ``nnx.BatchStat``, integer scalar: training batches seen; or None.

    Args:
      num_features: ``C``.
      eps: Added to the variance.
      momentum: PyTorch's convention, the weight of the *new* batch (Flax's own momentum is ``1 -
        this``). None: cumulative average, batch ``k`` gets weight ``1/k``, driven by
        ``num_batches_tracked``.
      affine: Whether there are ``scale`` and ``bias``.
      use_bias: Whether there is a ``bias`` if there is a ``scale``.
      track_running_stats: Whether there are running statistics; without them the batch's own
        normalise in evaluation mode too, as in PyTorch.
      axis_name: Mapped axis for global statistics inside ``shard_map``; see :func:`batch_moments`.
      dtype: Dtype of the output; None: the promotion of input and parameters. Statistics and
        normalisation are computed in float32 at least.
      param_dtype: Dtype of ``scale`` and ``bias`` at initialisation.
      rngs: Not drawn from (scale is 1 and bias 0 at the start); None builds the module without
        values.
    Raises:
      ValueError: On a call whose last axis is not ``C``, or in training mode with one value per
        channel.
    Reference: https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        use_bias: bool = True,
        track_running_stats: bool = True,
        axis_name: Hashable | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs | None,
    ) -> None:
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.axis_name = axis_name
        self.dtype = dtype
        self.use_running_average = False
        stat_dtype = jnp.promote_types(param_dtype, jnp.float32)
        shape = (num_features,)

        def variable(kind: Any, init: Any, dtype: Any, wanted: bool, shape: Any = shape) -> Any:
            return kind(initial_value(init, rngs, shape, dtype)) if wanted else None

        self.scale = variable(nnx.Param, 1.0, param_dtype, affine)
        self.bias = variable(nnx.Param, 0.0, param_dtype, affine and use_bias)
        self.mean = variable(nnx.BatchStat, 0.0, stat_dtype, track_running_stats)
        self.var = variable(nnx.BatchStat, 1.0, stat_dtype, track_running_stats)
        self.num_batches_tracked = variable(nnx.BatchStat, 0, jnp.int32, track_running_stats, ())

    @in_slot
    def __call__(self, x: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """Normalises ``x`` of shape ``(..., C)``; in training mode also updates the running
        statistics.

        Args:
          x: Activations, ``(..., C)``.
          use_running_average: Overrides the module's mode for this call.
        """
        if x.shape[-1] != self.num_features:
            raise ValueError(
                f"BatchNorm over {self.num_features} channels got an input of shape "
                f"{tuple(x.shape)}; channels are the last axis (NHWC)."
            )
        affine = [None if value is None else value[...] for value in (self.scale, self.bias)]
        out_dtype = self.dtype or jnp.result_type(x, *(v for v in affine if v is not None))
        dtype = jnp.promote_types(out_dtype, jnp.float32)
        scale, bias = (None if value is None else jnp.asarray(value, dtype) for value in affine)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if use_running_average and self.mean is not None:
            mean, var = (jnp.asarray(value[...], dtype) for value in (self.mean, self.var))
            return batch_norm(x.astype(dtype), mean, var, scale, bias, self.eps).astype(out_dtype)
        running_mean = None if self.mean is None else self.mean[...]
        y, moments = _by_batch(x, dtype, scale, bias, self.eps, self.axis_name, running_mean)
        if not use_running_average and self.mean is not None:
            self._track(moments)
        return y.astype(out_dtype)

    def _track(self, batch: Moments) -> None:
        count = jnp.asarray(self.num_batches_tracked[...]) + 1
        self.num_batches_tracked.set_value(count)
        for running, new in ((self.mean, batch.mean), (self.var, batch.unbiased_var)):
            old = jnp.asarray(running[...])
            new = lax.stop_gradient(new)
            weight = self.momentum if self.momentum is not None else 1 / count.astype(new.dtype)
            running.set_value(
                ((1 - weight) * old.astype(new.dtype) + weight * new).astype(old.dtype)
            )
