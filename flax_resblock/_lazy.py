"""Packages whose public names are imported on first use."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any


def lazily(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package that imports what its file imports under
    ``if TYPE_CHECKING``, each name when it is first asked for."""
    module = sys.modules[package]

    @cache
    def homes() -> dict[str, str | None]:
        # importing these takes longer than importing the package
        import ast
        import linecache

        tree = ast.parse("".join(linecache.getlines(str(module.__file__), vars(module))))
        conditional = [line for node in tree.body if isinstance(node, ast.If) for line in node.body]
        imports = [one for one in conditional if isinstance(one, ast.ImportFrom)]
        return {alias.name: one.module for one in imports for alias in one.names}

    def get(name: str) -> Any:
        if name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(str(homes()[name])), name)
        setattr(module, name, value)
        return value

    return get, lambda: sorted({*vars(module), *homes()})
