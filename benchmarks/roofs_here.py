"""The roofs of this machine: products, copies of memory, and decoded pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np


def best(call: Callable[[], object], rounds: int = 7) -> float:
    """Seconds of the fastest of some calls, after one that warms up: roofs are what is reached
    undisturbed."""
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def peak_of_products(size: int) -> tuple[dict[str, float], dict[str, str]]:
    """FLOP/s of a square matrix product by dtype, and which library was the fastest."""
    import jax
    import jax.numpy as jnp
    import ml_dtypes

    rng, peaks, by = np.random.default_rng(0), {}, {}
    product = jax.jit(jnp.matmul)
    for name, dtype in (("float32", np.float32), ("bfloat16", ml_dtypes.bfloat16)):
        left, right = (rng.normal(size=(size, size)).astype(dtype) for _ in range(2))
        on_jax = jax.device_put(left), jax.device_put(right)
        calls: dict[str, Callable[[], object]] = {
            "jax": lambda pair=on_jax: product(*pair).block_until_ready()
        }
        if dtype is np.float32:
            calls["numpy"] = lambda left=left, right=right: np.matmul(left, right)
        rates = {library: 2 * size**3 / best(call) for library, call in calls.items()}
        by[name] = max(rates, key=lambda library: rates[library])
        peaks[name] = rates[by[name]]
    return peaks, by


def copy_rate(threads: int) -> float:
    """Bytes/s, read and written, of copies far larger than the caches."""
    source, target = np.ones(2**27, np.float32), np.empty(2**27, np.float32)
    parts = list(zip(np.array_split(source, threads), np.array_split(target, threads), strict=True))
    with ThreadPoolExecutor(threads) as pool:
        seconds = best(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))
    return 2 * source.nbytes / seconds


def decode_rate(side: int) -> tuple[float, int]:
    """Images/s of one thread, resized to ``side`` pixels, and bytes of the JPEG: the mean size of
    ImageNet's pictures, 500 x 375 pixels and about 110 kB."""
    from PIL import Image

    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (75, 100, 3), np.uint8))
    large = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(large + rng.normal(0, 9, (375, 500, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)

    def decode() -> None:
        for _ in range(20):
            image = Image.open(io.BytesIO(file.getvalue())).convert("RGB")
            np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))

    return 20 / best(decode), len(file.getvalue())
