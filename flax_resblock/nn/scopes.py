"""Names of layers in compiled programs: ``slot=stage1.0.conv1`` in an operation's metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
from flax import nnx

_Module = TypeVar("_Module", bound=nnx.Module)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_paths: ContextVar[dict[int, str] | None] = ContextVar("paths", default=None)
"""The paths of the parts of the module that is being called, by their ``id``."""


def in_slot(
    call: Callable[Concatenate[_Module, _Arguments], _Result],
) -> Callable[Concatenate[_Module, _Arguments], _Result]:
    """Decorates a module's method: what a layer traces is named by the layer's place in the
    outermost decorated module.

    A module that is called by itself has no name; its parts have theirs, such as ``"conv1"``.
    Names are metadata: they change neither results nor the keys of jax's caches.
    """

    @wraps(call)
    def named(self: _Module, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        path = (_paths.get() or {}).get(id(self), "")
        parts = {id(part): f"{path}.{name}" if path else name for name, part in _parts(self)}
        token = _paths.set(parts)
        try:
            if parts or not path:  # only layers are slots, not what is made of layers
                return call(self, *args, **kwargs)
            with jax.named_scope(f"slot={path}"):
                return call(self, *args, **kwargs)
        finally:
            _paths.reset(token)

    return named


def _parts(module: nnx.Module) -> Iterator[tuple[str, Any]]:
    for name, part in vars(module).items():
        if isinstance(part, nnx.List):
            yield from ((f"{name}.{index}", one) for index, one in enumerate(part))
        elif isinstance(part, nnx.Module):
            yield name, part
