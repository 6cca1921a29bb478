"""Work on many tensors at once, on every core."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORTH_A_THREAD = 1 << 16
"""Bytes below which handing a tensor to another thread costs more than it saves."""


def on_every_core(work: Callable[[T], R], items: Sequence[T], size: Callable[[T], int]) -> list[R]:
    """``[work(item) for item in items]``; numpy, hashlib and jax release the interpreter while they
    copy or read. The largest by ``size`` (bytes) go first, so that no core waits for a straggler.
    """
    results: dict[int, R] = {}
    order = sorted(range(len(items)), key=lambda i: -size(items[i]))
    large = [i for i in order if size(items[i]) >= WORTH_A_THREAD]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = {i: pool.submit(work, items[i]) for i in large}
        results |= {i: work(items[i]) for i in order[len(large) :]}
        results |= {i: future.result() for i, future in futures.items()}
    return [results[i] for i in range(len(items))]
