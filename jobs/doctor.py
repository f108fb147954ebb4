"""Check what a run needs before hours are spent on it: `python jobs/doctor.py`, with the options of jobs/distill.py.

A line a check: ok, warning or FAIL, what was found, and what to do. Nothing is changed but probe objects under --out, which
are deleted again. --no-cluster leaves Ray out; --verbose shows tracebacks; all other options are those of jobs/distill.py.
Exit codes: 0 no check failed; else that of the worst failure: 2 options, versions, cluster; 4 input; 5 storage.
"""

from __future__ import annotations

import contextlib
import logging
import runpy
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

if __spec__ is None:  # a file, which goes on as the module that its imports are relative to
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    runpy.run_module("jobs.doctor", run_name="__main__", alter_sys=True)

from importlib.metadata import requires

from packaging.requirements import Requirement

from wmdd_ray.errors import ArtifactError, DataError, WmddError
from wmdd_ray.redaction import plain
from wmdd_ray.spine.provenance import installed
from wmdd_ray.store.uris import local_path

from . import command_line
from .checks.cluster import check_cluster, check_nodes
from .checks.images import check_data, check_teacher
from .checks.plan import check_plan
from .checks.report import Finding, Mark, Visit, many
from .checks.storage import (
    check_commits,
    check_credentials,
    check_endpoint,
    check_speed,
    check_storage,
)
from .distill import Job, open_run, parse_all

