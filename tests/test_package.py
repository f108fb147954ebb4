"""The package as it is installed: what is in the wheel, and that its base requirements train from a distilled set without Ray.

The new environment holds the wheel, by pip, and links to those distributions of this environment that its base requirements name,
and they in turn: what a resolver would fetch, without five gigabytes of downloads. It proves that the base is sufficient at these
versions, and that nothing else is imported; not that an index has them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import wmdd_ray
from tests.conftest import ROOT
from tests.test_dataset import EPOCHS, NAMES, N, write_dataset
from wmdd_ray import api
from wmdd_ray.errors import ConfigError

pytestmark = pytest.mark.slow

TRAIN = f"""
import importlib.util, sys
assert not any(map(importlib.util.find_spec, ("ray", "tyro", "sklearn", "s3fs"))), "not a base environment"
import wmdd_ray
assert "torch" not in sys.modules and wmdd_ray.__file__.startswith(sys.prefix)
import torch
from torch.utils.data import DataLoader
from wmdd_ray.core.student_losses import soft_label_loss
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import ConfigError
from wmdd_ray.store.sources.arrays import open_digits
dataset = wmdd_ray.load_dataset(sys.argv[1])
student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(dataset[0][0].numel(), {len(NAMES)}))
optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
losses = []
for epoch in range(4 * dataset.epochs):
    for views, logits, _ in DataLoader(dataset, batch_sampler=dataset.batches(25)):
        loss = soft_label_loss(student(views), logits, temperature=4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
assert sum(losses[-{EPOCHS}:]) < sum(losses[:{EPOCHS}]), losses
print(len(losses), dataset.num_images)
for command in (wmdd_ray.distill, lambda: open_digits(SourceConfig(image_size=8, resize=8), "val", None).num_images):
    try:
        command()
    except ConfigError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build leaves folders in its source."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("wmdd_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    pip(sys.executable, "wheel", "-w", str(folder / "out"), "--no-build-isolation", str(folder))
    (built,) = (folder / "out").glob("wmdd_ray-*.whl")
    return built


def pip(python: str | Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--python", str(python), *arguments]
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a new environment with the wheel and its base requirements."""
    folder = tmp_path_factory.mktemp("base") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip(folder / "bin" / "python", "install", str(wheel))
    (site,) = folder.glob("lib/python*/site-packages")
    (metadata,) = site.glob("wmdd_ray-*.dist-info/METADATA")
    names = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(encoding="utf-8"), re.M)
    for entry in sorted(top_level_entries(names)):
        (site / entry.name).symlink_to(entry)
    return folder / "bin"


def top_level_entries(requirements: list[str]) -> set[Path]:
    """Return the files and folders that make up the requirements without extras, and theirs, in this environment."""
    entries: set[Path] = set()
    names: set[str] = set()
    while requirements:
        requirement = Requirement(requirements.pop())
        marker = requirement.marker
        if requirement.name in names or (marker and not marker.evaluate({"extra": ""})):
            continue
        names.add(requirement.name)
        installed = distribution(requirement.name)
        requirements += installed.requires or []
        tops = {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}
        entries |= {Path(str(installed.locate_file(top))) for top in tops}
    assert "ray" not in names and "torch" in names
    return entries


def test_the_wheel_holds_package_jobs_and_pages_under_one_name(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "wmdd_ray").rglob("*.py")}
    expected |= {
        f"wmdd_ray/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "jobs").rglob("*.py")
    }
    assert expected <= names
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"wmdd_ray/py.typed", "wmdd_ray/product/pages/page.css"} <= names
    assert {name.partition("/")[0] for name in names} == {"wmdd_ray"}


def test_the_base_installation_trains_from_a_distilled_set_without_ray(
    environment: Path, tmp_path: Path
) -> None:
    uri = write_dataset(str(tmp_path / "set"))
    command = [str(environment / "python"), "-I", "-c", TRAIN, uri]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trained, command, digits = done.stdout.splitlines()
    assert trained == f"{4 * EPOCHS} {N}"
    assert command == "No module named 'tyro'; for the commands: pip install 'wmdd_ray[distill]'"
    assert digits.startswith("the digits come with scikit-learn, which is not installed: pip")


def test_the_console_command_of_the_base_names_its_commands_and_what_they_need(
    environment: Path, tmp_path: Path
) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def typed(*words: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "wmdd-ray"), *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)

    shown = typed("--help")
    assert (
        shown.returncode == 0
        and "distill         Distill a labelled image data set\n" in shown.stdout
    )
    assert typed("--version").stdout == f"{wmdd_ray.__version__}\n"
    refused = typed("distil")
    assert refused.returncode == 2 and "expected a command, got 'distil'" in refused.stderr
    lacking = typed("distill", "--ipc", "1")
    assert lacking.returncode == 2
    assert lacking.stderr.startswith("error: No module named 'tyro'; for the commands: pip install")


def test_the_commands_of_the_wheel_run_without_a_checkout(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from wmdd_ray.__main__ import main; main()"

    def typed(*words: str) -> str:
        command = [sys.executable, "-I", "-c", code, str(tmp_path / "site"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert typed("distill", "--dry-run").startswith(f"plan for {tmp_path}/runs/digits-ipc10\n")
    assert "ok       versions     Python 3." in typed("doctor", "--no-cluster")
    shown = " ".join(typed("distill", "--help").split())
    assert "Distill a labelled image data set: `wmdd-ray distill --ipc 10`." in shown


def test_options_of_functions_are_those_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "evaluate.mixed_precision": False,
        "evaluate.baselines": ("random_real",),
        "data": None,
    }
    assert api._words({"dry_run": True, "ipc": 3, **options}) == [
        *("--dry-run", "--ipc", "3", "--evaluate.no-mixed-precision"),
        *("--evaluate.baselines", "random_real"),
    ]
    run = wmdd_ray.distill(ipc=3, dry_run=True, out=str(tmp_path / "run"), **options)
    assert run == wmdd_ray.Run(str(tmp_path / "run"))
    assert capsys.readouterr().out.startswith(f"plan for {tmp_path}/run\n")
    with pytest.raises(ConfigError, match="--ip"):
        wmdd_ray.distill(ip=3)
    with pytest.raises(ConfigError, match="expected options of the command, got --ipc many"):
        wmdd_ray.distill(ipc="many")


def test_importing_the_package_imports_no_library() -> None:
    code = "import sys; before = {*sys.modules}; import wmdd_ray; print(*({*sys.modules} - before))"
    command = [sys.executable, "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    tops = {name.partition(".")[0] for name in shown.split()}
    assert tops - sys.stdlib_module_names == {"wmdd_ray"}
    assert {"distill", "load_dataset"} <= {*wmdd_ray.__all__}
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        wmdd_ray.distil  # noqa: B018
