"""Memory in huge pages for a training run on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def start_again_with_huge_pages(arguments: Sequence[str]) -> None:
    """Starts ``train`` again, as the same process, with an allocator that asks Linux for huge
    pages.

    XLA takes the memory of a step anew each time, and on a CPU the page faults of that are a
    quarter of the step. glibc reads the setting only when a process starts. Whoever has set
    ``GLIBC_TUNABLES``, to whatever value, is left alone, and so is every other command and system.

    Args:
      arguments: Of the command line.
    """
    if arguments[:1] != ["train"] or VARIABLE in os.environ or not _has_glibc():
        return
    os.environ[VARIABLE] = SETTING
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, sys.orig_argv)


def _has_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
