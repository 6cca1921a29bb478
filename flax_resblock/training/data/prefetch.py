"""Batches made ahead of their use, by worker processes and a thread, and a clean end of both."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Generator
from multiprocessing import util
from typing import TYPE_CHECKING, TypeVar

from flax_resblock.errors import InputError
from flax_resblock.training.data.pipeline import import_grain

if TYPE_CHECKING:
    import grain

_AHEAD = 2
"""Batches that are made ready before they are asked for, by each worker and in this process."""
_IN_FLIGHT = _AHEAD + 3
"""Batches of a worker that may lie in shared memory at once: ready, being written, handed over, and
given back but not yet freed.
"""
_SHARED_MEMORY = "/dev/shm"

Read = TypeVar("Read")
Ready = TypeVar("Ready")


def check_workers(workers: int) -> None:
    """Refuses what is no number of processes."""
    if not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers={workers!r} must be 0 or a positive number of processes.")


def prefetched(
    read: grain.MapDataset[Read], finish: Callable[[Read], Ready], workers: int, size: int
) -> Generator[Ready, None, None]:
    """``finish(element)`` for every element in order, made ahead.

    Args:
      read: Elements, made in ``workers`` processes.
      finish: What a thread of this process does to each of them.
      workers: 0: the thread makes the elements too.
      size: Bytes of one element.
    Returns:
      A generator that ends thread and workers when it is closed, dropped, or still open at the end
      of the program.
    Raises:
      InputError: Too little shared memory for the workers.
    """
    grain = import_grain()
    elements = read.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if workers:
        _check_shared_memory(workers, size)
        _let_grain_start_processes()
        elements = elements.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_AHEAD)
        )
    ready = iter(
        grain.experimental.ThreadPrefetchIterDataset(
            elements.map(finish), prefetch_buffer_size=_AHEAD
        )
    )

    def drawn() -> Generator[Ready, None, None]:
        try:
            yield from ready
        finally:
            ready.close()

    iterator = drawn()
    # At the end of the program: before multiprocessing ends the pool (priority 15) and the
    # processes that grain works with.
    util.Finalize(iterator, _close, args=(weakref.ref(iterator),), exitpriority=20)
    return iterator


def _close(reference: weakref.ref[Generator]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


def _check_shared_memory(workers: int, size: int) -> None:
    """Workers hand over their batches in shared memory; writing more than there is would kill them
    without a word.
    """
    if not os.path.isdir(_SHARED_MEMORY):
        return
    status = os.statvfs(_SHARED_MEMORY)
    free, needed = status.f_bavail * status.f_frsize, workers * _IN_FLIGHT * size
    if needed > free:
        raise InputError(
            f"workers={workers} need {needed / 2**20:,.0f} MiB of shared memory for batches of "
            f"{size / 2**20:,.1f} MiB; {_SHARED_MEMORY} has "
            f"{free / 2**20:,.0f} MiB free. Take fewer workers or smaller batches, or give the "
            f"container more (docker run --shm-size)."
        )


def _let_grain_start_processes() -> None:
    """Beside jax, grain asks absl whether to profile its workers, and absl answers only once some
    program has parsed its command line with absl.
    """
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
