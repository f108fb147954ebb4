"""How a job ends: every end that is no fault of the program has one line and an exit code; a request to terminate is heard.

Exit codes: 0 done, 1 workers lost, 2 configuration, 3 lost a race for --out, 4 input, 5 storage, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from wmdd_ray.config import Resources
from wmdd_ray.errors import ConfigError, WmddError
from wmdd_ray.redaction import PlainFormatter, plain
from wmdd_ray.spine.provenance import as_typed
from wmdd_ray.spine.run import Run
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.uris import local_path
from wmdd_ray.telling.progress import AboveTheBar

_GRACE_S = 10.0
_RESUME = "finished units are kept: run the same command again to go on"


class Terminated(BaseException):
    """A request to terminate came. Not an Exception: nothing on its way up shall take it for a failure of its own."""


def exit_code_of(
    arguments: list[str],
    parse: Callable[[list[str]], Any],
    work: Callable[[Any], int],
    *,
    reworded: Callable[[str], str] = str,
) -> int:
    """Parse and do a job, and return its exit code or, after a line on standard error, that of its end.

    With `--verbose` log lines are shown, and the traceback of an error is logged. `reworded` puts the line into the job's words.
    """
    _heed_requests_to_terminate()
    try:
        job = parse(arguments)
        _log_above_the_bar(verbose="--verbose" in arguments)
        return work(job)
    except BaseException as error:
        if isinstance(error, Exception) and "--verbose" in arguments:
            logging.exception("the job ends here")
        ending = _ending_of(error)
        if ending is None:
            raise
        code, text = ending
        print(f"\n{as_typed(reworded(text))}", file=sys.stderr)
        return code


def _log_above_the_bar(*, verbose: bool) -> None:
    """Write log lines where the bar of a stage may stand; with `verbose` all of them."""
    shown = AboveTheBar()
    shown.setFormatter(PlainFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[shown])


def _is_submitted() -> bool:
    """Return whether this job was submitted to Ray, which throws its working folder away after it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def default_out(name: str) -> str:
    """Return where a job writes when --out is absent."""
    if (
        "WMDD_RAY_RUNS" in os.environ
    ):  # set by the files in cluster/, where no node's disk is the others'
        return f"{os.environ['WMDD_RAY_RUNS'].rstrip('/')}/{name}"
    return str(Path.home() / "wmdd_ray_runs" / name if _is_submitted() else Path("runs") / name)


def refuse_lost_folder(out: str | None) -> None:
    """Refuse a relative path as --out of a submitted job."""
    if out and _is_submitted() and "://" not in out and not Path(out).is_absolute():
        raise ConfigError(
            f"--out {out}: expected a URI such as s3://bucket/prefix, or an absolute path that lasts: this job was submitted, and "
            "its working folder is thrown away when it ends"
        )


def refuse_foreign_folder(out: Store) -> None:
    """Refuse a folder of this machine with files of somebody's own and no run: rooms would lie among them. A log may be there."""
    from wmdd_ray.spine.taken import KEY, RUNS_KEY
    from wmdd_ray.stages.pipeline import PIPELINE

    folder = local_path(out.uri)
    if (
        folder is None
        or not folder.is_dir()
        or any((folder / key).exists() for key in ("run.json", RUNS_KEY, KEY))
    ):
        return
    ours = {"events", "report.html", *(stage.room for stage in PIPELINE)}
    names = {path.name for path in folder.iterdir() if path.suffix != ".log"} - ours
    # What a first run leaves that is killed before it writes its `run.json`.
    left = re.compile(r"probe-[0-9a-f]{32}|\..+\.[0-9a-f]{32}\.part")
    foreign = sorted(name for name in names if not left.fullmatch(name))
    if foreign:
        raise ConfigError(
            f"--out {out.uri}: expected an empty folder or an earlier run, found other files, such as {foreign[0]}; give "
            "another --out"
        )


def refuse_data_among_rooms(out: Store, places: Mapping[str, str | None]) -> None:
    """Refuse an output whose rooms would be where real images lie: `--overwrite` empties a room. `places` are URIs by option."""
    from wmdd_ray.executors.dispatch import NOTES_FOLDER
    from wmdd_ray.stages.pipeline import PIPELINE

    rooms = ("events", NOTES_FOLDER, *(stage.room for stage in PIPELINE))
    for option, uri in places.items():
        path = local_path(uri) if uri else None
        place = f"{(uri or '').rstrip('/') if path is None else path}/"
        if place == f"{out.uri}/" or place.startswith(
            tuple(f"{out.uri}/{room}/" for room in rooms)
        ):
            raise ConfigError(
                f"--out {out.uri}: expected a place of its own, but the run would write where {option} {uri} lies; give another "
                "--out"
            )


def join_cluster(out: str | None, resources: Resources, *, verbose: bool) -> None:
    """Join or start the cluster for a run under `out`, if any, and go on hearing requests to terminate."""
    if resources.executor == "here":
        return
    from wmdd_ray.executors.cluster import connect

    try:
        connect(out, verbose=verbose)
    except SystemExit as ended:  # by the handler that Ray has put in, and only while it joins
        raise Terminated from ended
    # ray.init() puts a handler of its own in the place of ours, and that one exits with 15.
    _heed_requests_to_terminate()


@contextlib.contextmanager
def ended(run: Run) -> Iterator[None]:
    """End a run with the exit code of what is done inside."""
    code = 1
    try:
        yield
        code = 0
    except BaseException as error:
        code, _ = _ending_of(error) or (1, "")
        raise
    finally:
        run.end(code)


def _ending_of(error: BaseException) -> tuple[int, str] | None:
    """Return (exit code, what to tell) of an end that is no fault of this program's, else None."""
    inner: BaseException | None = error
    seen: set[int] = set()
    while inner is not None and id(inner) not in seen:
        seen.add(id(inner))
        # A signal that comes while Ray's own code runs arrives as a SystemError that was caused by it.
        if isinstance(inner, KeyboardInterrupt):
            return 128 + signal.SIGINT, f"interrupted; {_RESUME}"
        if isinstance(inner, Terminated):
            return 128 + signal.SIGTERM, f"terminated; {_RESUME}"
        inner = inner.__cause__ or inner.__context__
    if isinstance(error, WmddError):
        return error.exit_code, f"error: {error}"
    if type(error).__module__.startswith("ray."):
        lines = str(error).strip().splitlines() or [""]
        text = plain(f"{type(error).__name__}: {lines[-1].strip()}")
        return WmddError.exit_code, f"error: the cluster failed: {text}; {_RESUME}"
    return None


def _heed_requests_to_terminate() -> None:
    signal.signal(signal.SIGTERM, _terminate)


def _terminate(signum: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the way out takes its time
    threading.Thread(target=_leave, daemon=True).start()
    raise Terminated


def _leave() -> None:
    """End the process when it has not ended by itself: an exception can get lost in a callback of Ray's, or Ray hang."""
    time.sleep(_GRACE_S)
    print(f"\nterminated; {_RESUME}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)
