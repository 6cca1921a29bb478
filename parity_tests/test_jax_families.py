"""Checkpoints of JAX programs, saved by the programs themselves: read with no flags, computed as
the programs compute, taken to PyTorch and back. The packages are installed in a folder of their
own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
import pytest
import torch

import flax_resblock
from flax_resblock import checkpoint
from flax_resblock.checkpoint.torch_file import from_numpy
from flax_resblock.errors import CheckpointError
from flax_resblock.nn.resnet import build
from flax_resblock.nn.variables import flat_arrays, set_values
from flax_resblock.parity.oracle import relative_l2
from parity_tests.support import REPOSITORY, assert_same_bits, installed_apart
from torch_ref import ResNet

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("jax families")]

PACKAGES = (
    *("jax-resnet==0.0.4", "flaxmodels==0.1.3", "dm-haiku==0.0.17", "jmp", "tabulate", "h5py"),
    *("transformers==4.46.3", "tokenizers<0.21", "huggingface_hub<1", "requests", "urllib3"),
    *("idna", "certifi", "charset_normalizer"),
)
"""Without what they depend on and this library has."""
NAMINGS = {
    "flax example": "flax_imagenet_basic",
    "flax example, bottleneck": "flax_imagenet_bottleneck",
    "jax-resnet": "jax_resnet",
    "jax-resnet, D": "jax_resnet_d",
    "transformers": "flax_huggingface_basic",
    "transformers, bottleneck": "flax_huggingface_bottleneck",
    "flaxmodels": "flaxmodels_linen_basic",
    "flaxmodels, bottleneck": "flaxmodels_linen_bottleneck",
    "haiku": "haiku",
    "haiku, bottleneck": "haiku",
    "bonsai": "bonsai",
}


class Programs:
    """The process that runs them."""

    def __init__(self, packages: Path) -> None:
        script = REPOSITORY / "parity_tests" / "jax_programs.py"
        environment = {**os.environ, "PYTHONPATH": str(packages), "USE_TORCH": "0"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script)],
            **pipes,
            env=environment,
            stderr=subprocess.DEVNULL,
        )

    def do(self, *what: object) -> dict[str, np.ndarray]:
        """The images and the output of the program."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps([str(one) for one in what]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer == "done\n", json.loads(answer or '"it died"')
        return dict(
            np.load(Path(str(what[2])) / ("truth.npz" if what[1] == "save" else "again.npz"))
        )


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return installed_apart(tmp_path_factory.mktemp("packages"), PACKAGES)


@pytest.fixture(scope="module")
def programs(packages):
    running = Programs(packages)
    yield running
    running.process.kill()
    running.process.wait()


def loaded(file, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flax_resblock.load(file, **options)


def in_order(file) -> dict[str, np.ndarray]:
    """The tensors of a file by name; counters in the type that PyTorch has for them."""
    return {
        name: value.astype(np.int64) if value.dtype.kind == "i" else value
        for name, value in sorted(checkpoint.read(file).tensors.items())
    }


def error(model, truth) -> float:
    output = np.asarray(model(truth["images"].astype(np.float64)))
    return relative_l2(output, truth["output"])


@pytest.mark.parametrize("name", NAMINGS)
def test_a_network_of_a_jax_program_is_computed_as_there_and_goes_to_pytorch_and_back(
    name, programs, packages, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])  # h5py
    truth = programs.do(name, "save", tmp_path)
    with jax.enable_x64(True):
        for file in sorted(tmp_path.glob("net*")):
            model = loaded(file)
            assert error(model, truth) <= 1e-12, file
        told = {"padding": "symmetric", "stem_padding": None}
        if model.config.padding == "symmetric":
            told["padding"] = "same"
        other = build(replace(model.config, **told), rngs=None)  # the negative control
        set_values(other, flat_arrays(model))
        other.eval()
        assert error(other, truth) > 100 * 1e-12
        flax_resblock.save(model, tmp_path / "out.pth")
        state = torch.load(tmp_path / "out.pth", weights_only=True)
        module = ResNet(**asdict(model.config)).double()
        module.load_state_dict(state, strict=True)
        images = from_numpy(np.moveaxis(truth["images"], -1, 1).copy()).double()
        with torch.no_grad():
            assert relative_l2(module.eval()(images).numpy(), truth["output"]) <= 1e-12
        again = loaded(tmp_path / "out.pth")
        assert again.config == model.config
        formats = {"haiku": "back.npz"}.get(NAMINGS[name], "back.msgpack")
        ways = {formats: NAMINGS[name]}
        if name.startswith("flaxmodels"):
            ways["back.h5"] = "flaxmodels"
        for place, naming in ways.items():
            flax_resblock.save(again, tmp_path / place, naming=naming)
            back = programs.do(name, "run", tmp_path, tmp_path / place)
            assert relative_l2(back["output"], truth["output"]) <= 1e-12
            assert error(loaded(tmp_path / place), truth) <= 1e-12
        assert_same_bits(*map(in_order, (tmp_path / formats, file)))


def test_a_haiku_network_of_version_2_is_refused_by_name(programs, tmp_path):
    programs.do("haiku v2", "save", tmp_path)
    for file in ("net.pkl", "net.npz"):
        with pytest.raises(CheckpointError, match=r"ResNet v2 .*no naming scheme.*\.$"):
            flax_resblock.load(tmp_path / file)
