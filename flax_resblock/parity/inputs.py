"""Inputs and states that hide nothing: asymmetric, with large means, odd and even sizes."""

from __future__ import annotations

import numpy as np

from flax_resblock.architecture import Config, ResNetConfig


def adversarial_images(config: Config, *, batch: int, height: int | None = None, width: int | None = None, seed: int = 0) -> np.ndarray:
    """Random images with a mean and scale of their own per channel and a gradient across the picture.

    Args:
      config: Decides channels and default size (odd by even; 65x48 for an ImageNet stem, 33x32 or 15x14 for others).
      batch, height, width: ``(N, H, W)``.
      seed: Of the generator.
    Returns:
      ``(N, H, W, C)``, float64.
    """
    rng = np.random.default_rng(seed)
    stem = config.stem if isinstance(config, ResNetConfig) else None
    size = {"imagenet": (65, 48), "cifar": (33, 32), None: (15, 14)}[stem]
    height, width = height or size[0], width or size[1]
    channels = config.in_channels
    mean, scale = rng.uniform(-2, 2, channels), rng.uniform(0.3, 2, channels)
    ramp = np.linspace(-1, 1, height)[:, None, None] * rng.standard_normal(channels) + np.linspace(-1, 1, width)[None, :, None] * rng.standard_normal(channels)
    return rng.standard_normal((batch, height, width, channels)) * scale + mean + ramp


def randomised_norm_state(state: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict whose norms look trained: no scale of 1, no mean of 0, no variance of 1, a counter that has counted.

    Args:
      state: By torchvision's names; not modified.
      seed: Of the generator.
    """
    rng = np.random.default_rng(seed)
    result = dict(state)
    for key in state:
        prefix, _, name = key.rpartition(".")
        if name != "running_var":
            continue
        shape, dtype = state[key].shape, state[key].dtype
        result[key] = rng.uniform(0.3, 3, shape).astype(dtype)
        result[f"{prefix}.running_mean"] = rng.normal(0, 0.5, shape).astype(dtype)
        result[f"{prefix}.weight"] = (rng.uniform(0.4, 1.6, shape) * rng.choice([-1, 1], shape, p=[0.1, 0.9])).astype(dtype)
        result[f"{prefix}.bias"] = rng.normal(0, 0.5, shape).astype(dtype)
        result[f"{prefix}.num_batches_tracked"] = np.array(rng.integers(1, 1000), np.int64)
    return result
