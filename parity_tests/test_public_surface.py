"""Every documented name is there, has types, and takes a naming scheme of the user's own."""

from __future__ import annotations

import doctest
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import get_type_hints

import numpy as np
import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import (
    NAMINGS,
    CheckpointError,
    InputError,
    Naming,
    ResNet,
    ResNetConfig,
    checkpoint,
    from_torch,
    load,
    load_run,
    save,
    to_torch,
)
from flax_resblock.cli import run as run_command
from flax_resblock.config import NetworkOptions
from flax_resblock.convert import StateMap, describe, identify, namings
from flax_resblock.convert.opening import open_checkpoint
from flax_resblock.convert.state_map import transcode
from flax_resblock.parity.inputs import randomised_norm_state
from flax_resblock.parity.pair import PRECISIONS
from flax_resblock.parity.reference import ReferencePair
from parity_tests import runs
from parity_tests.support import REPOSITORY, python
from parity_tests.typing import example

CONFIG = ResNetConfig(depths=(1, 2), widths=(4, 6), stem="cifar", stem_width=4, num_classes=3)
OWN = replace(
    example.OWN,
    modules={**example.OWN.modules, "shortcut.conv": "skip.conv", "shortcut.norm": "skip.bn"},
)
STRAIGHT = StateMap(CONFIG, "torchvision")


@pytest.fixture
def model() -> ResNet:
    fresh = ResNet(CONFIG, rngs=nnx.Rngs(0))
    restored = from_torch(randomised_norm_state(to_torch(fresh), seed=1))
    assert isinstance(restored, ResNet)
    return restored


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == value.tobytes() for key, value in theirs.items())


@pytest.mark.slow
def test_a_users_program_type_checks_in_strict_mode():
    checked = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(
        [*checked, str(REPOSITORY / "parity_tests" / "typing" / "example.py")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_type_check_of_a_users_program_can_fail(tmp_path):
    text = (REPOSITORY / "parity_tests" / "typing" / "example.py").read_text(encoding="utf-8")
    (tmp_path / "wrong.py").write_text(text.replace("num_classes=3, widths=", "colour=3, widths="))
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(REPOSITORY)]}))
    done = python("-m", "pyright", "--pythonpath", sys.executable, "wrong.py", cwd=tmp_path)
    assert done.returncode == 1
    assert 'No parameter named "colour"' in done.stdout


def test_a_users_program_runs(tmp_path):
    assert example.main(tmp_path)


def test_every_public_name_is_there_and_no_function_takes_untyped_keywords():
    assert set(flax_resblock.__all__) <= set(dir(flax_resblock))
    for name in flax_resblock.__all__:
        value = getattr(flax_resblock, name)
        if inspect.isfunction(value):
            kinds = inspect.signature(value).parameters.values()
            assert all("Unpack" in str(p.annotation) for p in kinds if p.kind is p.VAR_KEYWORD), (
                name
            )


def test_the_options_of_create_are_the_fields_of_a_configuration():
    fields = get_type_hints(ResNetConfig)
    assert get_type_hints(NetworkOptions) == {
        name: fields[name] for name in fields if name not in ("in_channels", "num_classes")
    }


def test_the_example_of_a_naming_scheme_does_what_it_says():
    names = {"nnx": nnx, **{name: getattr(flax_resblock, name) for name in flax_resblock.__all__}}
    (example_,) = (
        test for test in doctest.DocTestFinder().find(Naming, globs=names) if test.examples
    )
    outcome = doctest.DocTestRunner().run(example_)
    assert outcome.attempted >= 6
    assert not outcome.failed


def test_an_own_scheme_converts_there_and_back_bit_for_bit(model):
    straight = to_torch(model)
    own = to_torch(model, OWN)
    assert "group2.unit0.skip.conv.weight" in own
    assert list(own) == [entry.torch_key for entry in StateMap(CONFIG, OWN).entries]
    assert_same(to_torch(from_torch(own, naming=OWN)), straight)
    assert_same(to_torch(from_torch(straight), naming=OWN), own)
    match = identify(describe(own), naming=OWN)
    assert (match.state_map.config, match.state_map.naming) == (CONFIG, OWN)
    # without it the names are labels, and the same scheme is learned
    assert_same(to_torch(from_torch(own)), straight)


