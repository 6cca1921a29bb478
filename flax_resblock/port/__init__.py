"""Ports any PyTorch network of convolutions to readable Flax source, and proves the result.

``flax_resblock.port`` is this package and the function :func:`flax_resblock.port.porting.port` at
once: calling the package calls the function.
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax_resblock.port.network import PortedNetwork


class _CallablePackage(types.ModuleType):
    def __call__(self, module: Any, **options: Any) -> PortedNetwork:
        """See :func:`flax_resblock.port.porting.port`."""
        from flax_resblock.port.porting import port  # needs torch

        return port(module, **options)


sys.modules[__name__].__class__ = _CallablePackage