# There in a checkout.
_PROJECT, _PINS = (
    Path(__file__).resolve().parents[1] / name
    for name in ("pyproject.toml", "requirements-run.txt")
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """A check; `exit_code` is what its failure returns, `needs` are the checks without which it makes no sense."""

    name: str
    look: Callable[[Visit], Iterator[Finding]]
    exit_code: int
    needs: tuple[str, ...] = ()


def main(arguments: list[str]) -> int:
    """Print the report and return the exit code."""
    signal.signal(signal.SIGTERM, _terminate)
    with_cluster = "--no-cluster" not in arguments
    arguments = [word for word in arguments if word != "--no-cluster"]
    if command_line.asks_for_help(arguments):
        print(__doc__)
    try:
        job, failure = _parsed(arguments, ask_cluster=with_cluster)
        run = open_run(job)
    except WmddError as error:
        show("options", Finding("FAIL", str(error)))
        return error.exit_code
    level = logging.INFO if job.verbose else logging.CRITICAL
    logging.basicConfig(level=level, format="%(name)s: %(message)s")
    config = job.config
    recipe = config.recipe if failure is None else "auto, not chosen"
    show(
        "options",
        Finding(
            "ok",
            f"recipe {recipe}, ipc {config.ipc}, --data {config.data}, --out {run.store.uri}",
        ),
    )
    for line in job.told:
        show("auto", Finding("ok", line))
    root = local_path(run.store.uri)
    created = [p for p in (root, *root.parents) if not p.exists()] if root else []
    visit = Visit(job, run)
    marks: Counter[Mark] = Counter()
    worst = 0
    if isinstance(failure, DataError):
        # What would be said of the images is that of a recipe which nobody has asked for.
        show("auto", Finding("FAIL", str(failure)))
        marks["FAIL"] += 1
        worst = failure.exit_code
        visit.failed.add("data")
    try:
        for check in checks(job, cluster=with_cluster):
            if check.name in visit.failed:
                continue
            for finding in examine(check, visit):
                show(check.name, finding)
                marks[finding.mark] += 1
                worst = max(worst, finding.exit_code)
    finally:
        _tidy(visit, created)
    failed = f"{many(marks['FAIL'], 'check')} failed" if worst else "ready to run"
    print(f"\n{failed}, {many(marks['warning'], 'warning')}")
    return worst


def _parsed(arguments: list[str], *, ask_cluster: bool) -> tuple[Job, Exception | None]:
    """Return the job, the last of several; where images cannot be measured, or the cluster not joined, that of a recipe.

    Beside it the reason, which checks tell too where it is none of the images' own.
    """
    try:
        return parse_all(arguments, ask_cluster=ask_cluster)[-1], None
    except Exception as error:
        is_told = isinstance(error, DataError | ArtifactError | ConnectionError)
        if not is_told and not type(error).__module__.startswith("ray."):
            raise
        logger.info("auto", exc_info=error)
        return parse_all([*arguments, "--recipe", "cifar10"])[-1], error


def checks(job: Job, *, cluster: bool) -> tuple[Check, ...]:
    """Return the checks in their order."""

    def reached(*uris: str | None) -> tuple[str, ...]:
        """What must answer before these URIs are asked for: a server that is down costs a minute a question."""
        far = ("s3://", "gs://", "gcs://")
        return ("endpoint",) if any(uri and uri.startswith(far) for uri in uris) else ()

    config = job.config
    here = (
        Check("versions", check_versions, 2),
        Check("credentials", check_credentials, 5),
        Check("endpoint", check_endpoint, 5),
        Check("storage", check_storage, 5, needs=reached(job.out)),
        Check("commits", check_commits, 5, needs=("storage",)),
        Check("speed", check_speed, 5, needs=("storage",)),
        Check("data", check_data, 4, needs=reached(config.data, config.val_data)),
        Check("teacher", check_teacher, 4, needs=("data", *reached(config.teacher))),
        Check("plan", check_plan, 5, needs=("storage", "data")),
    )
    there = (Check("cluster", check_cluster, 2), Check("nodes", check_nodes, 2))
    return here + there if cluster else here


def examine(check: Check, visit: Visit) -> Iterator[Finding]:
    """Yield what a check finds. Whatever it raises is a finding too, and hides no other check."""
    missing = [name for name in check.needs if name in visit.failed]
    if missing:
        visit.failed.add(check.name)
        yield Finding("skipped", f"needs {' and '.join(missing)}")
        return
    try:
        for finding in check.look(visit):
            if finding.mark == "FAIL":
                visit.failed.add(check.name)
                finding = replace(finding, exit_code=finding.exit_code or check.exit_code)
            yield finding
    except Exception as error:
        logger.info("%s", check.name, exc_info=error)
        visit.failed.add(check.name)
        if isinstance(error, WmddError):
            yield Finding("FAIL", str(error), exit_code=error.exit_code)
        else:
            text = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            advice = "--verbose shows where"
            yield Finding("FAIL", text.splitlines()[0], advice, exit_code=check.exit_code)


def show(name: str, finding: Finding) -> None:
    """Print a finding, and below it what to do."""
    print(plain(f"{finding.mark:<8} {name:<12} {finding.found}"), flush=True)
    if finding.advice:
        print(plain(f"{'':<8} {'':<12} -> {finding.advice}"), flush=True)


def check_versions(visit: Visit) -> Iterator[Finding]:
    """Hold what is installed against the package's lower bounds and, in a checkout, the pins of requirements-run.txt."""
    bounds = _bounds()
    below = [
        f"{bound.name} {installed(bound.name)} (needs {bound.specifier})"
        for bound in bounds
        if not bound.specifier.contains(installed(bound.name) or "0", prereleases=True)
    ]
    if below:
        advice = "-r requirements-run.txt" if _PINS.is_file() else "--upgrade 'wmdd_ray[distill]'"
        yield Finding("FAIL", ", ".join(below), f"pip install {advice}")
    pins = [
        Requirement(line.partition(" #")[0])
        for line in (_PINS.read_text(encoding="utf-8") if _PINS.is_file() else "").splitlines()
        if line and not line.startswith("#")
    ]
    names = {bound.name for bound in bounds}
    moved = [
        f"{pin.name} {installed(pin.name)} (pinned {str(pin.specifier).removeprefix('==')})"
        for pin in pins
        if pin.name in names
        and not pin.specifier.contains(installed(pin.name) or "0", prereleases=True)
    ]
    python = sys.version.partition(" ")[0]
    if moved:
        yield Finding(
            "warning",
            f"Python {python}; {', '.join(moved)}",
            "results were made with requirements-run.txt; other versions may change bytes",
        )
    elif not below:
        shown = ", ".join(
            f"{name} {installed(name)}" for name in ("ray", "torch", "pyarrow", "pillow")
        )
        rest = ", and the rest as in requirements-run.txt" if pins else ""
        yield Finding("ok", f"Python {python}, {shown}{rest}")


def _bounds() -> list[Requirement]:
    """Return the lower bounds of what a run needs: of this checkout, else of the installed package."""
    if not _PROJECT.is_file():
        bounds = map(Requirement, requires("wmdd_ray") or ())
        return [b for b in bounds if b.marker is None or b.marker.evaluate({"extra": "distill"})]
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["distill"]]
    return [Requirement(text) for text in needed]


def _tidy(visit: Visit, created: list[Path]) -> None:
    """Leave nothing behind: no probe object, no folder that was made for one."""
    if "storage" not in visit.failed:
        with contextlib.suppress(WmddError):  # told above
            visit.probe.delete("")
    for folder in created:
        if not folder.is_dir() or any(folder.iterdir()):
            break
        folder.rmdir()


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    command_line.run(main)
