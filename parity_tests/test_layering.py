"""Who may import whom, as DESIGN says: the rule is a table, and the check can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.support import REPOSITORY

FREE = set(sys.stdlib_module_names)
ARRAYS = {"numpy", "ml_dtypes"}
JAX = ARRAYS | {"jax", "flax", "optax"}

# Path prefix -> top-level packages and own modules that may be imported there. The longest prefix
# that fits a file decides.
ALLOWED: dict[str, set[str]] = {
    "torch_ref": {"torch", "torch_ref"},
    "flax_resblock/block_config.py": set(),
    "flax_resblock/architecture.py": {"flax_resblock.config"},
    "flax_resblock/errors.py": set(),
    "flax_resblock/schedules.py": set(),
    "flax_resblock/__init__.py": {"flax_resblock"},
    "flax_resblock/__main__.py": {"flax_resblock.cli"},
    "flax_resblock/initializers.py": JAX,
    "flax_resblock/lowering": JAX | {"flax_resblock.cpu"},
    "flax_resblock/norm.py": JAX | {f"flax_resblock.{m}" for m in ("initializers", "lowering")},
    "flax_resblock/conv.py": JAX | {f"flax_resblock.{m}" for m in ("initializers", "lowering")},
    "flax_resblock/linear.py": JAX | {"flax_resblock.nn.initializers"},
    "flax_resblock/pooling.py": JAX | {f"flax_resblock.{m}" for m in ("conv", "lowering")},
    "flax_resblock/layers.py": JAX
    | {f"flax_resblock.{m}" for m in ("conv", "initializers", "lowering", "norm")},
    "flax_resblock/attention.py": JAX | {f"flax_resblock.{m}" for m in ("block_config", "layers")},
    "flax_resblock/shortcuts.py": JAX
    | {f"flax_resblock.{m}" for m in ("block_config", "layers", "pooling")},
    "flax_resblock/blocks.py": JAX
    | {
        f"flax_resblock.{m}"
        for m in ("attention", "block_config", "layers", "pooling", "shortcuts")
    },
    "flax_resblock/resnet.py": JAX
    | {f"flax_resblock.{m}" for m in ("architecture", "blocks", "conv", "linear", "pooling")},
    "flax_resblock/optimizers.py": JAX
    | {f"flax_resblock.{m}" for m in ("architecture", "convert")},
    "flax_resblock/linen.py": JAX
    | {f"flax_resblock.{m}" for m in ("architecture", "resnet", "transfer")},
    "flax_resblock/transfer.py": JAX | {"flax_resblock"},
    "flax_resblock/aot": JAX
    | {
        f"flax_resblock.{m}"
        for m in (
            "aot",
            "architecture",
            "conv",
            "errors",
            "export",
            "linear",
            "lowering",
            "norm",
            "resnet",
        )
    },
    "flax_resblock/aot/hlo.py": set(),
    "flax_resblock/export.py": JAX | {"flatbuffers", "safetensors", "flax_resblock"},
    "flax_resblock/fold.py": JAX | {"flax_resblock"},
    "flax_resblock/inference.py": JAX | {"flax_resblock"},
    "flax_resblock/bench": JAX
    | {"torch", "safetensors", "train", "rich", "matplotlib", "flax_resblock"},
    "flax_resblock/convert": ARRAYS
    | {
        f"flax_resblock.{m}"
        for m in ("architecture", "checkpoint", "convert", "errors", "schedules", "__version__")
    },
    "flax_resblock/checkpoint": ARRAYS
    | {"safetensors", "flax_resblock.checkpoint", "flax_resblock.errors"},
    "flax_resblock/checkpoint/torch_file.py": ARRAYS
    | {"torch", "flax_resblock.checkpoint", "flax_resblock.errors"},
    "flax_resblock/checkpoint/orbax_folder.py": ARRAYS
    | {"jax", "orbax", "flax_resblock.checkpoint", "flax_resblock.errors"},
    "flax_resblock/checkpoint/orbax_check.py": ARRAYS
    | {"tensorstore", "flax_resblock.checkpoint", "flax_resblock.errors"},
    "flax_resblock/parity": JAX
    | {"torch", "torch_ref", "rich", "jinja2", "matplotlib", "flax_resblock"},
    "flax_resblock/parity/certificate.py": {f"flax_resblock.{m}" for m in ("checkpoint", "errors")},
    "flax_resblock/parity/certify.py": {"jax"}
    | {
        f"flax_resblock.{m}"
        for m in ("architecture", "checkpoint", "convert", "errors", "parity", "__version__")
    },
    "flax_resblock/cli": JAX
    | {"torch", "torch_ref", "train", "rich", "tyro", "PIL", "matplotlib", "flax_resblock"},
    "train": JAX | {"rich", "flax_resblock", "train"},
    "train/curves.py": ARRAYS
    | {"matplotlib", "flax_resblock.errors", "flax_resblock.training.reports"},
    "train/records.py": {
        "tensorboardX",
        "flax_resblock.checkpoint",
        "flax_resblock.errors",
        "flax_resblock.training.reports",
    },
    "train/data": ARRAYS
    | {"PIL", "absl", "grain", "sklearn", "flax_resblock.errors", "flax_resblock.training.data"},
}
NEVER_ELSEWHERE = {
    "flax_resblock.cli": "flax_resblock/cli",
    "flax_resblock.parity": ("flax_resblock/bench", "flax_resblock/parity", "flax_resblock/cli"),
}
LAZILY = {("flax_resblock/transfer.py", "flax_resblock.parity.forward_check.check_forward")}
"""Exceptions to NEVER_ELSEWHERE: names that a file may import within a function only."""


def within_functions(tree: ast.AST) -> set[ast.AST]:
    """Every node that runs only when a function is called."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    functions = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    statements = [statement for function in functions for statement in function.body]
    return {inner for statement in statements for inner in ast.walk(statement)}


