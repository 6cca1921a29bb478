"""Weights by name: ``hf-hub:USER/NAME`` on Hugging Face's hub, ``torchvision:WEIGHTS`` on PyTorch's
server. Files alone are fetched; what they hold is read like any other checkpoint, and no code from
a hub is ever run.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

from flax_resblock.hub.hugging_face import fetch_from_hub, push_folder
from flax_resblock.hub.names import HUB_PREFIX, TORCHVISION_PREFIX, Fetched

__all__ = ["HUB_PREFIX", "Fetched", "fetch", "is_name", "push_folder"]


def is_name(path: str | PathLike[str]) -> bool:
    """Whether a path is the name of weights elsewhere."""
    return str(path).startswith((HUB_PREFIX, TORCHVISION_PREFIX))


def fetch(name: str, weights: Sequence[str], texts: Sequence[str]) -> Fetched:
    """Fetches the files of a name into the cache of its package, unless they are there.

    Args:
      weights: Names of files with weights, or of their index, in order of preference.
      texts: Names of files that describe them, and are fetched too where they exist.
    Raises:
      InputError: No such name, no access, no network; or what arrived is damaged, and was removed.
      MissingDependencyError: huggingface_hub is needed and not installed.
    """
    if name.startswith(TORCHVISION_PREFIX):
        from flax_resblock.hub.torchvision import fetch_from_torchvision

        return fetch_from_torchvision(name)
    return fetch_from_hub(name, weights, texts)
