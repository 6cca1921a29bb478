"""The flags of a command, read from its signature: for its help, for what to suggest where one is
mistyped, and for the reference in the documentation.

tyro parses the command line. What is shown here is the same flags, in the order in which people
need them, with the defaults that count."""

from __future__ import annotations

import ast
import difflib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from flax_resblock.errors import InputError

COMMON: Mapping[str, tuple[str, ...]] = {
    "convert": ("--force", "--torch", "--kwargs", "--to-naming", "--with-optimizer"),
    "verify": ("--gradients", "--steps", "--html", "--torch", "--kwargs", "--flax", "--device"),
    "train": (
        "--data", "--out", "--preset", "--architecture", "--init", "--resume", "--model",
        "--num-classes", "--epochs", "--batch-size", "--learning-rate", "--image-size",
    ),
    "aot": ("--target", "--what", "--batch", "--image-size", "--precision"),
}  # fmt: skip
"""The options that most people need, shown first. The other commands' own options are those."""

SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "--force": ("--overwrite", "--replace", "--exist-ok", "--yes"),
    "--out": ("--output", "--output-dir", "--save-dir", "--workdir", "--log-dir"),
    "--learning-rate": ("--lr", "--base-lr"),
    "--batch-size": ("--bs", "--batch", "--per-device-batch-size"),
    "--batch": ("--bs", "--batch-size"),
    "--weight-decay": ("--wd",),
    "--num-classes": ("--classes", "--n-classes", "--nb-classes"),
    "--architecture": ("--arch", "--network"),
    "--init": ("--pretrained", "--weights", "--checkpoint", "--finetune"),
    "--data": ("--dataset", "--data-dir", "--data-path", "--train-dir"),
    "--image-size": ("--img-size", "--input-size", "--resolution", "--size"),
    "--epochs": ("--num-epochs",),
    "--optimizer": ("--opt", "--optim"),
    "--torch": ("--module", "--pytorch", "--model"),
    "--model": ("--network", "--torch"),
    "--naming": ("--layout", "--names"),
    "--to-naming": ("--to-layout",),
    "--device": ("--platform", "--backend"),
    "--html": ("--report",),
    "--json": ("--json-file",),
    "--json-file": ("--json",),
    "--precision": ("--dtype",),
    "--class-names": ("--labels", "--classes"),
    "--with-optimizer": ("--optimizer-state", "--full"),
}
"""What other programs call an option. Only those that a command has are suggested."""


@dataclass(frozen=True)
class Flag:
    """An option or a positional argument: its name (``--num-classes``, ``CKPT``), what follows it
    (``INT``, ``{on,off}``; empty for a switch), its default (empty if that is nothing, or said in
    the text), and the heading of its group (empty for the command's own)."""

    name: str
    value: str
    default: str
    text: str
    group: str
    aliases: tuple[str, ...] = ()
    required: bool = False

    @property
    def positional(self) -> bool:
        """Whether it is given by its place."""
        return not self.name.startswith("--")

    @property
    def usage(self) -> str:
        """The option with its value."""
        return f"{self.name} {self.value}".strip()

    @property
    def description(self) -> str:
        """The text with the default."""
        return self.text + (f" (default: {self.default})" if self.default else "")


@dataclass(frozen=True)
class Help:
    """What a command says of itself: examples, paragraphs, and its flags in order."""

    name: str
    examples: tuple[str, ...]
    text: tuple[str, ...]
    flags: tuple[Flag, ...]

    @property
    def groups(self) -> Iterator[tuple[str, list[Flag]]]:
        """Headings with their flags: positional arguments, the most common options, the others."""
        common = COMMON.get(self.name, ())
        options = [flag for flag in self.flags if not flag.positional]
        first = [flag for name in common for flag in options if flag.name == name]
        rest = [flag for flag in options if flag not in first]
        yield "arguments", [flag for flag in self.flags if flag.positional]
        yield "most used options" if first else "options", first or _of(rest, "")
        if first:
            yield "other options", _of(rest, "")
        for heading in dict.fromkeys(flag.group for flag in rest if flag.group):
            yield heading, _of(rest, heading)


def _of(flags: list[Flag], group: str) -> list[Flag]:
    return [flag for flag in flags if flag.group == group]


def help_of(name: str, command: Callable[..., Any]) -> Help:
    """Reads the signature and the docstring of a command."""
    documentation = inspect.getdoc(command) or ""
    paragraphs = re.split(r"\n\s*\n", documentation.partition("\nArgs:")[0])
    texts = [" ".join(paragraph.split()) for paragraph in paragraphs]
    examples = [text for text in texts if text.startswith(f"flax-resblock {name}")]
    others = [text for text in texts if text.startswith("flax-resblock ") and text not in examples]
    rest = [text for text in texts if text not in (*examples, *others, "For example:")]
    own = list(_parameters(command, _section(documentation, "Args")))
    own.sort(key=lambda flag: flag.group != "")
    return Help(name, (*examples, *others), tuple(rest), tuple(own))


def _parameters(command: Callable[..., Any], texts: Mapping[str, str]) -> Iterator[Flag]:
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        default = MISSING if parameter.default is parameter.empty else parameter.default
        yield from _flags(name, hints[name], default, None, texts, "")