def imports(source: str, *, on_import: bool = False) -> set[str]:
    """Dotted names of everything imported, or only of what importing the file imports.

    ``from a import b`` is ``a.b``; ``import_module("a")`` and ``__import__("a")`` are ``a``.
    """
    names = set()
    tree = ast.parse(source)
    skipped = within_functions(tree) if on_import else set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = (
                node.func.attr
                if isinstance(node.func, ast.Attribute)
                else getattr(node.func, "id", "")
            )
            names |= (
                {str(node.args[0].value)} if called in ("import_module", "__import__") else set()
            )
    return names


def violations(root: Path) -> list[str]:
    """``file: name`` for every import that the table does not allow."""
    found = []
    for file in sorted(
        p for top in ("torch_ref", "flax_resblock", "train") for p in (root / top).rglob("*.py")
    ):
        place = file.relative_to(root).as_posix()
        rules = [prefix for prefix in ALLOWED if place == prefix or place.startswith(f"{prefix}/")]
        allowed = ALLOWED[max(rules, key=len)] if rules else set()
        code = file.read_text(encoding="utf-8")
        on_import = imports(code, on_import=True)
        for name in imports(code):
            parents = {".".join(name.split(".")[: i + 1]) for i in range(len(name.split(".")))}
            restricted = any(
                parent in NEVER_ELSEWHERE and not place.startswith(NEVER_ELSEWHERE[parent])
                for parent in parents
            )
            lazy = (place, name) in LAZILY and name not in on_import
            excepted = lazy or place == "flax_resblock/__main__.py"
            if (restricted and not excepted) or not (
                name.split(".")[0] in FREE or parents & allowed
            ):
                found.append(f"{place}: {name}")
    return found


def test_every_import_is_allowed():
    assert violations(REPOSITORY) == []


