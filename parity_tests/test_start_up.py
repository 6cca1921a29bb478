"""What a start costs: what is imported, and what is compiled again."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

import flax_resblock
from flax_resblock.cli import COMMANDS, run
from flax_resblock.cli.cache import keep_compiled
from parity_tests.support import REPOSITORY, python

HEAVY = {"jax", "flax", "torch", "numpy", "rich", "tyro", "orbax", "tensorstore"}


def started(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT", "FLAX_RESBLOCK_CACHE", "XDG_"))
    }
    path = os.pathsep.join(filter(None, [str(REPOSITORY), inherited.get("PYTHONPATH")]))
    return python("-c", code, *arguments, env={**inherited, "PYTHONPATH": path, **environment})


def imported(*lines: tuple[str, ...], first: str = "sys") -> list[tuple[int, set[str]]]:
    """Of each command line its exit status, and every module that it imported. All run in copies
    of one process, which has imported ``first``."""
    code = (
        f"import {first}"
        + """
import json, os, sys
from flax_resblock.cli import run
for line in json.loads(sys.argv[1]):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    try:
        status = run(line)
    except SystemExit as exit:
        status = exit.code
    print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr, flush=True)
    os._exit(0)
"""
    )
    rows = [one for one in started(code, json.dumps(lines)).stderr.splitlines() if one[:1] == "["]
    assert len(rows) == len(lines)
    return [(status, set(modules)) for status, modules in map(json.loads, rows)]


def test_the_overview_imports_nothing_heavy():
    lines = {(): 0, ("--help",): 0, ("--version",): 0, ("inspct",): 2, ("--bogus", "inspect"): 2}
    for line, (status, modules) in zip(lines, imported(*lines), strict=True):
        assert status == lines[line], line
        assert not HEAVY & modules, line
        assert not {f"flax_resblock.cli.{name}" for name in COMMANDS} & modules, line


def test_the_help_of_a_command_imports_its_own_module_and_no_framework():
    found = imported(*((name, "--help") for name in COMMANDS), first="tyro")
    for name, (status, modules) in zip(COMMANDS, found, strict=True):
        assert status == 0, name
        assert f"flax_resblock.cli.{name}" in modules
        assert not {"jax", "flax", "torch", "tensorstore"} & modules, name


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    sizes = {"depths": (1,), "widths": (4,), "stem": "cifar", "stem_width": 4, "num_classes": 3}
    model = flax_resblock.ResNet(flax_resblock.ResNetConfig(**sizes), rngs=nnx.Rngs(3))
    for name in ("net.safetensors", "net.pth", "net"):
        flax_resblock.save(model, folder / name)
    return folder


NEEDLESS = {
    "net.safetensors": {"jax", "flax", "torch", "orbax", "tensorstore"},
    "net.pth": {"jax", "flax", "orbax", "tensorstore"},
    "net": {"torch", "torch_ref"},
}


def test_inspect_imports_only_what_the_format_needs(checkpoints):
    found = imported(*(("inspect", str(checkpoints / file)) for file in NEEDLESS))
    for file, (status, modules) in zip(NEEDLESS, found, strict=True):
        assert status == 0, file
        assert not NEEDLESS[file] & modules, file


def test_predict_reads_an_archive_without_the_packages_of_training(checkpoints, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 32, 32, 3), np.uint8))
    line = ("predict", str(checkpoints / "net.safetensors"), str(tmp_path / "a.npz"))
    ((status, modules),) = imported(line)
    assert status == 0
    training = {"grain", "sklearn", "tensorboardX", "matplotlib", "flax_resblock.training.loop"}
    assert not training & modules


def test_the_overview_lists_every_command_and_its_options(capsys):
    assert run([]) == 0
    text = capsys.readouterr().out
    for name in (*COMMANDS, "--help", "--version", "--traceback"):
        assert name in text


def test_the_kept_programs_lie_where_the_environment_says(tmp_path):
    for given, folder in (
        (
            {
                "FLAX_RESBLOCK_CACHE": str(tmp_path / "own"),
                "JAX_COMPILATION_CACHE_DIR": "/elsewhere",
            },
            tmp_path / "own",
        ),
        ({"XDG_CACHE_HOME": str(tmp_path / "xdg")}, tmp_path / "xdg" / "flax-resblock" / "xla"),
    ):
        environment = dict(given)
        assert keep_compiled(environment) is None
        assert environment["JAX_COMPILATION_CACHE_DIR"] == str(folder)
        assert int(environment["JAX_COMPILATION_CACHE_MAX_SIZE"]) > 0
        assert folder.stat().st_mode & 0o077 == 0


def test_jaxs_own_settings_are_left_alone(tmp_path):
    given = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
    environment = dict(given)
    assert keep_compiled(environment) is None
    assert environment == given
    environment = {"XDG_CACHE_HOME": str(tmp_path), "JAX_COMPILATION_CACHE_MAX_SIZE": "7"}
    keep_compiled(environment)
    assert environment["JAX_COMPILATION_CACHE_MAX_SIZE"] == "7"


@pytest.mark.parametrize("switch", ["", "off"])
def test_the_cache_can_be_turned_off(switch):
    environment = {"FLAX_RESBLOCK_CACHE": switch, "JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
    assert keep_compiled(environment) is None
    assert environment["JAX_ENABLE_COMPILATION_CACHE"] == "false"


def test_a_folder_that_cannot_be_used_is_said_once_and_done_without(tmp_path):
    (tmp_path / "file").touch()
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for folder in (tmp_path / "file" / "xla", open_to_all):
        environment = {"FLAX_RESBLOCK_CACHE": str(folder)}
        assert str(folder) in (keep_compiled(environment) or "")
        assert "JAX_COMPILATION_CACHE_DIR" not in environment
        assert keep_compiled(environment) is None  # a child process


def test_half_written_programs_are_removed_and_whole_or_new_ones_kept(tmp_path):
    tmp_path.chmod(0o700)
    for name, age in (
        ("whole-cache", 600),
        ("whole-atime", 600),
        ("half-cache", 600),
        ("coming-cache", 0),
    ):
        (tmp_path / name).write_bytes(b"x")
        written = time.time() - age
        os.utime(tmp_path / name, (written, written))
    keep_compiled({"FLAX_RESBLOCK_CACHE": str(tmp_path)})
    assert sorted(os.listdir(tmp_path)) == ["coming-cache", "whole-atime", "whole-cache"]


def test_only_a_program_that_runs_a_command_makes_the_folder(checkpoints, tmp_path):
    start = "from flax_resblock.cli import main; main()"
    for arguments, made in (
        (("--help",), False),
        (("inspect", str(checkpoints / "net.safetensors")), True),
    ):
        assert started(start, *arguments, HOME=str(tmp_path)).returncode == 0
        assert (tmp_path / ".cache" / "flax-resblock" / "xla").exists() == made


def test_importing_every_public_name_needs_no_torch_and_changes_no_setting_of_jax(tmp_path):
    code = (
        "import sys, flax_resblock as f\n[getattr(f, name) for name in f.__all__]\n"
        "import jax\nprint('torch' in sys.modules, jax.config.jax_compilation_cache_dir, "
        "jax.config.jax_enable_compilation_cache)"
    )
    result = started(code, HOME=str(tmp_path))
    assert result.stdout.split() == ["False", "None", "True"], result.stderr
    assert not any(tmp_path.iterdir())


COMPILING = """
import os
from flax_resblock.cli.cache import keep_compiled
assert keep_compiled(os.environ) is None
import jax
from flax import nnx
import flax_resblock
from jax._src import monitoring
hits = []
def listen(event, **_):
    if event.endswith("/cache_hits"):
        hits.append(event)