def test_the_parity_functions_take_an_own_scheme(model):
    own = ReferencePair(CONFIG, to_torch(model, OWN), {}, naming=OWN)
    assert_same(transcode(own.state_map, STRAIGHT, own.state), to_torch(model))
    x = np.random.default_rng(0).standard_normal((2, 8, 8, 3), np.float32)
    flax = own.flax(PRECISIONS["float32"])
    flax.eval()
    assert np.array_equal(flax(x), model(x))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_a_file_in_an_own_scheme_holds_it_and_is_read_with_it(suffix, model, tmp_path):
    path = tmp_path / f"net{suffix}"
    save(model, path, naming=OWN)
    opened = open_checkpoint(path)
    assert opened.state_map.naming == (NAMINGS["flax"] if suffix == "" else OWN)  # Orbax: Flax's
    assert opened.all_notes == ()
    for scheme in (None, OWN if suffix else None):
        assert_same(to_torch(load(path, naming=scheme)), to_torch(model))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("name = ", "Invalid value"),
        ("name = 'own'", "it has no 'modules'"),
        ("name = 'own'\nstage = '{stage.__class__}'\n[modules]", "no other braces"),
        ("name = 'own'\nstage = '{stage:999999999}'\n[modules]", "no other braces"),
        ("name = 'own'\nblocks = [[3]]\n[modules]", "blocks is a list of lists of texts"),
        ("name = 'own'\nmore = 1\nstage = 'a'\n[modules]", "unknown entry 'more'"),
    ],
)
def test_a_damaged_scheme_is_refused(text, why, model, tmp_path, capsys):
    save(model, tmp_path / "net.safetensors", naming=OWN)
    record = checkpoint.read(tmp_path / "net.safetensors")
    metadata = {**record.metadata, "naming_scheme": text}
    checkpoint.write(tmp_path / "bad.safetensors", dict(record.tensors), metadata=metadata)
    with pytest.raises(CheckpointError, match=re.escape(why)):
        load(tmp_path / "bad.safetensors")
    (tmp_path / "own.toml").write_text(text)
    flags = ["--naming", str(tmp_path / "own.toml")]
    assert run_command(["inspect", str(tmp_path / "net.safetensors"), *flags]) == 2
    assert why in " ".join(capsys.readouterr().err.split())


def test_a_run_in_an_own_scheme_is_read_with_it(tmp_path):
    _, path = runs.saved("Lightning", tmp_path, epochs=1)
    model, run = load_run(path)
    save(model, tmp_path / "own.safetensors", run=run, naming=OWN)
    again, copied = load_run(tmp_path / "own.safetensors", naming=OWN)
    assert_same(to_torch(again), to_torch(model))
    for name, tensors in run.optimizer.tensors.items():
        assert_same(copied.optimizer.tensors[name], tensors)


def test_the_command_line_gives_an_own_scheme_back(model, tmp_path, capsys):
    save(model, tmp_path / "own", naming=OWN)  # an Orbax folder, which says where it came from
    out = tmp_path / "out.pth"
    assert run_command(["convert", str(tmp_path / "own"), str(out)]) == 0
    assert_same(dict(checkpoint.read(out).tensors), to_torch(model, OWN))
    capsys.readouterr()
    assert run_command(["inspect", str(out), "--show-naming"]) == 0
    (tmp_path / "own.toml").write_text(capsys.readouterr().out)
    torch.save({k: torch.from_numpy(v) for k, v in to_torch(model, OWN).items()}, out)
    flags = ["--force", "--naming", str(tmp_path / "own.toml"), "--to-naming", "torchvision"]
    assert run_command(["convert", str(out), str(tmp_path / "back.safetensors"), *flags]) == 0
    assert_same(to_torch(load(tmp_path / "back.safetensors")), to_torch(model))


def test_a_scheme_that_takes_a_known_name_or_that_nobody_knows_is_refused(model):
    with pytest.raises(InputError, match="'kuangliu' is the name of one of this library's"):
        to_torch(model, replace(OWN, name="kuangliu"))
    with pytest.raises(InputError, match="naming scheme 'kuanglui' is unknown; known: torchvision"):
        to_torch(model, "kuanglui")
    assert namings.naming_of(NAMINGS["timm"]) is namings.naming_of("timm")


def test_torch_tensors_in_an_own_scheme_are_read(model):
    own = {key: torch.from_numpy(value) for key, value in to_torch(model, OWN).items()}
    assert_same(to_torch(from_torch(own, naming=OWN)), to_torch(model))
