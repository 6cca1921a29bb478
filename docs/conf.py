"""Sphinx builds the documentation from this folder: `make docs`.

The Markdown files are read on GitHub too. Their links to files outside this folder become links to
the repository here, and the reference of the commands is written from the commands themselves."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tomllib
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))
PROJECT = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]

from docutils import nodes  # noqa: E402
from sphinx.util import inspect  # noqa: E402

from docs import reference_pages  # noqa: E402, the folder was just made importable
from flax_resblock._version import __version__  # noqa: E402


def _digest() -> str:
    """Of the code that the notebooks run, so that what they showed is kept until it changes."""
    found = hashlib.sha256()
    for package in ("flax_resblock", "torch_ref"):
        for path in sorted((DOCS.parent / package).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()[:16]


project = "flax-resblock"
copyright = "the authors of flax-resblock, Apache-2.0"
version = release = __version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build", "notebooks/*.ipynb", "**/.ipynb_checkpoints"]
suppress_warnings = ["config.cache"]
smartquotes = False  # it would turn the two hyphens of an option into a dash

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = os.environ.get("FLAX_RESBLOCK_NOTEBOOKS", "cache")  # "force" runs them again
nb_execution_cache_path = str(DOCS / "_build" / f"notebooks-{_digest()}")
nb_execution_timeout = 300
nb_execution_in_temp = True
nb_merge_streams = True
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Reference", "notes_style"), ("Formula", "notes_style")]

highlight_language = "text"
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True
html_theme = "furo"
html_title = "flax-resblock"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
    "top_of_page_buttons": ["view", "edit"],
}


def _outward(app, name: str, source: list[str]) -> None:
    """Makes links that lead out of this folder, or to source files in it, links to the repository.

    Sphinx would refuse the former, and offer the latter as downloads."""
    here = (DOCS / name).parent

    def replaced(found: re.Match[str]) -> str:
        target, anchor = found["target"], found["anchor"] or ""
        path = (here / target).resolve()
        outside = not path.is_relative_to(DOCS)
        if (not outside and path.suffix != ".py") or not path.exists():
            return found[0]
        kind = "tree" if path.is_dir() else "blob"
        return f"]({REPOSITORY}/{kind}/main/{path.relative_to(DOCS.parent).as_posix()}{anchor})"

    source[0] = re.sub(r"\]\((?P<target>[\w./-]+)(?P<anchor>#[\w-]+)?\)", replaced, source[0])


def _of_init(app, what: str, name: str, made, options, signature: str | None, returned):
    """The arguments of a module's own constructor; Flax's metaclass shows none of them."""
    if what == "class" and (signature or "").startswith("(*args"):
        own = inspect.signature(made.__init__, bound_method=True)
        signature = inspect.stringify_signature(own, unqualified_typehints=True)
    return signature, returned


def _dashes(app, tree) -> None:
    """Two hyphens between an argument and its text become a dash; those of an option stay."""
    for text in list(tree.findall(nodes.Text)):
        if text == " -- ":
            text.parent.replace(text, nodes.Text(" – "))  # noqa: RUF001


def setup(app) -> None:
    """Registers the hooks."""
    reference_pages.write(DOCS / "reference" / "commands")
    app.connect("source-read", _outward)
    app.connect("doctree-read", _dashes)
    app.connect("autodoc-process-signature", _of_init)
