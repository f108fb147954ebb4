"""What made a result: package versions, source revision, hardware."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parents[1]
_PACKAGES = ("ray", "torch", "torchvision", "POT", "numpy", "pyarrow")


@cache
def versions() -> dict[str, Any]:
    """Return the versions of Python and the main packages, and the revision of this code as far as it is known."""
    found = {name: installed(name) for name in _PACKAGES}
    by_package = {name: number for name, number in found.items() if number is not None}
    by_package = {"python": platform.python_version(), **by_package}
    return {"versions": by_package, "git_revision": _revision()}


def installed(package: str) -> str | None:
    """Return the version of a package here, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """Return the git revision of this checkout, with `+changes` when files differ; of an installed package its version.

    An image holds a file REVISION instead of the history (cluster/Dockerfile). None where there is neither.
    """
    root = _PACKAGE.parent
    written = root / "REVISION"
    if written.is_file():
        return written.read_text().strip() or None
    project = root / "pyproject.toml"
    if not project.is_file() or 'name = "wmdd_ray"' not in project.read_text(encoding="utf-8"):
        return installed("wmdd_ray")
    if not (root / ".git").exists():  # a copy, perhaps inside somebody else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def as_typed(text: str) -> str:
    """Return a text with its `python jobs/NAME.py` as they are typed here: of an installed package `wmdd-ray NAME`."""
    is_installed = (_PACKAGE / "jobs").is_dir()
    return (
        re.sub(r"(?<![\w./-])(?:python )?jobs/(\w+)\.py", r"wmdd-ray \1", text)
        if is_installed
        else text
    )


@cache
def hardware() -> str:
    """Return processor, cores and GPUs in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    text = f"{name}, {os.cpu_count()} cores"
    try:
        import torch

        if torch.cuda.is_available():
            text += f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    except ImportError:
        pass
    return text
