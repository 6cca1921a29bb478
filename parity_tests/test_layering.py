"""Who may import whom: one table of packages, whose arrows run one way; it can fail."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from parity_tests.support import REPOSITORY, python

ARRAYS = {"numpy", "ml_dtypes"}
JAX = ARRAYS | {"jax", "flax", "optax"}
PAGES = {"rich", "jinja2", "matplotlib"}
FORBIDDEN_JAX = ("jax.extend", "jax.interpreters", "jax.experimental", "jax._src", "jaxlib")

# Package (or top-level module) of the library -> what it may import: packages of the library by
# their bare names, other distributions by their import names. The order is that of the arrows:
# a package may only name packages above it, so that there is no cycle.
PACKAGES: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "_version": (set(), set()),
    "_lazy": (set(), set()),
    "hub": ({"errors"}, {"huggingface_hub", "rich", "filelock"}),
    "config": (set(), set()),
    "cpu": ({"config", "errors"}, JAX | {"jaxlib"}),
    "nn": ({"_lazy", "config", "errors"}, JAX),
    "checkpoint": (
        {"_version", "errors", "hub"},
        ARRAYS
        | {"safetensors", "jax", "orbax", "tensorstore", "filelock", "msgpack", "flax", "h5py"},
    ),
    "convert": ({"_version", "checkpoint", "config", "errors"}, ARRAYS),
    "images": ({"config", "convert", "errors"}, ARRAYS | {"PIL"}),
    "runs": (
        {"_version", "checkpoint", "config", "convert", "errors", "nn"},
        JAX,
    ),
    "export": (
        {"_version", "checkpoint", "config", "convert", "cpu", "errors", "nn"},
        JAX | {"flatbuffers", "safetensors"},
    ),
    "aot": ({"config", "cpu", "errors", "export", "nn"}, JAX),
    "training": (
        {"_lazy", "checkpoint", "config", "convert", "cpu", "errors", "nn", "runs"},
        JAX | {"rich", "tensorboardX", "matplotlib", "PIL", "grain", "absl", "sklearn", "orbax"},
    ),
    "parity": (
        {
            *("_lazy", "_version", "checkpoint", "config", "convert", "cpu", "errors", "hub"),
            *("nn", "runs"),
        },
        JAX | PAGES | {"torch", "torch_ref"},
    ),
    "port": (
        {"checkpoint", "config", "convert", "cpu", "errors", "nn", "parity"},
        JAX | {"torch"},
    ),
    "io": (
        {
            *("_version", "checkpoint", "config", "convert", "errors", "hub", "nn", "parity"),
            *("port", "runs"),
        },
        JAX,
    ),
    "bench": (
        {"config", "cpu", "errors", "export", "io", "nn", "parity", "training"},
        JAX | PAGES | {"torch", "safetensors"},
    ),
    "cli": (
        {
            *("_version", "aot", "bench", "checkpoint", "config", "convert", "cpu", "errors"),
            *("export", "images", "io", "nn", "parity", "port", "runs", "training"),
        },
        JAX | PAGES | {"torch", "torch_ref", "tyro", "PIL"},
    ),
}
# The package itself names everything that it offers, and `python -m` starts the command line.
ENTRY_POINTS = {"flax_resblock/__init__.py": None, "flax_resblock/__main__.py": {"cli"}}
# Files that may import more than their package, and why.
EXCEPTIONS: dict[str, tuple[set[str], str]] = {
    "flax_resblock/nn/conv.py": (
        {"flax_resblock.cpu"},
        "the one hook through which a CPU's forms are used",
    ),
    "flax_resblock/checkpoint/torch_file.py": (
        {"torch"},
        "writes .pth files, and reads what only torch can",
    ),
    "flax_resblock/training/run_folder.py": ({"flax_resblock.io"}, "a run folder holds models"),
}
# In these packages only public JAX, whatever else is allowed.
PUBLIC_JAX_ONLY = ("nn", "convert", "runs", "io")


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything imported: ``from a import b`` as ``a.b``, and
    ``import_module("a")`` and ``__import__("a")`` as ``a``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__", "optional"):
                yield str(node.args[0].value)


def allowed(place: str, name: str) -> bool:
    """Whether the file at ``place`` may import ``name``."""
    top, *rest = name.split(".")
    if place.startswith("torch_ref/"):
        return top in {"torch", "torch_ref"} | sys.stdlib_module_names
    if top in sys.stdlib_module_names or top == "__future__":
        return True
    if any(
        name == more or name.startswith(f"{more}.") for more in EXCEPTIONS.get(place, ((), ""))[0]
    ):
        return True
    if place in ENTRY_POINTS:
        own = ENTRY_POINTS[place]
        return top == "flax_resblock" and (own is None or rest[0] in own)
    package = Path(place).parts[1].removesuffix(".py")
    if package not in PACKAGES:
        return False
    own, distributions = PACKAGES[package]
    if top == "flax_resblock":
        return "io" in own if not rest else rest[0] == package or rest[0] in own
    if package in PUBLIC_JAX_ONLY and f"{name}.".startswith(
        tuple(f"{it}." for it in FORBIDDEN_JAX)
    ):
        return False
    return top in distributions


def violations(root: Path) -> list[str]:
    """``file: name`` for every import that the table does not allow."""
    files = sorted(p for top in ("torch_ref", "flax_resblock") for p in (root / top).rglob("*.py"))
    return [
        f"{place}: {name}"
        for file in files
        for place in [file.relative_to(root).as_posix()]
        for name in imports(file.read_text(encoding="utf-8"))
        if not allowed(place, name)
    ]


def test_every_import_is_allowed():
    assert violations(REPOSITORY) == []


def test_the_table_has_no_cycle():
    seen: set[str] = set()
    for package, (own, _) in PACKAGES.items():
        assert own <= seen, f"{package} names {sorted(own - seen)}, which stand below it"
        seen.add(package)


def test_every_exception_is_needed():
    for place, (names, _) in EXCEPTIONS.items():
        found = set(imports((REPOSITORY / place).read_text(encoding="utf-8")))
        assert all(any(f"{it}.".startswith(f"{name}.") for it in found) for name in names), place


BREACHES = {
    "torch in a block": ("nn/blocks.py", "import torch"),
    "torch in the converter": ("convert/state_map.py", "def f():\n    import torch.nn"),
    "jax in the converter": ("convert/codecs.py", "import jax.numpy as jnp"),
    "a layer in the converter": ("convert/opening.py", "from flax_resblock.nn import blocks"),
    "runs in the converter": ("convert/opening.py", "from flax_resblock.runs.run import Run"),
    "the converter in the files": ("checkpoint/record.py", "from flax_resblock import convert"),
    "torch by a string": ("io.py", "import importlib\nx = importlib.import_module('torch')"),
    "a relative import": ("nn/norm.py", "from ..torch_ref import Block"),
    "an array in the description": ("config/network.py", "import numpy as np"),
    "the reference in the library": ("io.py", "from torch_ref import ResNet"),
    "training in a layer": ("nn/linen.py", "import flax_resblock.training.step"),
    "private jax in a layer": ("nn/norm.py", "from jax.extend import core"),
    "the CPU's forms in a norm": ("nn/norm.py", "from flax_resblock.cpu import winograd"),
    "torch in training": ("training/step.py", "from torch import nn"),
    "compilers in the export": ("export/stablehlo.py", "from flax_resblock.aot import targets"),
    "the command line in the library": ("io.py", "from flax_resblock.cli import run"),
    "a new dependency": ("nn/conv.py", "import einops"),
    "a package that the table lacks": ("new.py", "import jax"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_the_check_finds(breach, tmp_path):
    place, code = BREACHES[breach]
    file = tmp_path / "flax_resblock" / place
    file.parent.mkdir(parents=True)
    file.write_text(code)
    assert len(violations(tmp_path)) == 1


def test_the_reference_knows_torch_alone(tmp_path):
    (tmp_path / "torch_ref").mkdir()
    (tmp_path / "torch_ref" / "block.py").write_text("import numpy as np\nfrom flax import nnx\n")
    assert len(violations(tmp_path)) == 2


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    file = tmp_path / "flax_resblock" / "convert" / "codecs.py"
    file.parent.mkdir(parents=True)
    file.write_text("import math\nimport numpy as np\nfrom flax_resblock import config\n")
    assert violations(tmp_path) == []


def test_the_converter_and_the_files_run_without_jax():
    code = (
        "import sys, flax_resblock.convert.opening, flax_resblock.convert.modules\n"
        "import flax_resblock.checkpoint, flax_resblock.runs.run\n"
        "print({'jax', 'flax', 'torch'} & set(sys.modules))"
    )
    done = python("-c", code, check=True)
    assert done.stdout.strip() == "set()"


def repeated(root: Path) -> set[str]:
    """Public classes of the library that share their name with another one."""
    found: list[str] = []
    for file in (root / "flax_resblock").rglob("*.py"):
        body = ast.parse(file.read_text(encoding="utf-8")).body
        found += [node.name for node in body if isinstance(node, ast.ClassDef)]
    return {name for name in found if found.count(name) > 1 and not name.startswith("_")}


def test_every_class_has_a_name_of_its_own(tmp_path):
    assert repeated(REPOSITORY) == {"ResNet"}  # nnx and Linen
    (tmp_path / "flax_resblock").mkdir()
    for name in ("one", "other"):
        (tmp_path / "flax_resblock" / f"{name}.py").write_text("class Place:\n    pass\n")
    assert repeated(tmp_path) == {"Place"}


def test_layers_know_no_pytorch_name():
    words = {"running_mean", "running_var", "downsample", "bn1", "layer1", "state_dict"}
    for file in (
        *(REPOSITORY / "flax_resblock" / "nn").glob("*.py"),
        *(REPOSITORY / "flax_resblock" / "config").glob("*.py"),
    ):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        texts = {
            node.value
            for node in nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not words & (names | texts), file.name
