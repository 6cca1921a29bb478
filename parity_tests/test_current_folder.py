"""A folder full of the user's own modules does not disturb the library or its processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import flax_resblock
from flax_resblock import ResNet, ResNetConfig
from flax_resblock.aot.compiler import require_compiler
from flax_resblock.errors import MissingDependencyError
from parity_tests.support import fast_only

OWN = ("train", "data", "config", "utils", "models", "nn", "test", "common", "training", "cli")
"""Names that a user gives modules."""
DEPENDENCIES = (
    *("numpy", "jax", "flax", "optax", "torch", "tyro", "rich", "PIL", "grain", "safetensors"),
    *("flax_resblock", "torch_ref", "socket", "pickle", "random", "inspect", "typing"),
)
"""What must not be found in the current folder if the command does not search it."""

SPELLINGS = {
    # Python itself puts the current folder on the path, so that only names of the user's own work
    "python -m": ([sys.executable, "-m", "flax_resblock"], OWN),
    "console script": (
        [str(Path(sys.executable).with_name("flax-resblock"))],
        (*OWN, *DEPENDENCIES),
    ),
}
NETWORK = ResNetConfig(depths=(1,), widths=(4,), stem="cifar", stem_width=4, num_classes=10)
COMMANDS = {
    "inspect": "inspect net.pth",
    "predict": "predict net.pth image.png",
    "convert": "convert net.pth out.safetensors",
    "export": "export net.pth exported",
    "verify": "verify net.pth --eval-only",
    "train": "train --steps 2 --warmup-steps 0 --batch-size 600 --pad 1 --workers 2 --out run",
    "bench": "bench --what forward --architecture block --image-size 8 --rounds 1 --threads 1",
    "aot": "aot net.pth --target cuda:a100 --batch 1",
    "demo": "demo --epochs 1",
}


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py was imported')\n")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    flax_resblock.save(ResNet(NETWORK, rngs=nnx.Rngs(0)), folder / "net.pth")
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", fast_only(["inspect"], COMMANDS))
def test_every_command_works_beside_modules_of_the_users_own(name, spelling, inputs, tmp_path):
    if name == "aot":
        try:
            require_compiler("cuda")
        except MissingDependencyError as error:
            pytest.skip(f"make compilers: {error}")
    command, names = SPELLINGS[spelling]
    for file in inputs.iterdir():
        (tmp_path / file.name).symlink_to(file)
    fill(tmp_path, names)
    done = run(tmp_path, *command, *COMMANDS[name].split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert "was imported" not in done.stdout + done.stderr


def test_the_modules_of_the_user_would_be_noticed(tmp_path):
    """The control of the test above, in the same two ways to start Python."""
    fill(tmp_path, ("train", "numpy"))
    done = run(tmp_path, sys.executable, "-c", "import train")
    assert "train.py was imported" in done.stderr
    done = run(tmp_path, sys.executable, "-m", "flax_resblock", "inspect", "net.pth")
    assert "numpy.py was imported" in done.stderr


def test_a_script_beside_them_imports_the_library(inputs, tmp_path):
    fill(tmp_path, OWN)
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "import flax_resblock\n"
        "from flax_resblock.training import PRESETS, fit\n"
        "from flax_resblock.training.data import Augmentation, open_data\n"
        "print(type(flax_resblock.load(sys.argv[1])).__name__, fit.__name__)\n"
    )
    done = run(tmp_path, sys.executable, "mine.py", str(inputs / "net.pth"))
    assert done.stdout == "ResNet fit\n", done.stderr
