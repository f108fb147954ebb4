"""The pages of this repository as a site: `make docs`. They lie where GitHub shows them; here is what a browser needs besides."""

import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # of the notebook

project = "wmdd_ray"
root_doc = "README"
include_patterns = ["*.md", "cluster/**.md", "jobs/**.md", "jobs/*.ipynb", "wmdd_ray/**.md"]
exclude_patterns = [".*", "build", "data", "out", "runs", "tests"]  # not even looked into
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 500
nb_output_stderr = "remove"  # progress
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
html_theme = "alabaster"
html_theme_options = {"page_width": "1200px", "body_max_width": "none", "show_powered_by": False}
html_copy_source = False
html_static_path = ["custom.css"]  # which the theme asks for

CONTENTS = {
    "Guide": ["jobs/COOKBOOK", "jobs/TOUR", "cluster/README"],
    "Reference": ["wmdd_ray/API"],
    "Results": [
        f"jobs/benches/{page}" for page in ("results/README", "results/teachers", "README")
    ],
    "Design": [f"wmdd_ray/{page}README" for page in ("", "diffusion/", "robustness/")],
    "Project": ["CONTRIBUTING", "CHANGELOG"],
}
CORE = sorted(f"core.{path.stem}" for path in (ROOT / "wmdd_ray" / "core").glob("[!_]*.py"))


def add_contents(app: Sphinx, docname: str, source: list[str]) -> None:
    """Write the contents below the first page, and the docstrings below theirs."""
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", ""]
            source[0] += "\n".join(lines)
    if docname == "wmdd_ray/API":
        for name in ("api", "dataset", "config", *CORE):
            rule = f".. automodule:: wmdd_ray.{name}\n   :members:"
            source[0] += f"\n## wmdd_ray.{name}\n\n```{{eval-rst}}\n{rule}\n```\n"


def as_written(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Keep docstrings as they are written: they know backticks, Google's sections and indented formulas, and no other markup."""
    # Of a lone field napoleon takes what stands before a colon for its type, in the first line only: here an empty comment.
    text = ["..", ""] if what in ("attribute", "property") else []
    in_section = in_formula = False
    for line in lines:
        indented = line.startswith("    ")
        if line and not indented:
            in_section = re.fullmatch(r"\w+:", line) is not None
        if indented and not in_section and not in_formula:
            text += ["", "::", ""]
            in_formula = True
        elif in_formula and line and not indented:
            text.append("")
            in_formula = False
        text.append(line if in_formula else plain(line))
    lines[:] = text


def plain(line: str) -> str:
    """Return a line of text in reStructuredText: `code` as literal, all other marks escaped."""
    parts = re.split(r"`([^`]+)`", line)
    for i, part in enumerate(parts):
        if i % 2 == 0:
            parts[i] = re.sub(r"([*|\\]|_\b)", r"\\\1", part)
        else:
            parts[i] = f"``{part}``" + ("\\ " if parts[i + 1][:1].strip() else "")
    return "".join(parts)


def add_index(app: Sphinx, error: Exception | None) -> None:
    """Let the first page be the one that a server shows for the folder."""
    if error is None and app.builder.name == "html":
        shutil.copy(app.outdir / "README.html", app.outdir / "index.html")


def setup(app: Sphinx) -> None:
    """Register what is written here."""
    app.connect("source-read", add_contents)
    app.connect("autodoc-process-docstring", as_written, priority=400)  # before napoleon
    app.connect("build-finished", add_index)
