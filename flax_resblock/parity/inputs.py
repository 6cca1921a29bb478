"""Adversarial inputs and states: asymmetric, with large means, of odd and even sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flax_resblock.config import BlockConfig, Config
from flax_resblock.errors import InputError, reason


def adversarial_images(
    config: Config,
    *,
    batch: int,
    height: int | None = None,
    width: int | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Random images with a mean and scale of their own per channel and a gradient across the
    picture.

    Args:
      config: Decides channels and default size (odd by even: 65x66 where a stem reduces the
        image, 33x32 where it does not, 15x14 for a block). Where the last maps have fewer pixels
        than a kernel, XLA's convolutions in float64 were measured to take ten times as long.
      batch, height, width: ``(N, H, W)``.
    Returns:
      ``(N, H, W, C)``, float64.
    """
    rng = np.random.default_rng(seed)
    size = (15, 14)
    if not isinstance(config, BlockConfig):
        size = (65, 66) if config.stem_reduction > 1 else (33, 32)
    height, width = height or size[0], width or size[1]
    channels = config.in_channels
    mean, scale = rng.uniform(-2, 2, channels), rng.uniform(0.3, 2, channels)
    ramp = np.linspace(-1, 1, height)[:, None, None] * rng.standard_normal(channels)
    ramp = ramp + np.linspace(-1, 1, width)[None, :, None] * rng.standard_normal(channels)
    return rng.standard_normal((batch, height, width, channels)) * scale + mean + ramp


def randomised_norm_state(state: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """A state dict whose norms look trained: no scale of 1, no mean of 0, no variance of 1, a
    counter that has counted.

    Args:
      state: By torchvision's names; not modified.
    """
    rng = np.random.default_rng(seed)
    result = dict(state)
    for key in state:
        prefix, _, name = key.rpartition(".")
        shape, dtype = state[key].shape, state[key].dtype
        if name == "running_var":
            result[key] = rng.uniform(0.3, 3, shape).astype(dtype)
            result[f"{prefix}.running_mean"] = rng.normal(0, 0.5, shape).astype(dtype)
        elif name != "weight" or len(shape) != 1 or f"{prefix}.running_var" in state:
            continue
        scale = rng.uniform(0.4, 1.6, shape) * rng.choice([-1, 1], shape, p=[0.1, 0.9])
        result[f"{prefix}.weight"] = scale.astype(dtype)
        result[f"{prefix}.bias"] = rng.normal(0, 0.5, shape).astype(dtype)
        if (counter := f"{prefix}.num_batches_tracked") in state:
            result[counter] = np.array(rng.integers(1, 1000), np.int64)
    return result


def more_batches(images: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """The batch itself and further ones like it: mirrored, with other contrast, brightness and
    noise.

    Args:
      images: ``(N, ...)``, the first batch.
    """
    rng = np.random.default_rng([seed, count])
    spread = float(np.std(images)) or 1.0
    batches = [images]
    for _ in range(count - 1):
        moved = images[rng.permutation(len(images))] * rng.uniform(0.6, 1.4)
        moved = moved + spread * rng.normal(0, 0.3)
        batches.append(moved + spread * rng.normal(0, 0.5, images.shape))
    return tuple(batches)


def nudged(images: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Images of which each number moves by at most one unit in the last place, of size ``epsilon``
    relative to it, which shows how certain a result is.
    """
    return images * (1 + epsilon * rng.integers(-1, 2, images.shape))


def read_images(path: Path, config: Config) -> np.ndarray:
    """A batch of images from a ``.npy`` file; nothing in it is ever executed.

    Returns:
      ``(N, H, W, C)``, float64.
    Raises:
      InputError: No such file, no numpy array of numbers, another rank or number of channels,
        values that are not finite.
    """
    try:
        # mapped: a header that announces more than the file holds costs nothing
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, OverflowError) as error:
        raise InputError(
            f"`input={path}` cannot be read as a .npy array ({reason(error).splitlines()[0]}). "
            f"Write one with numpy.save('images.npy', images)."
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise InputError(
            f"`input={path}` holds {getattr(array, 'dtype', type(array).__name__)}; an array "
            f"of numbers is needed, (N, H, W, {config.in_channels})."
        )
    if array.ndim != 4 or array.shape[-1] != config.in_channels or 0 in array.shape:
        hint = ""
        if array.ndim == 4 and array.shape[1] == config.in_channels:
            hint = " They look like NCHW; move the channels last: images.transpose(0, 2, 3, 1)."
        raise InputError(
            f"`input={path}` has the shape {list(array.shape)}; the network takes (N, H, W, "
            f"{config.in_channels}).{hint}"
        )
    if not np.isfinite(array).all():
        raise InputError(
            f"`input={path}` holds {np.count_nonzero(~np.isfinite(array))} values that are not "
            f"finite; with them every comparison is empty."
        )
    return array.astype(np.float64)
