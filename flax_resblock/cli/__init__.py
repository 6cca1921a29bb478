"""The command ``flax-resblock``. The outermost layer: it may use everything, and nothing uses it.

Exit status: 0 fine, 1 a comparison failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import Any

from flax_resblock.errors import InputError, visible

INTERRUPTED = 130
LINE_BREAK = "\n"

DESCRIPTION = """Move residual networks between PyTorch and JAX/Flax, and prove that nothing changed on the way.

Start with "flax-resblock demo", then try "flax-resblock convert resnet50.pth resnet50.safetensors" and "flax-resblock verify resnet50.pth".

Every command takes --help; --traceback shows where an error came from."""


def commands() -> dict[str, Callable[..., int]]:
    """The subcommands by name; their modules import jax and torch only when they run."""
    from flax_resblock.cli.aot import aot
    from flax_resblock.cli.bench import bench
    from flax_resblock.cli.convert import convert
    from flax_resblock.cli.demo import demo
    from flax_resblock.cli.export import export
    from flax_resblock.cli.inspect import inspect
    from flax_resblock.cli.predict import predict
    from flax_resblock.cli.train import train
    from flax_resblock.cli.verify import verify

    return {command.__name__: command for command in (demo, inspect, convert, verify, train, predict, export, aot, bench)}


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status; errors of the input go to stderr as one paragraph."""
    arguments = list(arguments)
    show_traceback = "--traceback" in arguments
    if show_traceback:
        arguments.remove("--traceback")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        if show_traceback:
            raise
        print(f"flax-resblock: {visible(str(error), keep=LINE_BREAK)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flax-resblock: interrupted; outputs that were not finished were removed.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        _drop_output()
        return 0
    except (OSError, MemoryError) as error:  # a disk that fails while it is read, a full one that takes our output, a machine without the memory
        if show_traceback:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        what = (error.strerror or str(error)) + (f": {error.filename}" if error.filename else "") if isinstance(error, OSError) else "not enough memory"
        print(f"flax-resblock: {visible(what)}. Nothing was left half-written. Check the disk and the memory, then run it again.", file=sys.stderr)
        return 2


def _drop_output() -> None:
    """What standard output could not take goes nowhere, instead of being tried again while the interpreter goes down."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):
        from flax_resblock import __version__

        print(f"flax-resblock {__version__}")
        return 0
    import tyro

    config: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    return tyro.extras.subcommand_cli_from_dict(commands(), prog="flax-resblock", description=DESCRIPTION, args=arguments or ["--help"], config=config)


def main() -> None:
    """Entry point of the console script."""
    from flax_resblock.cli.common import on_interrupt

    signal.signal(signal.SIGINT, on_interrupt)
    for stream in (sys.stdout, sys.stderr):  # names from files may have characters that the terminal's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    report = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type is KeyboardInterrupt else report(found)  # swallowed by a callback, and raised again later
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is written; an interrupt while the interpreter goes down would only look like a failure
    if code == INTERRUPTED:  # compilers of jax may still be at work in other threads; waiting for them, or tearing them down, ends in a crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
