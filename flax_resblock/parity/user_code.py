"""Imports the user's own code, which may be of either framework. Needs no torch."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
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
      argument: Which argument it is, for messages; empty if it has no name.
    Raises:
      InputError: No such file, module or name, or code that raises.
    """
    where, colon, name = spec.rpartition(":")
    title = f"`{argument}={spec}`" if argument else spec
    if not colon or not where or not name:
        raise InputError(
            f"{title} must be FILE.py:NAME or package.module:NAME, such as model.py:Block."
        )
    path = Path(where)
    try:
        if not where.endswith(".py"):
            module = importlib.import_module(where)
        elif not path.is_file():
            raise InputError(f"{title}: the file {where} does not exist.")
        else:
            module = _imported(path)
    except InputError:
        raise
    except SystemExit as error:
        raise InputError(
            f"{title}: importing it ended the program (SystemExit: {error}). Put what "
            f'reads arguments, or trains, under `if __name__ == "__main__":`.'
        ) from error
    except Exception as error:
        raise InputError(
            f"{title}: importing it raised {type(error).__name__}: {error}."
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise InputError(f"{title}: {where} has no class or function {name!r}.")
    return factory


def _imported(path: Path) -> ModuleType:
    """A file as a module. As in ``python FILE``, it is the only argument of the program, and the
    files beside it can be imported; with relative imports it belongs to the package of its folder.
    """
    path, before = path.resolve(), sys.argv
    sys.argv, root = [str(path)], path.parent
    sys.path.insert(0, str(root))
    try:
        with _no_bytecode():
            try:
                return _executed(path)
            except ImportError as error:
                if "no known parent package" not in str(error):
                    raise
            sys.path.remove(str(root))
            root = root.parent
            while (root / "__init__.py").is_file():
                root = root.parent
            sys.path.insert(0, str(root))
            return importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts))
    finally:
        sys.argv = before
        sys.path.remove(str(root))


def _executed(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(found)
    sys.modules.setdefault(path.stem, module)
    found.loader.exec_module(module)
    return module
