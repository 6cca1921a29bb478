"""Memory in huge pages for a training run on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def start_again_with_huge_pages(arguments: Sequence[str]) -> None:
    """Starts ``train`` again in the same process, with an allocator that asks for huge pages.

    XLA allocates the memory of every step anew, and on a CPU the page faults cost a quarter of the
    step. glibc reads the setting only when a process starts. Nothing happens for other commands and
    systems, or if ``GLIBC_TUNABLES`` is set to any value.
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
