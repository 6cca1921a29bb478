"""``flax-resblock doctor``."""

from __future__ import annotations

import json as json_text
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import tyro

from flax_resblock._version import __version__
from flax_resblock.cli.common import output, print_title, say

PACKAGES = (
    "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors", "tyro",
    "torch", "torchvision", "timm", "transformers", "grain", "scikit-learn", "matplotlib", "jinja2",
)  # fmt: skip
"""Distributions whose versions matter in a report of an error."""

NEEDS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("convert to .pth", ("torch",), "torch"),
    ("verify", ("torch",), "torch"),
    ("verify --html", ("jinja2", "matplotlib"), "report"),
    ("port", ("torch",), "torch"),
    ("train", ("grain", "tensorboardX", "matplotlib"), "train"),
    ("train --data digits", ("sklearn",), "train"),
    ("demo", ("torch", "grain", "sklearn", "matplotlib"), "torch,train"),
    ("bench", ("torch", "sklearn"), "torch,train"),
    ("aot --target tpu", ("libtpu",), "tpu-aot"),
    ("aot --target cuda", ("jax_cuda12_plugin", "jax_cuda12_pjrt"), "cuda-aot"),
)
"""What a command needs beside the core: the modules, and the extra that installs them. The others
need the core alone."""


def doctor(
    json: Annotated[bool, tyro.conf.arg(help="Print everything as JSON, for scripts.")] = False,
) -> int:
    """Shows what is installed here and what is missing: versions, devices, caches, and the package
    that each command still needs.

    For example:

      flax-resblock doctor

    Put the output into a report of an error. It holds no names of files but those of the caches.
    """
    facts = examined()
    if json:
        print(json_text.dumps(facts, indent=1))
        return 0
    print_title("flax-resblock", f"{facts['version']}, Python {facts['python']}, {facts['system']}")
    say(f"  in {facts['interpreter']}")
    for heading in ("packages", "devices", "caches", "commands"):
        output.print()
        output.print(f"[bold]{heading}[/]")
        for name, value in facts[heading].items():
            say(f"  {name:<20} {value}", "yellow" if str(value).startswith("needs") else "")
    return 0


def examined() -> dict[str, Any]:
    """What ``doctor`` shows."""
    commands = {name: _missing(modules, extra) or "ready" for name, modules, extra in NEEDS}
    return {
        "version": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "interpreter": sys.prefix,
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {"jax": _jax_devices(), "torch": _torch_devices(), "cores": os.cpu_count()},
        "caches": _caches(),
        "commands": {"all others": "ready", **commands},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _missing(modules: tuple[str, ...], extra: str) -> str:
    from flax_resblock.aot.compiler import COMPILERS

    kept = {entry.split("-")[0] for entry in os.listdir(COMPILERS)} if COMPILERS.is_dir() else ()
    missing = [name for name in modules if name not in kept and find_spec(name) is None]
    needed = f"needs {' and '.join(missing)}: pip install 'flax-resblock[{extra}]'"
    return needed if missing else ""


def _jax_devices() -> str:
    try:
        import jax

        found = jax.devices()
        return f"{len(found)} {found[0].device_kind} ({found[0].platform})"
    except (ImportError, RuntimeError) as error:  # a driver or a plugin that does not start
        return f"none: {' '.join(str(error).split())}"


def _torch_devices() -> str:
    if find_spec("torch") is None:
        return "torch is not installed; the commands that need it are named below"
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} {torch.cuda.get_device_name()} (cuda)"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _caches() -> dict[str, str]:
    programs = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    off = os.environ.get("JAX_ENABLE_COMPILATION_CACHE") == "false"
    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    return {
        "compiled programs": "off" if off or programs is None else _size(Path(programs)),
        "hub": _size(hub),
    }


def _size(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    size = sum(path.stat().st_size for path in files)
    return f"{folder}, {size / 1e6:.0f} MB" if folder.is_dir() else f"{folder}, not there yet"
