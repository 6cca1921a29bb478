"""Layers and functions with PyTorch's semantics, channels last, in public JAX and Flax only.

A layer or function computes what its namesake in ``torch.nn`` or ``torch.nn.functional`` computes,
with the same options, except that channels are the last axis: ``(N, H, W, C)``, or ``(N, L, C)``
for one spatial axis. Values, gradients and running statistics agree::

    from flax_resblock import nn

    class Block(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs | None) -> None:
            self.conv = nn.Conv(3, 16, 3, stride=2, padding=1, rngs=rngs)
            self.norm = nn.BatchNorm(16, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.max_pool(nn.relu(self.norm(self.conv(x))), 3, stride=2, padding=1)

Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flax_resblock._lazy import lazily

if TYPE_CHECKING:
    from flax_resblock.nn.activations import (
        celu,
        elu,
        gelu,
        glu,
        hardshrink,
        hardsigmoid,
        hardswish,
        hardtanh,
        identity,
        leaky_relu,
        log_sigmoid,
        log_softmax,
        mish,
        normalize,
        prelu,
        relu,
        relu6,
        selu,
        sigmoid,
        silu,
        softmax,
        softplus,
        softshrink,
        softsign,
        tanh,
        tanhshrink,
        threshold,
    )
    from flax_resblock.nn.adaptive import adaptive_avg_pool, adaptive_max_pool
    from flax_resblock.nn.containers import Sequential
    from flax_resblock.nn.conv import Conv, Conv1d, convolve
    from flax_resblock.nn.geometry import fold, pad, unfold
    from flax_resblock.nn.linear import Linear, PReLU
    from flax_resblock.nn.norm import BatchNorm, batch_norm_by_batch
    from flax_resblock.nn.norm_functions import (
        batch_norm,
        group_norm,
        instance_norm,
        layer_norm,
        local_response_norm,
        weight_norm,
    )
    from flax_resblock.nn.other_norms import FrozenBatchNorm, GroupNorm, InstanceNorm, LayerNorm
    from flax_resblock.nn.pooling import avg_pool, lp_pool, max_pool
    from flax_resblock.nn.resize import channel_shuffle, interpolate, pixel_shuffle, pixel_unshuffle
    from flax_resblock.nn.sampling import affine_grid, grid_sample
    from flax_resblock.nn.selection import (
        amax,
        amin,
        clamp,
        cosine_similarity,
        maximum_along,
        minimum_along,
        scaled_dot_product_attention,
        vector_norm,
    )
    from flax_resblock.nn.stochastic import AlphaDropout, Dropout, RReLU, StochasticDepth
    from flax_resblock.nn.transposed import ConvTranspose, ConvTranspose1d, conv_transpose

__all__ = [
    "AlphaDropout", "BatchNorm", "Conv", "Conv1d", "ConvTranspose", "ConvTranspose1d", "Dropout",
    "FrozenBatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "Linear", "PReLU", "RReLU",
    "Sequential", "StochasticDepth", "adaptive_avg_pool", "adaptive_max_pool", "affine_grid",
    "amax", "amin", "avg_pool", "batch_norm", "batch_norm_by_batch", "celu", "channel_shuffle",
    "clamp", "conv_transpose", "convolve", "cosine_similarity", "elu", "fold", "gelu", "glu",
    "grid_sample", "group_norm", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "identity",
    "instance_norm", "interpolate", "layer_norm", "leaky_relu", "local_response_norm",
    "log_sigmoid", "log_softmax", "lp_pool", "max_pool", "maximum_along", "minimum_along", "mish",
    "normalize", "pad", "pixel_shuffle", "pixel_unshuffle", "prelu", "relu", "relu6",
    "scaled_dot_product_attention", "selu", "sigmoid", "silu", "softmax", "softplus",
    "softshrink", "softsign", "tanh", "tanhshrink", "threshold", "unfold", "vector_norm",
    "weight_norm",
]  # fmt: skip

__getattr__, __dir__ = lazily(
    __name__,
    {
        "activations": (
            "celu elu gelu glu hardshrink hardsigmoid hardswish hardtanh identity leaky_relu "
            "log_sigmoid log_softmax mish normalize prelu relu relu6 selu sigmoid silu "
            "softmax softplus softshrink softsign tanh tanhshrink threshold"
        ),
        "adaptive": "adaptive_avg_pool adaptive_max_pool",
        "containers": "Sequential",
        "conv": "Conv Conv1d convolve",
        "geometry": "fold pad unfold",
        "linear": "Linear PReLU",
        "norm": "BatchNorm batch_norm_by_batch",
        "norm_functions": (
            "batch_norm group_norm instance_norm layer_norm local_response_norm weight_norm"
        ),
        "other_norms": "FrozenBatchNorm GroupNorm InstanceNorm LayerNorm",
        "pooling": "avg_pool lp_pool max_pool",
        "resize": "channel_shuffle interpolate pixel_shuffle pixel_unshuffle",
        "sampling": "affine_grid grid_sample",
        "selection": (
            "amax amin clamp cosine_similarity maximum_along minimum_along "
            "scaled_dot_product_attention vector_norm"
        ),
        "stochastic": "AlphaDropout Dropout RReLU StochasticDepth",
        "transposed": "ConvTranspose ConvTranspose1d conv_transpose",
    },
)
