"""The pages as a site: `make docs` without a warning, its notebook run, and nothing of it fetched from elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]*src=.(?:https?:)?//|<link[^>]*href=.(?:https?:)?//|url\(.?(?:https?:)?//|@import"
)


def build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-c", str(ROOT / ".ci" / "docs")]
    return subprocess.run([*command, str(source), str(out)], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)  # the notebook distills
def test_the_site_is_built_without_warnings_and_fetches_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = build(ROOT, site)
    assert done.returncode == 0, done.stderr
    pages = {
        str(path.relative_to(site)): path.read_text(encoding="utf-8")
        for path in [*site.rglob("*.html"), *site.rglob("*.css")]
    }
    assert [name for name, page in pages.items() if FETCHED.search(page)] == []
    assert pages["index.html"] == pages["README.html"]
    assert 'href="jobs/COOKBOOK.html"' in pages["README.html"]
    for name in ("api.load_dataset", "config.SourceConfig", "core.losses.feature_loss_G"):
        assert f'id="wmdd_ray.{name}"' in pages["wmdd_ray/API.html"]
    assert "S3: address of the store" in pages["wmdd_ray/API.html"]  # and not a type "S3"
    tour = pages["jobs/TOUR.html"]
    assert tour.count("<img") == 3
    top1 = re.search(r"top-1 (\d+\.\d) % of 360 held-out real images", tour)
    assert top1 and float(top1[1]) > 80


@pytest.mark.slow
def test_a_link_to_nowhere_and_a_page_outside_the_contents_are_told(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# First\n\n[dead](none.md) and [dead](CHANGELOG.md#no)\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changes\n")
    (tmp_path / "OTHER.md").write_text("# Other\n")
    done = build(tmp_path, tmp_path / "build")
    assert done.returncode != 0
    for told in ("none.md", "'no'", "OTHER.md: WARNING: document isn't included in any toctree"):
        assert told in done.stderr


def test_what_comes_from_elsewhere_is_seen() -> None:
    for fetched in (
        '<script defer src="https://x.org/a.js">',
        '<link rel="stylesheet" href="//fonts.x.org/css">',
        "src: url('https://x.org/font.woff')",
        '@import "basic.css"',
    ):
        assert FETCHED.search(fetched)
    assert not FETCHED.search('<a href="https://x.org"> <link href="a.css"> url(file.png)')


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads((ROOT / "jobs" / "TOUR.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