BREACHES = {
    "torch in a block": ("flax_resblock/blocks.py", "import torch"),
    "torch in the converter": (
        "flax_resblock/convert/state_map.py",
        "def f():\n    import torch.nn",
    ),
    "jax in the converter": ("flax_resblock/convert/codecs.py", "import jax.numpy as jnp"),
    "jax through a layer in the converter": (
        "flax_resblock/convert/source.py",
        "from flax_resblock.nn.blocks import ResidualBlock",
    ),
    "jax in the files": ("flax_resblock/checkpoint/record.py", "import jax"),
    "the converter in the files": (
        "flax_resblock/checkpoint/record.py",
        "from flax_resblock.convert import NAMINGS",
    ),
    "torch by a string": (
        "flax_resblock/transfer.py",
        "import importlib\ntorch = importlib.import_module('torch')",
    ),
    "a relative import": ("flax_resblock/norm.py", "from ..torch_ref import Block"),
    "an array in the description": ("flax_resblock/architecture.py", "import numpy as np"),
    "numpy in the reference": ("torch_ref/block.py", "import numpy as np"),
    "the reference in the library": ("flax_resblock/transfer.py", "from torch_ref import ResNet"),
    "training in the library": ("flax_resblock/linen.py", "import flax_resblock.training.step"),
    "converter in a layer": ("flax_resblock/norm.py", "from flax_resblock.convert import NAMINGS"),
    "torch in training": ("train/step.py", "from torch import nn"),
    "jax in the data": ("train/data/stream.py", "def f():\n    import jax"),
    "reference in training": ("train/loop.py", "import torch_ref.training"),
    "flax in the reference": ("torch_ref/block.py", "from flax import nnx"),
    "command line in the library": (
        "flax_resblock/transfer.py",
        "from flax_resblock.cli import run",
    ),
    "verifier in the library": (
        "flax_resblock/transfer.py",
        "from flax_resblock.parity import compare",
    ),
    "the forward check when the library is imported": (
        "flax_resblock/transfer.py",
        "from flax_resblock.parity.forward_check import check_forward",
    ),
    "the forward check elsewhere": (
        "flax_resblock/linen.py",
        "def f():\n    from flax_resblock.parity.forward_check import check_forward",
    ),
    "another part of the verifier": (
        "flax_resblock/transfer.py",
        "def f():\n    from flax_resblock.parity.api import compare",
    ),
    "torch in the certificate": (
        "flax_resblock/parity/certificate.py",
        "def f():\n    import torch",
    ),
    "a new dependency": ("flax_resblock/conv.py", "import einops"),
    "a file that no rule covers": ("flax_resblock/new.py", "import jax"),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_the_check_finds(breach, tmp_path):
    place, code = BREACHES[breach]
    (tmp_path / place).parent.mkdir(parents=True)
    (tmp_path / place).write_text(code)
    assert len(violations(tmp_path)) == 1


def test_a_tree_that_keeps_the_rules_passes(tmp_path):
    (tmp_path / "flax_resblock" / "convert").mkdir(parents=True)
    (tmp_path / "flax_resblock" / "convert" / "codecs.py").write_text(
        "import math\nimport numpy as np\nfrom flax_resblock import architecture as arch\n"
    )
    assert violations(tmp_path) == []


def test_the_converter_and_the_files_run_without_jax():
    code = (
        "import sys, flax_resblock.convert.opening, flax_resblock.convert.modules, "
        "flax_resblock.checkpoint\nprint({'jax', 'flax', 'torch'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "set()"
    )


def test_layers_know_no_pytorch_name():
    words = ("running_mean", "running_var", "downsample", "bn1", "layer1", "state_dict")
    for name in (
        "attention",
        "architecture",
        "block_config",
        "blocks",
        "conv",
        "initializers",
        "layers",
        "norm",
        "resnet",
        "shortcuts",
    ):
        code = (REPOSITORY / "flax_resblock" / f"{name}.py").read_text()
        constants = {
            node.value
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        names = {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
        exact = {constant for constant in constants if len(constant) < 40}
        assert not {word for word in words if word in exact | names}, name
