"""A run of several processes: one speaks, and all end together."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flax_resblock.cli.common import output, status
from flax_resblock.cli.wording import in_flags
from flax_resblock.errors import InputError
from flax_resblock.training import cluster


def end_all(error: Exception) -> None:
    """Ends a failed process and with it the others, for which jax would wait, as they for it."""
    if type(error).__name__ == "JaxRuntimeError":
        time.sleep(2)  # another process is gone; the thread that watches it can say which
        cluster.lost("a process")
    if isinstance(error, InputError):
        print(f"flax-resblock: {in_flags(str(error))}", file=sys.stderr, flush=True)
        time.sleep(1)  # so that every process can report its own error
        os._exit(2)


@contextmanager
def only_first_speaks(several: bool) -> Iterator[bool]:
    """Silences all processes but the first; yields whether this is it."""
    first = True
    if several:
        import jax

        first = jax.process_index() == 0
    before = output.quiet, status.quiet
    output.quiet, status.quiet = before if first else (True, True)
    try:
        yield first
    finally:
        output.quiet, status.quiet = before
