"""Versions of what computed, for reports and certificates; imports none of it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of this library, of Python, and of those packages that are installed (torch is not on every
    TPU host).
    """
    from flax_resblock._version import __version__

    found = {"flax_resblock": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
