"""The pages for readers: short where they have to be, links that lead somewhere, a tree that is the house's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tree import PAGE, ROOT, tree, with_tree

PAGES = sorted(
    path
    for name in ("", "cluster/**/", "jobs/**/", "wmdd_ray/**/")
    for path in ROOT.glob(f"{name}*.md")
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```.*?^```", re.M | re.S)


def anchors(page: str) -> set[str]:
    """Return the names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    dead = []
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (heading and heading not in anchors(target.read_text("utf-8"))):
            dead.append(link)
    return dead


def test_the_readme_has_at_most_250_lines() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert dead_links(page) == []


def test_links_to_no_file_and_to_no_heading_are_dead(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# What `b` is, and isn't\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md) [2](b.md#what-b-is-and-isnt) [3](https://x.org/none)\n"
        "[4](c.md) [5](b.md#no-heading) [6](#none)\n```\n[7](d.md)\n```\n"
    )
    assert dead_links(page) == ["c.md", "b.md#no-heading", "#none"]


def test_the_tree_of_the_package_is_what_lies_there() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tree(page), "write it again: python -m tests.tree"


def test_the_tree_names_folders_and_modules_with_their_first_sentence(tmp_path: Path) -> None:
    (tmp_path / "room" / "inner").mkdir(parents=True)
    (tmp_path / "room" / "__init__.py").write_text('"""A room."""\n')
    (tmp_path / "room" / "inner" / "__init__.py").touch()
    (tmp_path / "room" / "inner" / "deep.py").write_text('"""What\nit does.\n\nMore.\n"""\n')
    (tmp_path / "room" / "data").mkdir()
    lines = [line.split(maxsplit=1) for line in tree(tmp_path / "room")]
    assert lines == [["room/", "A room."], ["inner/"], ["deep.py", "What it does."]]


def test_the_rooms_of_the_package_are_all_explained() -> None:
    folders = [
        path.parent.relative_to(ROOT / "wmdd_ray")
        for path in (ROOT / "wmdd_ray").glob("*/__init__.py")
    ]
    for page in (PAGE, ROOT / "README.md"):
        text = page.read_text(encoding="utf-8").replace("<!-- tree -->", "\0").partition("\0")[0]
        assert [str(folder) for folder in folders if f"{folder}/" not in text] == []
