"""The command ``flax-resblock``. The outermost layer: it may use everything, and nothing uses it.

Exit status: 0 fine, 1 a comparison failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flax_resblock.errors import InputError

INTERRUPTED = 130

DESCRIPTION = """Move residual networks between PyTorch and JAX/Flax, and prove that nothing changed on the way.

Start with "flax-resblock demo", then try "flax-resblock convert resnet50.pth resnet50.safetensors" and "flax-resblock verify resnet50.pth".

Every command takes --help; --traceback shows where an error came from."""


def commands() -> dict[str, Callable[..., int]]:
    """The subcommands by name; their modules import jax and torch only when they run."""
    from flax_resblock.cli.aot import aot
    from flax_resblock.cli.convert import convert
    from flax_resblock.cli.demo import demo
    from flax_resblock.cli.export import export
    from flax_resblock.cli.inspect import inspect
    from flax_resblock.cli.predict import predict
    from flax_resblock.cli.train import train
    from flax_resblock.cli.verify import verify

    return {command.__name__: command for command in (demo, inspect, convert, verify, train, predict, export, aot)}


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status; errors of the input go to stderr as one paragraph."""
    arguments = list(arguments)
    show_traceback = "--traceback" in arguments
    if show_traceback:
        arguments.remove("--traceback")
    if arguments in (["--version"], ["-V"]):
        from flax_resblock import __version__

        print(f"flax-resblock {__version__}")
        return 0
    try:
        return _dispatch(arguments)
    except InputError as error:
        if show_traceback:
            raise
        print(f"flax-resblock: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flax-resblock: interrupted; outputs that were not finished were removed.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(arguments: list[str]) -> int:
    import tyro

    config: tuple[Any, ...] = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff)
    return tyro.extras.subcommand_cli_from_dict(commands(), prog="flax-resblock", description=DESCRIPTION, args=arguments or ["--help"], config=config)


def main() -> None:
    """Entry point of the console script."""
    from flax_resblock.cli.common import on_interrupt

    signal.signal(signal.SIGINT, on_interrupt)
    report = sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type is KeyboardInterrupt else report(found)  # swallowed by a callback, and raised again later
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # everything is written; an interrupt while the interpreter goes down would only look like a failure
    if code == INTERRUPTED:  # compilers of jax may still be at work in other threads; waiting for them, or tearing them down, ends in a crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