def _members(kind: type, group: str) -> Iterator[Flag]:
    """The flags of a dataclass."""
    documentation = inspect.getdoc(kind) or ""
    texts = _section(documentation, "Attributes") or _attribute_texts(kind)
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        default = field.default if field.default is not MISSING else field.default_factory
        shown = field.metadata.get("default")
        yield from _flags(field.name, hints[field.name], default, shown, texts, group)


def _flags(
    name: str, hint: Any, default: Any, shown: Any, texts: Mapping[str, str], group: str
) -> Iterator[Flag]:
    metadata: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *given = get_args(hint)
        metadata = tuple(given)
    if is_dataclass(hint) and isinstance(hint, type):
        yield from _members(hint, texts.get(name) or " ".join((hint.__doc__ or "").split()))
        return
    details = [one for one in metadata if hasattr(one, "metavar")]
    metavar = next((one.metavar for one in details if one.metavar), None)
    text = next((one.help for one in details if one.help), texts.get(name, ""))
    aliases = next((tuple(one.aliases) for one in details if one.aliases), ())
    positional = any(one is tyro.conf.Positional for one in metadata)
    switch = hint is bool and not positional
    if positional and default is not MISSING:
        metavar = f"[{metavar}]"
    yield Flag(
        metavar or name.upper() if positional else f"--{name.strip('_').replace('_', '-')}",
        "" if positional or switch else metavar or _value(hint),
        _shown(default if shown is None else shown),
        " ".join(text.replace("``", "").split()),
        group,
        aliases,
        default is MISSING,
    )


def _value(hint: Any) -> str:
    """``INT``, ``{3x3,1x1}``, ``TEXT ...``."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return "|".join(_value(one) for one in inside if one is not type(None))
    if origin is Literal:
        return "{" + ",".join(map(str, inside)) + "}"
    if origin is tuple:
        repeated = inside[-1] is Ellipsis
        return f"{_value(inside[0])} ..." if repeated else " ".join(map(_value, inside))
    if hint is bool:
        return "{True,False}"
    return {Path: "PATH", str: "TEXT", int: "INT", float: "NUMBER"}.get(hint, "VALUE")


def _shown(value: Any) -> str:
    if value is MISSING or value is None or value is False or value == () or callable(value):
        return ""
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return str(value)


def _section(documentation: str, name: str) -> dict[str, str]:
    """The entries of a section of a docstring, such as ``Args``."""
    found = re.search(rf"^{name}:\n((?:[ ]+\S.*\n?|\n)+)", documentation, re.MULTILINE)
    if found is None:
        return {}
    entries = re.split(r"^ {2}(?=\w+: )", found[1], flags=re.MULTILINE)[1:]
    return {key: " ".join(text.split()) for key, _, text in (e.partition(": ") for e in entries)}


def _attribute_texts(kind: type) -> dict[str, str]:
    """The strings below the attributes of a class and of those that it is derived from."""
    body: list[ast.stmt] = []
    for one in reversed([one for one in kind.__mro__ if is_dataclass(one)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        body += getattr(definition, "body", [])
    return {
        before.target.id: str(after.value.value)
        for before, after in pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
    }


def refuse_unknown(known: Help, arguments: list[str]) -> None:
    """Raises InputError for an option that a command does not have, with the one that is meant."""
    names = {name: flag for flag in known.flags for name in (flag.name, *flag.aliases)}
    for argument in arguments:
        name = argument.partition("=")[0].replace("_", "-")
        if not re.match(r"--[a-zA-Z]", name) or name in {*names, "--help"}:
            continue
        meant = [one for one, others in SYNONYMS.items() if name in others and one in names]
        meant = meant or difflib.get_close_matches(name, names, n=2, cutoff=0.6)
        hints = " or ".join(f"{one} ({names[one].text.rstrip('.')})" for one in meant)
        raise InputError(
            f"{known.name} has no option {argument.partition('=')[0]}."
            + (f" Did you mean {hints}?" if hints else "")
            + f" All options: flax-resblock {known.name} --help"
        )


def text_of(known: Help, width: int) -> str:
    """The help as text, with lines of at most ``width`` columns."""
    positional = " ".join(flag.name for flag in known.flags if flag.positional)
    required = [flag.usage for flag in known.flags if flag.required and not flag.positional]
    usage = " ".join(filter(None, [positional, *required, "[OPTIONS]"]))
    lines = ["For example:", *(f"  {example}" for example in known.examples), ""]
    lines += [f"Usage: flax-resblock {known.name} {usage}", ""]
    for paragraph in known.text:
        lines += [*_wrapped(paragraph, width), ""]
    for heading, flags in known.groups:
        if not flags:
            continue
        title = heading[:1].upper() + heading[1:]
        lines += _wrapped(title if title.endswith(".") else f"{title}:", width)
        for flag in flags:
            lines += _entry(flag, width)
        lines.append("")
    lines.append("  --help shows this text, and --traceback where an error came from.")
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines that break at spaces alone, so that a name or a command can be copied."""
    return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)


def _entry(flag: Flag, width: int) -> list[str]:
    usage = flag.usage if flag.positional else ", ".join((flag.usage, *flag.aliases))
    description = _wrapped(flag.description, max(width - 28, 30)) or [""]
    lines = [f"  {usage:<25} {description.pop(0)}"] if len(usage) <= 25 else [f"  {usage}"]
    return [*lines, *(f"{'':28}{line}" for line in description)]
