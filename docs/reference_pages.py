"""Writes the reference of the commands as Markdown, one page each, from their own flags."""

from __future__ import annotations

from pathlib import Path

from flax_resblock.cli import COMMANDS, command_called
from flax_resblock.cli.flags import Help, help_of


def write(folder: Path) -> None:
    """Writes the pages into a folder; files that would not change are left as they are."""
    folder.mkdir(exist_ok=True)
    for name in COMMANDS:
        text = page(help_of(name, command_called(name)))
        file = folder / f"{name}.md"
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


def page(known: Help) -> str:
    """One command."""
    lines = [f"# {known.name}", "", "```bash", *known.examples, "```", ""]
    for paragraph in known.text:
        lines += [_code(paragraph), ""]
    for heading, flags in known.groups:
        if not flags:
            continue
        title, _, rest = heading.partition(". ")
        title = title.rstrip(".")
        lines += [f"## {title[:1].upper()}{title[1:]}", ""]
        lines += [rest, ""] if rest else []
        for flag in flags:
            default = f" *Default:* `{flag.default}`." if flag.default else ""
            names = ", ".join(f"`{name}`" for name in (flag.usage, *flag.aliases))
            lines += [names, f": {_code(flag.text)}{default}", ""]
    return "\n".join(lines)


def _code(text: str) -> str:
    """Options in a text as code, and characters that Markdown would take as markup as they are."""
    words = []
    inside = False
    for word in text.split(" "):
        plain = not inside and "`" not in word
        inside ^= word.count("`") % 2 == 1
        if plain and word.startswith("--"):
            bare = word.rstrip(".,;:")
            word = f"`{bare}`{word[len(bare) :]}"
        elif plain:
            word = word.replace("*", "\\*").replace("_", "\\_").replace("<", "\\<")
        words.append(word)
    return " ".join(words)