monitoring.register_event_listener(listen)
graphdef, state = nnx.split(flax_resblock.create("resnet20", rngs=nnx.Rngs(0)))
loss = lambda state, images: (nnx.merge(graphdef, state)(images) ** 2).sum()
images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
print(len(hits), float(jax.jit(loss)(state, images)).hex())
"""


@pytest.mark.slow
def test_the_second_start_compiles_nothing_large_and_computes_the_same_bits(tmp_path):
    first, second = (started(COMPILING, HOME=str(tmp_path)) for _ in range(2))
    off = started(COMPILING, HOME=str(tmp_path), FLAX_RESBLOCK_CACHE="off")
    (hits, bits), (more_hits, same_bits), (no_hits, again) = (
        result.stdout.split() for result in (first, second, off)
    )
    assert (int(hits), int(no_hits)) == (0, 0)
    assert int(more_hits) > 0
    assert bits == same_bits == again
    assert second.stderr == first.stderr


@pytest.mark.slow
def test_a_damaged_program_is_compiled_anew(tmp_path):
    first = started(COMPILING, HOME=str(tmp_path))
    for program in (tmp_path / ".cache" / "flax-resblock" / "xla").glob("*-cache"):
        program.write_bytes(program.read_bytes()[:100])
    second = started(COMPILING, HOME=str(tmp_path))
    assert second.returncode == 0
    assert second.stdout.split()[1] == first.stdout.split()[1]


@pytest.mark.slow
def test_programs_of_another_processor_have_other_keys():
    """jax's keys hold the topology's fingerprint, which for a CPU has its instruction sets."""
    code = (
        "import jax; from jax._src.lib import xla_client; "
        "print(xla_client.get_topology_for_devices(jax.devices()).fingerprint())"
    )
    here, again, older = (
        started(code, JAX_PLATFORMS="cpu", XLA_FLAGS=flags).stdout
        for flags in ("", "", "--xla_cpu_max_isa=SSE4_2")
    )
    assert here == again != older
