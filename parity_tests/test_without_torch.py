"""A machine without torch can import, convert and run; and importing costs nothing."""

import os

import numpy as np
import pytest
import safetensors.numpy
import torch

from flax_resblock.checkpoint.torch_file import with_tensors
from flax_resblock.config import architecture
from parity_tests.fuzz import samples
from parity_tests.support import assert_same_bits, python, random_bits

BLOCK_TORCH = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
"""


def run(code, *arguments):
    return python("-c", code, *arguments)


def without_torch(code, *arguments):
    return run(BLOCK_TORCH + code, *arguments)


@pytest.mark.slow
def test_safetensors_and_orbax_work_without_torch_and_a_pth_says_what_it_needs(tmp_path):
    code = """
import numpy as np, flax_resblock as fr
from flax import nnx
from flax_resblock.cli import run
a, b, c = (sys.argv[1] + "/" + name for name in ("a.safetensors", "b", "c.pth"))
model = fr.create("resnet20", rngs=nnx.Rngs(1))
state = fr.to_torch(model)
fr.save(fr.from_torch(state), a)
assert run(["convert", a, b]) == 0
assert run(["inspect", b]) == 0
for name in (a, b):
    back = fr.to_torch(fr.load(name))
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)
assert run(["verify", b]) == 2
assert run(["convert", b, c]) == 2
print(fr.load(b)(np.ones((1, 32, 32, 3), np.float32)).shape, "torch" in sys.modules)
"""
    result = without_torch(code, tmp_path)
    assert result.stdout.endswith("(1, 10) False\n"), result.stderr
    assert result.stderr.count("pip install 'flax-resblock[torch]'") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b"]


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pth_is_converted_and_loaded_without_torch(legacy, tmp_path):
    truth = random_bits(architecture("resnet20"), np.float32, seed=3)
    torch.save(with_tensors(truth), tmp_path / "net.pth", _use_new_zipfile_serialization=not legacy)
    code = """
import flax_resblock as fr
from flax_resblock.cli import run
base = sys.argv[1]
assert run(["convert", base + "/net.pth", base + "/net.safetensors", "--allow-nonfinite"]) == 0
assert run(["inspect", base + "/net.pth"]) == 0
model = fr.load(base + "/net.pth")
fr.save(model, base + "/again.safetensors")
print("torch" in sys.modules)
"""
    result = without_torch(code, tmp_path)
    assert result.stdout.endswith("False\n"), result.stderr
    for name in ("net", "again"):
        found = safetensors.numpy.load_file(tmp_path / f"{name}.safetensors")
        assert_same_bits({key: found[key] for key in truth if key in found}, truth)


@pytest.mark.slow
def test_an_optimizer_of_pytorch_is_read_without_torch(tmp_path):
    """Weights, momentum and schedule, as `train --resume` wants them, are what torch reads."""
    torch.save(samples.training(), tmp_path / "net.pth")
    code = "import sys\n" + (
        "from flax_resblock.convert.opening import open_checkpoint\nfrom "
        "flax_resblock.checkpoint.record import arrays_in, digests\n"
    )
    code += (
        "from flax_resblock.runs.run_file import run_of\n"
        "run = run_of(open_checkpoint(sys.argv[1] + '/net.pth', run=True))\n"
        "print(run)\nprint('torch' in sys.modules)\n"
    )
    without, with_torch = without_torch(code, tmp_path), run("import torch\n" + code, tmp_path)
    assert without.stdout.endswith("False\n"), without.stderr
    assert without.stdout.replace("False\n", "") == with_torch.stdout.replace("True\n", "")


def test_a_pth_with_what_only_pytorch_can_make_says_what_to_install(tmp_path):
    torch.save(
        {"state_dict": {"conv1.weight": torch.randn(3, 2, 3, 3)}, "where": torch.device("cuda:1")},
        tmp_path / "net.pth",
    )
    code = """
import flax_resblock as fr
from flax_resblock.errors import MissingDependencyError
try:
    fr.load(sys.argv[1] + "/net.pth")
except MissingDependencyError as error:
    print(error)
"""
    result = without_torch(code, tmp_path)
    assert "torch.device, which needs PyTorch" in result.stdout, result.stderr
    assert "pip install 'flax-resblock[torch]'" in result.stdout


@pytest.mark.slow
def test_importing_takes_no_longer_than_jax_and_nnx(tmp_path):
    """Both in one process: two processes differ by more than what is to be measured.

    With bytecode for both, as after an installation. jax has it from pip; where
    ``PYTHONDONTWRITEBYTECODE`` is set, every process would compile this library's source."""
    code = """
import time
start = time.process_time()
import jax, flax.nnx
base = time.process_time()
import flax_resblock
ours = time.process_time()
[getattr(flax_resblock, name) for name in flax_resblock.__all__]
print(base - start, ours - base, time.process_time() - base)
"""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    runs = [python("-c", code, env=environment).stdout for _ in range(6)]
    rows = [[float(word) for word in line.split()] for line in runs[1:]]
    # what else runs on the machine only ever adds time
    base, ours, all_names = (min(column) for column in zip(*rows, strict=True))
    print(
        f"jax and nnx {base:.2f} s, flax_resblock {ours:.3f} s more, with every public name "
        f"{all_names:.3f} s more"
    )
    assert all_names <= 0.15 * base  # measured: 0.07
