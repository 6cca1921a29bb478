"""Imports the user's own code, which may be of either framework. Needs no torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flax_resblock.errors import InputError


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Imports leave no ``__pycache__`` in the user's folder."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def load_factory(spec: str, argument: str = "torch") -> Callable[..., Any]:
    """Imports what ``FILE.py:NAME`` or ``package.module:NAME`` names. This runs its code.

    Args:
      argument: Which argument it is, for messages.
    Raises:
      InputError: No such file, module or name, or code that raises.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise InputError(
            f"`{argument}={spec}` must be FILE.py:NAME or package.module:NAME, such as "
            "model.py:Block."
        )
    try:
        if where.endswith(".py"):
            path = Path(where)
            if not path.is_file():
                raise InputError(f"`{argument}={spec}`: the file {where} does not exist.")
            found = importlib.util.spec_from_file_location(path.stem, path)
            if found is None or found.loader is None:
                raise InputError(f"`{argument}={spec}`: {where} cannot be imported.")
            module = importlib.util.module_from_spec(found)
            sys.modules.setdefault(path.stem, module)
            with _no_bytecode():
                found.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"`{argument}={spec}`: importing it raised {type(error).__name__}: {error}."
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(f"`{argument}={spec}`: {where} has no class or function {name!r}.")
    return factory
