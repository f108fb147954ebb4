"""The tree of wmdd_ray/README.md, out of the first sentence of every module: `python -m tests.tree` writes it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "wmdd_ray" / "README.md"
BEGIN, END = "<!-- tree -->\n", "<!-- /tree -->\n"


def tree(folder: Path, depth: int = 0) -> list[str]:
    """Return a line for every folder and Python file below `folder`, files first; empty `__init__.py` are left out."""
    indent = "  " * depth
    about = _about(folder / "__init__.py")
    lines = [f"{indent}{folder.name + '/':{26 - len(indent)}} {about}".rstrip()]
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            lines.append(f"{indent}  {path.name:{24 - len(indent)}} {_about(path)}")
    for inner in sorted(path for path in folder.iterdir() if any(path.rglob("*.py"))):
        lines += tree(inner, depth + 1)
    return lines


def _about(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def with_tree(page: str) -> str:
    """Return the page with the tree of today between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = "\n".join(["```", *tree(ROOT / "wmdd_ray"), "```"])
    return f"{before}{BEGIN}{lines}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_tree(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
