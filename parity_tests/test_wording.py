"""In Python messages name arguments, and on the command line the same messages name flags."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest
import torch
from flax import nnx

import flax_resblock
from flax_resblock import AssumptionWarning, InputError
from flax_resblock.cli import run
from flax_resblock.cli.wording import SPELLED_DIFFERENTLY, as_flag, in_flags
from parity_tests.support import REPOSITORY
from parity_tests.test_help import HELPS

FLAGS = {one for known in HELPS.values() for flag in known.flags for one in (flag.name,)}
OTHER_PROGRAMS = (
    "pip ",
    "hf ",
    "# hf ",
    "docker ",
    "--xla_gpu",
    "--line-length",
    "--quiet",
    "--isolated",
)
"""What a text says of another program, or passes to one."""


@functools.cache
def texts(source: str) -> list[str]:
    """The strings of a module that are no docstrings, with ``{}`` for what is filled in."""
    nodes, found = list(ast.walk(ast.parse(source))), []
    passed = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    passed |= {id(one) for node in nodes if isinstance(node, ast.JoinedStr) for one in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else "{}" for one in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and id(node) not in passed:
            found.append(str(node.value))
    return found


def flags_outside_commands(text: str) -> list[str]:
    """The flags in a text that are no part of a command line to type."""
    text = re.sub(r"`flax-resblock [^`]*`", "", text)
    found = re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
    return [] if any(one in text for one in OTHER_PROGRAMS) else found


def library() -> dict[Path, str]:
    """The modules below the command line; the tables of the documentation are for both readers."""
    package = REPOSITORY / "flax_resblock"
    paths = [path for path in package.rglob("*.py") if "cli" not in path.relative_to(package).parts]
    kept = [path for path in paths if path.name != "plan.py"]
    return {path: path.read_text(encoding="utf-8") for path in kept}


def test_no_message_below_the_command_line_names_a_flag():
    for path, source in library().items():
        for text in texts(source):
            assert not flags_outside_commands(text), f"{path}: {text}"
    assert flags_outside_commands("Pass --force. `flax-resblock port --exact`") == ["--force"]
    assert texts('raise E(f"a {b} " "--c")') == ["a {} --c"]


def test_every_argument_that_a_message_names_has_a_flag():
    """Or its command line is in Python alone, as that of an architecture."""
    seen, spelled = set(), set()
    for path, source in library().items():
        for text in texts(source):
            for code in re.findall(r"`([^`\n{}]+)`", text):
                spelled |= {code} & SPELLED_DIFFERENTLY.keys()
                flag = as_flag(code)
                if flag is not None:
                    seen.add(flag.split()[0])
                    assert flag.split()[0] in FLAGS, f"{path}: {code}"
    assert len(seen) > 15
    assert spelled == SPELLED_DIFFERENTLY.keys()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("say `stride=1` or `stride=2`.", "say --stride 1 or --stride 2."),
        ("pass `force=True` (`entry=...`)", "pass --force (--entry)"),
        ("`image_size=(HEIGHT, WIDTH)`, `naming=NAME`", "--image-size HEIGHT WIDTH, --naming NAME"),
        ("`assumptions={'dilated_stages': (3, 4)}`", "--dilated-stages 3 4"),
        ("`activation='gelu'|'silu'` if not", "--activation gelu|silu if not"),
        ("`standardized=True` if so", "--standardized True if so"),
        ("`kwargs={'width': 64}`", "--kwargs '{\"width\": 64}'"),
        ("`Limits(max_bytes=9)`, `save(naming='flax')`", "--max-bytes 9, --to-naming flax"),
        ("epochs=0 must be positive.", "--epochs 0 must be positive."),
        ("`flax-resblock port --exact`, `x > 1`, a=", "`flax-resblock port --exact`, `x > 1`, a="),
    ],
)  # fmt: skip
def test_an_argument_becomes_what_is_typed(text, shown):
    assert in_flags(text) == shown


def test_the_same_messages_reach_both_readers(folder, capsys):
    model = flax_resblock.create("resnet20", activation="silu", rngs=nnx.Rngs(0))
    state = flax_resblock.to_torch(model)
    flax_resblock.save(model, "net.safetensors")
    with pytest.raises(InputError, match=r"pass `force=True` to replace it"):
        flax_resblock.save(model, "net.safetensors")
    with pytest.warns(AssumptionWarning) as caught:
        flax_resblock.from_torch(state)
    assert not flags_outside_commands(str(caught[0].message))
    assert "`activation='leaky_relu'|'gelu'|'silu'` if not" in str(caught[0].message)
    torch.save({name: torch.from_numpy(value) for name, value in state.items()}, "net.pth")
    assert run(["convert", "net.pth", "net.safetensors"]) == 2
    assert "or pass --force to replace it" in capsys.readouterr().err
    assert run(["convert", "net.pth", "new.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "--activation leaky_relu|gelu|silu if not" in printed
    certificate = Path("new.safetensors.parity.json").read_text()
    assert "`activation" not in printed + certificate


RIDDLES = (
    r"\bno tensor tells\b",
    r"\btook entry\b",
    r"\bstarts? afresh\b",
    r"\bwas taken for\b",
    r"\bis no image\b",
    r"\[Errno",
)


def test_messages_hold_no_riddle_and_no_number_of_an_operating_system():
    """Where a handler may hold an OSError, its message has ``reason(error)``, never ``{error}``."""
    for file in sorted((REPOSITORY / "flax_resblock").rglob("*.py")):
        source = file.read_text(encoding="utf-8")
        for text in texts(source):
            assert not [one for one in RIDDLES if re.search(one, text)], (file, text)
        for handler in ast.walk(ast.parse(source if "OSError" in source else "")):
            if not isinstance(handler, ast.ExceptHandler) or handler.type is None:
                continue
            if "OSError" in ast.dump(handler.type):
                plain = [
                    node.lineno for node in ast.walk(handler) if says_error(node, handler.name)
                ]
                assert not plain, (file, plain)


def says_error(node, name):
    """Whether a node shows an error as Python does: ``f"{error}"`` or ``str(error)``."""
    values = [node.value] if isinstance(node, ast.FormattedValue) else []
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "str":
        values = node.args
    return any(isinstance(value, ast.Name) and value.id == name for value in values)
