"""Runs the compilers in a child process with the environment that they need; the parent's jax is
not affected."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from importlib.metadata import distributions, requires, version
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO

from flax_resblock.aot.outcome import Outcome
from flax_resblock.aot.request import Request
from flax_resblock.errors import InputError, MissingDependencyError

Progress = Callable[[int, float], None]
"""Called about every second with the number of finished compilations and the seconds since the
start."""

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # what is examined is what was compiled just now
}
"""libtpu then assumes a TPU host and asks no metadata server; jax computes on the CPU. The parent's
devices and compiler flags are not passed on."""

COMPILERS = Path(sys.prefix) / "compilers"
"""Where the compilers may be installed apart from other packages, so that jax does not look for
devices with them in every program."""

EXTRAS = {"tpu": "tpu-aot", "cuda": "cuda-aot"}

_done: dict[Request, Outcome] = {}


def _installed(package: str) -> str | None:
    found = next(iter(distributions(name=package, path=[str(COMPILERS), *sys.path])), None)
    return None if found is None else found.version


def _libtpu_of_jax() -> str:
    """The libtpu that this jax was built for, such as ``"0.0.42.*"``; ``"*"`` if jax names none."""
    pins = [line.split(";")[0].strip() for line in requires("jax") or []]
    return next((pin.removeprefix("libtpu==") for pin in pins if pin.startswith("libtpu==")), "*")


def require_compiler(platform: str) -> None:
    """Checks that the compiler for a platform is installed, in the version that belongs to the
    installed jax.

    Raises:
      MissingDependencyError: It is not installed; the message says what to install.
      InputError: It belongs to another jax.
    """
    jax = version("jax")
    wanted = {"jax-cuda12-plugin": jax, "jax-cuda12-pjrt": jax}
    if platform == "tpu":
        wanted = {"libtpu": _libtpu_of_jax()}
    specs = " ".join(f"'{name}=={pin}'" for name, pin in wanted.items())
    install = f"pip install --no-deps --target {COMPILERS} {specs}"
    found = {name: _installed(name) for name in wanted}
    missing = [name for name, there in found.items() if there is None]
    if missing:
        raise MissingDependencyError(
            f"compiling for {platform} needs {' and '.join(missing)}, which is not installed: "
            f"{install} (or, beside everything else, pip install "
            f"'flax-resblock[{EXTRAS[platform]}]'). No device and no driver are needed."
        )
    for name, there in found.items():
        if not fnmatchcase(str(there), wanted[name]):
            raise InputError(
                f"{name} {there} does not belong to jax {jax}, which needs {wanted[name]}; "
                f"together they may compile something else. {install}"
            )


def compile_ahead(requests: Sequence[Request], progress: Progress | None = None) -> list[Outcome]:
    """Compiles programs without a device, one after the other. A request that this process has
    compiled before is not compiled again.

    Args:
      requests: All are checked before the first is compiled.
    Returns:
      One outcome per request, also for a program that needs more memory than there is.
    Raises:
      InputError: A request that cannot be compiled, a compiler that is missing or of another
        version.
    """
    for request in requests:
        request.check()
    for platform in dict.fromkeys(request.parsed_target.platform for request in requests):
        require_compiler(platform)
    new = [request for request in dict.fromkeys(requests) if request not in _done]
    if new:
        _run_child(new, progress or (lambda done, seconds: None))
    return [_done[request] for request in requests]


def _run_child(requests: Sequence[Request], progress: Progress) -> None:
    environment = {**os.environ, **ENVIRONMENT}
    for flags in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        environment.pop(flags, None)
    folders = [str(Path(__file__).parents[2]), str(COMPILERS), os.environ.get("PYTHONPATH")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    ours, theirs = Pipe()
    with tempfile.TemporaryFile() as log, ours:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "flax_resblock.aot.child", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        try:
            begun = time.monotonic()
            with suppress(BrokenPipeError):  # it has ended; what it said follows
                ours.send(requests)
            for done, request in enumerate(requests):
                progress(done, time.monotonic() - begun)
                while not ours.poll(1):
                    progress(done, time.monotonic() - begun)
                _done[request] = _outcome(request, ours, child, log)
        finally:
            child.kill()  # also after an interrupt, which a compilation does not react to
            child.wait()


def _outcome(
    request: Request, answers: Connection, child: subprocess.Popen[bytes], log: IO[bytes]
) -> Outcome:
    title = f"{request.what} of batch {request.batch} for {request.target}"
    try:
        answer = answers.recv()
    except (EOFError, ConnectionResetError):
        log.seek(0)
        last = log.read().decode(errors="replace").strip().splitlines()[-1:]
        raise InputError(
            f"the compiler ended with status {child.wait()} while it compiled the {title}. Its "
            f"last line was: {''.join(last)[:400] or 'none'}"
        ) from None
    if isinstance(answer, InputError):
        raise answer
    if isinstance(answer, str):
        words = " ".join(answer.split())[:600]
        raise InputError(f"the compiler refused the {title}: {words}")
    return answer
