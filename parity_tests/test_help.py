"""The command line teaches: its help, what it suggests, tab completion and ``doctor``."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess

import pytest
import tyro

from flax_resblock.cli import COMMANDS, command_called, doctor, run, tyro_settings
from flax_resblock.cli.flags import COMMON, SYNONYMS, help_of, refuse_unknown, text_of
from flax_resblock.errors import InputError

HELPS = {name: help_of(name, command_called(name)) for name in COMMANDS}


def parse(line: str) -> None:
    """Parses a command line as the command does, without running it; raises if it does not fit."""
    program, name, *arguments = shlex.split(line, comments=True)
    assert program == "flax-resblock"
    refuse_unknown(HELPS[name], arguments)
    command = command_called(name)
    stub = functools.wraps(command)(lambda *_, **__: 0)
    try:
        tyro.cli(stub, prog=name, args=arguments, config=tyro_settings(), console_outputs=False)
    except SystemExit as stop:
        raise AssertionError(f"does not parse: {line}") from stop


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_shows_exactly_the_flags_that_the_parser_takes(name, capsys, monkeypatch):
    """In tyro's own help each option begins a line, perhaps with its aliases."""
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):  # tyro's own
        tyro.cli(command_called(name), args=["--help"], config=tyro_settings())
    lines = re.findall(r"^[│ ] {0,2}(--[a-z].*?)(?:  |$)", capsys.readouterr().out, re.MULTILINE)
    parsed = {flag for line in lines for flag in re.findall(r"(?:^|, )(--[\w-]+)", line)}
    shown = {one for flag in HELPS[name].flags for one in (flag.name, *flag.aliases)}
    options = {one for one in shown if one.startswith("--")}
    assert options == parsed
    assert {one for group in HELPS[name].groups for one in group[1]} == set(HELPS[name].flags)
    assert set(COMMON.get(name, ())) <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_begins_with_examples_that_parse_and_explains_every_flag(name):
    known, width = HELPS[name], 90
    text = text_of(known, width)
    assert text.startswith(f"For example:\n  flax-resblock {name}")
    for example in known.examples:
        parse(example)
    for nonsense in ("None", "MISSING", "VALUE"):
        assert nonsense not in {word for flag in known.flags for word in flag.usage.split()}
    assert not re.search(r"\(default: (None|False|)\)", text)
    assert all(flag.text for flag in known.flags), [f.name for f in known.flags if not f.text]
    tables = text.partition("Usage:")[2].splitlines()[2:]
    assert max(map(len, tables)) <= width + 12  # a long name is not broken


def test_the_defaults_of_train_are_those_that_it_trains_with(capsys):
    assert run(["train", "--print-config"]) == 0
    used = json.loads(capsys.readouterr().out)
    used |= used.pop("augmentation")
    del used["model"], used["optimizer"]  # --architecture; --optimizer is a flag of every run
    shown = {flag.name[2:].replace("-", "_"): flag.default for flag in HELPS["train"].flags}
    compared = {name for name in used.keys() & shown.keys() if used[name] not in (None, [])}
    assert len(compared) > 15
    for name in compared:
        value = used[name]
        words = {True: "on", False: "off"}.get(value) if isinstance(value, bool) else None
        text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
        assert shown[name] == (words or text), name


@pytest.mark.parametrize(
    ("line", "meant"),
    [
        ("convert a.pth b --overwrite", "--force (Replace output files"),
        ("train --lr 0.1", "--learning-rate ("),
        ("train --batchsize 3", "--batch-size ("),
        ("verify a.pth --gradient", "--gradients ("),
        ("verify a.pth --json_fil x", "--json-file ("),
    ],
)
def test_a_mistyped_flag_is_refused_before_anything_runs_and_the_right_one_suggested(
    line, meant, folder, capsys
):
    assert run(line.split()) == 2
    error = capsys.readouterr().err
    assert f"Did you mean {meant}" in error
    assert error.count("\n") == 1
    assert not list(folder.iterdir())


def test_every_synonym_leads_to_a_flag_and_is_none_itself_where_it_is_suggested():
    names = {command: {flag.name for flag in known.flags} for command, known in HELPS.items()}
    for flag, others in SYNONYMS.items():
        having = [options for options in names.values() if flag in options]
        assert having, flag
        assert any(other not in options for options in having for other in others)
    with pytest.raises(InputError, match=r"has no option --zzz\. All options"):
        refuse_unknown(HELPS["convert"], ["a", "b", "--zzz=3"])
    refuse_unknown(HELPS["convert"], ["a", "b", "--to_naming", "flax", "-3"])


def test_a_mistyped_command_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        run(["convrt", "a", "b"])
    assert stop.value.code == 2
    assert "Did you mean convert?" in capsys.readouterr().err


def test_the_completion_script_completes_commands_and_flags(tmp_path, capsys):
    script = tmp_path / "completion.bash"
    assert run(["--completion", "bash"]) == 0
    script.write_text(capsys.readouterr().out)
    ask = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; '
        "COMP_POINT=${#COMP_LINE}; _tyro_flax_resblock; printf '%s\\n' \"${COMPREPLY[@]}\""
    )

    def completed(*words: str) -> set[str]:
        command = ["bash", "-c", ask, "bash", str(script), "flax-resblock", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert completed("conv") == {"convert"}
    assert completed("convert", "--to-n") == {"--to-naming"}
    assert not completed("convert", "--gradien")


def test_doctor_names_what_is_missing_for_which_command(monkeypatch, capsys):
    find = doctor.find_spec
    gone = {"torch", "libtpu"}
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name in gone else find(name))
    monkeypatch.setattr("flax_resblock.aot.compiler.COMPILERS", doctor.Path("absent"))
    assert run(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["commands"]["port"] == "needs torch: pip install 'flax-resblock[torch]'"
    assert facts["commands"]["aot --target tpu"].startswith("needs libtpu")
    assert facts["commands"]["train"] == "ready"
    assert facts["packages"]["numpy"] != "not installed"
    assert run(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "needs torch: pip install 'flax-resblock[torch]'" in text
    assert "\\n" not in text
