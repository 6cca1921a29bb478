"""Batches prepared ahead by worker processes and a thread, and a clean end of both."""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing import util
from typing import TYPE_CHECKING, TypeVar

from flax_resblock.errors import InputError
from flax_resblock.training.data.pipeline import import_grain

if TYPE_CHECKING:
    import grain

_AHEAD = 2
"""Batches that each worker, and this process, prepares ahead."""
_IN_FLIGHT = _AHEAD + 3
"""Batches of a worker that can be in shared memory at once: ready, being written, handed over, and
returned but not yet freed.
"""
_SHARED_MEMORY = "/dev/shm"
_SAFE_PATH = "PYTHONSAFEPATH"

Read = TypeVar("Read")
Ready = TypeVar("Ready")


def check_workers(workers: int) -> None:
    """Raises InputError unless ``workers`` is 0 or a positive number of processes."""
    if not isinstance(workers, int) or workers < 0:
        raise InputError(f"workers={workers!r} must be 0 or a positive number of processes.")


def prefetched(
    read: grain.MapDataset[Read], finish: Callable[[Read], Ready], workers: int, size: int
) -> Generator[Ready, None, None]:
    """Computes ``finish(element)`` for every element ahead, in order.

    Args:
      read: The elements, computed in ``workers`` processes.
      finish: Called for each of them in a thread of this process.
      workers: Number of processes; with 0 the thread computes the elements too.
      size: Bytes of one element.
    Returns:
      A generator that ends thread and workers when it is closed or dropped, and at the end of the
      program.
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
    import grain.experimental

    in_thread = grain.experimental.ThreadPrefetchIterDataset
    with _started_without_current_folder():  # multiprocessing's own tracker starts here
        ready = iter(in_thread(elements.map(finish), prefetch_buffer_size=_AHEAD))

    def drawn() -> Generator[Ready, None, None]:
        try:
            with _started_without_current_folder():  # each worker starts with its first element
                first = list(itertools.islice(ready, max(1, workers)))
            yield from first
            yield from ready
        finally:
            ready.close()

    iterator = drawn()
    # At the end of the program: before multiprocessing ends the pool (priority 15) and the
    # processes that grain works with.
    util.Finalize(iterator, _close, args=(weakref.ref(iterator),), exitpriority=20)
    return iterator


@contextmanager
def _started_without_current_folder() -> Iterator[None]:
    """Python processes that are started in this context do not search the current folder for
    modules while they start; multiprocessing then gives them this process's path.
    """
    before = {name: value for name, value in os.environ.items() if name == _SAFE_PATH}
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        del os.environ[_SAFE_PATH]
        os.environ.update(before)


def _close(reference: weakref.ref[Generator]) -> None:
    iterator = reference()
    if iterator is not None:
        iterator.close()


def _check_shared_memory(workers: int, size: int) -> None:
    """Raises InputError unless the batches fit; writing more would kill workers silently."""
    if not os.path.isdir(_SHARED_MEMORY):
        return
    status = os.statvfs(_SHARED_MEMORY)
    free, needed = status.f_bavail * status.f_frsize, workers * _IN_FLIGHT * size
    if needed > free:
        raise InputError(
            f"workers={workers} need {needed / 2**20:,.0f} MiB of shared memory for batches of "
            f"{size / 2**20:,.1f} MiB; {_SHARED_MEMORY} has {free / 2**20:,.0f} MiB free. Take "
            "fewer workers or smaller batches, or give the container more (docker run --shm-size)."
        )


def _let_grain_start_processes() -> None:
    """Lets grain ask absl whether to profile, which fails before a command line is parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
