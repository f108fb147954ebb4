"""The revision of a result is that of this code, never of a repository that it happens to lie in."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from wmdd_ray.spine import provenance


def git(folder: Path, *arguments: str) -> str:
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    command = ["git", "-C", str(folder), *name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit, and in it a folder `wmdd_ray` that stands for the package."""
    (tmp_path / "wmdd_ray").mkdir()
    (tmp_path / "wmdd_ray" / "x.py").touch()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "wmdd_ray"\n')
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_a_checkout_tells_its_revision_and_whether_it_was_changed(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provenance, "_PACKAGE", repository / "wmdd_ray")
    revision = git(repository, "rev-parse", "HEAD")[:12]
    assert provenance._revision() == revision
    (repository / "wmdd_ray" / "x.py").write_text("x = 1\n")
    assert provenance._revision() == f"{revision}+changes"


@pytest.mark.parametrize("version", ["0.1.0", None])
def test_a_package_installed_inside_another_repository_tells_its_own_version(
    version: str | None, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = repository / ".venv" / "lib" / "site-packages" / "wmdd_ray"
    installed.mkdir(parents=True)
    monkeypatch.setattr(provenance, "_PACKAGE", installed)

    def version_of(name: str) -> str:
        if version is None:
            raise provenance.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(provenance, "version", version_of)
    assert provenance._revision() == version


def test_a_package_copied_into_a_repository_does_not_take_its_revision(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    monkeypatch.setattr(provenance, "_PACKAGE", repository / "wmdd_ray")
    monkeypatch.setattr(provenance, "version", lambda name: "0.1.0")
    assert provenance._revision() == "0.1.0"


def test_a_copy_of_the_checkout_without_its_history_tells_nothing(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = repository / "vendor"
    (copy / "wmdd_ray").mkdir(parents=True)
    (copy / "pyproject.toml").write_text((repository / "pyproject.toml").read_text())
    monkeypatch.setattr(provenance, "_PACKAGE", copy / "wmdd_ray")
    assert provenance._revision() is None


def test_an_image_without_history_tells_what_it_was_built_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "REVISION").write_text("abc123\n")
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "wmdd_ray")
    assert provenance._revision() == "abc123"
