"""The command ``flax-resblock``.

Exit status: 0 fine, 1 a comparison failed, 2 bad input or usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from difflib import get_close_matches
from io import StringIO, TextIOWrapper
from shutil import get_terminal_size
from typing import Any

from flax_resblock._version import __version__
from flax_resblock.cli.cache import keep_compiled
from flax_resblock.cli.huge_pages import start_again_with_huge_pages
from flax_resblock.cli.interrupts import on_interrupt
from flax_resblock.cli.wording import in_flags
from flax_resblock.cli.wrapping import for_stream
from flax_resblock.errors import InputError, reason, visible

INTERRUPTED = 130
LINE_BREAK = "\n"
SHELLS = ("bash", "zsh", "fish")

DESCRIPTION = """\
Move networks between PyTorch and JAX/Flax, and prove that nothing changed.

You have
  a checkpoint:
      flax-resblock convert resnet50.pth resnet50.safetensors
  a network of your own:
      flax-resblock port net.py:Net weights.pth out
  two that should be the same:
      flax-resblock verify --torch net.py:Net --flax out/net.py:Net
  a training run to go on with:
      flax-resblock train --resume run.pth --data pictures --out runs/on
  a TPU or GPU, soon:
      flax-resblock aot resnet50 --target tpu:v5e:2x2 --what train-step

All of it on real data, in two minutes: flax-resblock demo
What is installed, and what is missing: flax-resblock doctor
Every command has --help, which begins with examples."""


COMMANDS: Mapping[str, str] = {
    "demo": (
        "Shows everything on real data in under two minutes: train in PyTorch, inspect, convert, "
        "verify, continue in both frameworks, convert back."
    ),
    "inspect": "Shows what a checkpoint is, the health of its batch norms, and anything unusual.",
    "convert": (
        "Converts a checkpoint from any format to any other, in either direction, bit for bit, "
        "and certifies that both frameworks agree."
    ),
    "verify": (
        "Runs the network in PyTorch and in Flax side by side, compares every slot, and says "
        "where a difference begins and why."
    ),
    "port": (
        "Writes any PyTorch network of convolutions as readable Flax source, with its weights and "
        "the proof that it computes the same."
    ),
    "train": "Trains a network in JAX, or continues a PyTorch or JAX run.",
    "predict": "Classifies images with a checkpoint of any format, or with an exported network.",
    "export": "Writes a network as a StableHLO program that runs with jax alone.",
    "aot": (
        "Compiles a network for TPUs or GPUs that need not be present, and reports precision, "
        "memory and communication."
    ),
    "bench": "Times JAX against PyTorch on this CPU or on a GPU.",
    "doctor": "Shows versions, devices and caches, and which packages are missing for what.",
}
"""Each command with a summary. It is the function of that name in the module of that name in this
package."""


def run(arguments: Sequence[str]) -> int:
    """Runs the command line and returns its exit status; bad input is reported in a paragraph."""
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
        return _refused(in_flags(visible(str(error), keep=LINE_BREAK)))
    except KeyboardInterrupt:
        words = "interrupted; outputs that were not finished were removed."
        print(f"flax-resblock: {words}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of the output has gone, as in `| head`
        _drop_output()
        return 0
    except (OSError, MemoryError) as error:  # a failing or full disk, too little memory
        if show_traceback:
            raise
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        what = "not enough memory"
        if isinstance(error, OSError):
            what = reason(error) + (f": {error.filename}" if error.filename else "")
        words = "Nothing was left half-written. Check the disk and the memory, then run it again."
        return _refused(f"{visible(what)}. {words}")


def _refused(words: str) -> int:
    print(for_stream(f"flax-resblock: {words}", sys.stderr), file=sys.stderr)
    return 2


def _drop_output() -> None:
    """Discards pending output, which the interpreter would otherwise try to write at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    """Runs one command. Only its own module is imported, and none for the overview."""
    if len(arguments) == 2 and arguments[0] == "--completion" and arguments[1] in SHELLS:
        return _complete(arguments[1])
    if not arguments or arguments[0] not in COMMANDS:
        return _overview(arguments or ["--help"])
    name, *rest = arguments
    import tyro

    from flax_resblock.cli import flags

    command = command_called(name)
    known = flags.help_of(name, command)
    if {"-h", "--help"} & set(rest):
        print(flags.text_of(known, min(get_terminal_size().columns, 100)))
        return 0
    flags.refuse_unknown(known, rest)
    return tyro.cli(command, prog=f"flax-resblock {name}", args=rest, config=tyro_settings())


def tyro_settings() -> tuple[Any, ...]:
    """How tyro makes flags of a signature."""
    from tyro.conf import DisallowNone, FlagCreatePairsOff, HelptextFromCommentsOff, OmitArgPrefixes

    return FlagCreatePairsOff, OmitArgPrefixes, HelptextFromCommentsOff, DisallowNone


def command_called(name: str) -> Callable[..., int]:
    """The function of a command; imports its module."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def _complete(shell: str) -> int:
    """Prints the script for a shell's tab completion, which tyro makes of all commands.

    Line breaks in the description of an option would be offered as words of their own.
    """
    import tyro

    commands = {name: command_called(name) for name in COMMANDS}
    arguments = ["--tyro-write-completion", shell, "-"]
    with suppress(SystemExit), redirect_stdout(StringIO()) as script:  # tyro ends the process
        tyro.extras.subcommand_cli_from_dict(
            commands, prog="flax-resblock", args=arguments, config=tyro_settings()
        )
    for line in script.getvalue().splitlines():
        print(line.replace(r"\n", " ") if line.startswith("COMPLETION_SPEC") else line)
    return 0


def _overview(arguments: list[str]) -> int:
    """Prints help or version, or rejects a command line that does not begin with a command."""
    parser = ArgumentParser(
        "flax-resblock",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this help message")
    parser.add_argument("-V", "--version", action="store_true", help="show the version")
    parser.add_argument(
        "--completion", choices=SHELLS, help="print the script for a shell's tab completion"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if not arguments[0].startswith("-"):
        meant = get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f"Did you mean {meant[0]}?" if meant else f"Commands: {', '.join(COMMANDS)}."
        parser.error(f"there is no command {arguments[0]!r}. {hint}")
    asked, _ = parser.parse_known_args(arguments)
    if not (asked.help or asked.version):
        parser.error(f"{arguments[0]!r} is no option here; the command comes first")
    print(parser.format_help() if asked.help else f"flax-resblock {__version__}\n", end="")
    return 0


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGINT, on_interrupt)
    # importing the frameworks makes a million objects, through which the collector would search
    # again and again while they are made, and once more at the end
    gc.set_threshold(20_000, 20, 100)
    for stream in (sys.stdout, sys.stderr):
        # names from files may have characters that the terminal's encoding lacks
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    report = sys.unraisablehook
    # an interrupt that a callback swallows is raised again later
    sys.unraisablehook = lambda it: None if it.exc_type is KeyboardInterrupt else report(it)
    arguments = sys.argv[1:]
    start_again_with_huge_pages(arguments)
    if COMMANDS.keys() & arguments and (warning := keep_compiled(os.environ)):
        print(f"flax-resblock: {visible(warning)}", file=sys.stderr)
    code = run(arguments)
    # everything is written; an interrupt while the interpreter ends would only look like a failure
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if code == INTERRUPTED:
        # compilers of jax may still run in other threads, and ending them in order can crash
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    gc.freeze()
    sys.exit(code)
