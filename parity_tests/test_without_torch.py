"""A machine without torch can import, convert and run; and importing costs nothing."""

import resource
import statistics
import subprocess
import sys

import pytest
import torch

BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
"""


def run(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_safetensors_and_orbax_work_without_torch(tmp_path):
    code = (
        BLOCK_TORCH
        + """
import numpy as np, flax_resblock as fr
from flax import nnx
model = fr.create("resnet20", rngs=nnx.Rngs(1))
state = fr.to_torch(model)
again = fr.from_torch(state)
for name in ("a.safetensors", "b"):
    fr.save(again, sys.argv[1] + "/" + name)
    back = fr.to_torch(fr.load(sys.argv[1] + "/" + name))
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)
print(fr.load(sys.argv[1] + "/b")(np.ones((1, 32, 32, 3), np.float32)).shape, "torch" in sys.modules)
"""
    )
    result = run(code, tmp_path)
    assert result.stdout.split("\n")[0] == "(1, 10) False", result.stderr


def test_the_command_line_converts_without_torch_and_says_what_a_pth_needs(tmp_path):
    code = (
        BLOCK_TORCH
        + """
import flax_resblock as fr
from flax import nnx
from flax_resblock.cli import run
base = sys.argv[1]
fr.save(fr.create("resnet20", rngs=nnx.Rngs(1)), base + "/a.safetensors")
assert run(["convert", base + "/a.safetensors", base + "/b"]) == 0
assert run(["inspect", base + "/b"]) == 0
assert run(["verify", base + "/b"]) == 2
assert run(["convert", base + "/b", base + "/c.pth"]) == 2
"""
    )
    result = run(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("pip install 'flax-resblock[torch]'") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b", "parity.json"]


def test_reading_a_pth_without_torch_says_what_to_install(tmp_path):
    torch.save({"conv1.weight": torch.randn(3, 2, 3, 3)}, tmp_path / "net.pth")
    code = (
        BLOCK_TORCH
        + """
import flax_resblock as fr
from flax_resblock.errors import MissingDependencyError
try:
    fr.load(sys.argv[1] + "/net.pth")
except MissingDependencyError as error:
    print(error)
"""
    )
    result = run(code, tmp_path)
    assert "pip install 'flax-resblock[torch]'" in result.stdout, result.stderr


@pytest.mark.parametrize("names", [[], ["create", "from_torch", "load", "save", "to_torch", "BatchNorm", "ResidualBlock", "ResNetConfig", "architectures"]])
def test_importing_never_imports_torch(names):
    code = "import sys, flax_resblock\n" + "".join(f"flax_resblock.{name}\n" for name in names) + "print('torch' in sys.modules)"
    assert run(code).stdout.strip() == "False"


def test_every_public_name_exists():
    assert run("import flax_resblock as f; [getattr(f, name) for name in f.__all__]; print('torch' in __import__('sys').modules)").stdout.strip() == "False"


def _processor_seconds() -> float:
    """Time of all child processes on the processor; unlike time on the clock it does not grow when other tests run beside this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_importing_takes_no_longer_than_jax_and_nnx():
    everything = "import flax_resblock as f; [getattr(f, name) for name in f.__all__]"
    cases = {"base": "import jax, flax.nnx", "ours": "import jax, flax.nnx, flax_resblock", "alone": "import flax_resblock", "all names": everything}
    seconds = {name: [] for name in cases}
    for _ in range(7):
        for name, code in cases.items():
            start = _processor_seconds()
            assert run(code).returncode == 0
            seconds[name].append(_processor_seconds() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(medians)
    assert min(seconds["ours"]) <= 1.1 * min(seconds["base"]), medians
    assert medians["alone"] <= 1.1 * medians["base"], medians
