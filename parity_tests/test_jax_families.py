"""Checkpoints of JAX programs, saved by the programs themselves: read with no flags, computed as
the programs compute, taken to PyTorch and back. The packages are installed in a folder of their
own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from functools import partial
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
from parity_tests.families import import_timm, randomise
from parity_tests.support import REPOSITORY, assert_same_bits, installed_apart, torch_output
from torch_ref import ResNet

pytestmark = pytest.mark.slow

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
    "haiku v2": "haiku_v2",
    "haiku v2, bottleneck": "haiku_v2",
    "big_vision": "big_vision",
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


def wrong(config):
    """The negative controls: what a network of the same tensors may be taken for."""
    pool = "3x3" if config.stem_pool == "3x3_zeros" else "3x3_zeros"
    paddings = {"symmetric": "same", "same": "symmetric"}
    if pool != "3x3":
        yield {"padding": paddings[config.padding], "stem_padding": None}
    if config.norm_first:
        yield {"shortcut_from": "input"}
    if config.norm == "group":
        yield from ({"norm_groups": 16}, {"stem_pool": pool}, {"standardized_eps": 1e-8})


def changed(model, change):
    """The network of the same tensors and another configuration."""
    other = build(replace(model.config, **change), rngs=None)
    set_values(other, flat_arrays(model))
    other.eval()
    return other


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
        for change in wrong(model.config):
            assert error(changed(model, change), truth) > 100 * 1e-12, change
        flax_resblock.save(model, tmp_path / "out.pth")
        state = torch.load(tmp_path / "out.pth", weights_only=True)
        module = ResNet(**asdict(model.config)).double()
        module.load_state_dict(state, strict=True)
        images = from_numpy(np.moveaxis(truth["images"], -1, 1).copy()).double()
        with torch.no_grad():
            assert relative_l2(module.eval()(images).numpy(), truth["output"]) <= 1e-12
        again = loaded(tmp_path / "out.pth")
        assert again.config == model.config
        formats = "back.npz" if NAMINGS[name].startswith(("haiku", "big")) else "back.msgpack"
        ways = {formats: NAMINGS[name]}
        if name.startswith("flaxmodels"):
            ways["back.h5"] = "flaxmodels"
        for place, naming in ways.items():
            flax_resblock.save(again, tmp_path / place, naming=naming)
            back = programs.do(name, "run", tmp_path, tmp_path / place)
            assert relative_l2(back["output"], truth["output"]) <= 1e-12
            assert error(loaded(tmp_path / place), truth) <= 1e-12
        assert_same_bits(*map(in_order, (tmp_path / formats, file)))


def test_a_published_file_of_big_transfer_is_computed_and_written_as_timm_reads_it(tmp_path):
    theirs = timms_bit()
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    np.savez(tmp_path / "net.npz", **{published(n): hwio(n, v) for n, v in state.items()})
    images = np.random.default_rng(2).normal(0.2, 1, (2, 45, 38, 3))
    truth = {"images": images, "output": torch_output(theirs, images)}
    with jax.enable_x64(True):
        model = loaded(tmp_path / "net.npz")
        assert error(model, truth) <= 1e-12
        for change in wrong(model.config):
            assert error(changed(model, change), truth) > 100 * 1e-12, change
        flax_resblock.save(model, tmp_path / "back.npz", naming="bit")
        again = timms_bit(seed=1)
        assert relative_l2(torch_output(again, images), truth["output"]) > 0.1
        again.load_pretrained(str(tmp_path / "back.npz"))
        assert_same_bits({n: v.numpy() for n, v in again.state_dict().items()}, state)
        assert loaded(tmp_path / "back.npz").config == model.config


def timms_bit(seed=0):
    """A small network of timm's, with the eps of the programs that trained the published ones."""
    timm = import_timm()
    layers, make = timm.layers, timm.models.resnetv2.ResNetV2
    sizes = {"layers": (2, 1), "channels": (128, 256), "stem_chs": 32, "num_classes": 5}
    options = {"stem_type": "fixed", "conv_layer": partial(layers.StdConv2d, eps=1e-10)}
    norm = partial(layers.GroupNormAct, num_groups=32)
    torch.manual_seed(seed)
    module = make(**sizes, **options, norm_layer=norm)
    with torch.no_grad():
        module.get_parameter("head.fc.weight").normal_()
    return randomise(module, seed).eval()


def published(name):
    """The name that the published files have for a tensor of timm's network."""
    parts = re.fullmatch(
        r"stages\.(\d)\.blocks\.(\d)\.(conv|norm|downsample)(\d)?.*\.(weight|bias)", name
    )
    kinds = {"weight": "gamma", "bias": "beta"}
    if parts is None:
        module, _, kind = name.rpartition(".")
        ends = {"stem.conv": "root_block/standardized_conv2d", "head.fc": "head/conv2d"}
        leaf = kinds[kind] if module == "norm" else {"weight": "kernel"}.get(kind, kind)
        return f"resnet/{ends.get(module, 'group_norm')}/{leaf}"
    stage, block, layer, number, kind = parts.groups()
    unit = f"resnet/block{int(stage) + 1}/unit{int(block) + 1:02}"
    if layer == "downsample":
        return f"{unit}/a/proj/standardized_conv2d/kernel"
    part = "abc"[int(number) - 1]
    if layer == "conv":
        return f"{unit}/{part}/standardized_conv2d/kernel"
    return f"{unit}/{part}/group_norm/{kinds[kind]}"


def hwio(name, value):
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value


def test_a_network_of_big_vision_with_other_kernels_is_refused_by_name(tmp_path):
    np.savez(tmp_path / "net.npz", **{"gn_root/scale": np.ones(32), "conv_root/kernel": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"gn_root.*standard deviation.*not converted\.$"):
        flax_resblock.load(tmp_path / "net.npz")
