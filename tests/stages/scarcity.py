"""Small disks, little memory, and what processes hold: the means of `test_resources.py`. Workers import it, so it is light."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from wmdd_ray.spine.checkpoints import Checkpoints
from wmdd_ray.spine.rooms import Room

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_HUNGER_BYTES = 256 << 20


class Unavailable(Exception):
    """This machine, or its user, has not the means of a test."""


class SmallDisk:
    """A disk in memory with as much room as a test leaves on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ballast = folder / "ballast"

    def leave(self, free_bytes: int) -> None:
        """Fill the disk up to `free_bytes`."""
        self.make_space()
        disk = os.statvfs(self.folder)
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, disk.f_bavail * disk.f_frsize - free_bytes)

    def make_space(self) -> None:
        """Empty the disk of what only fills it."""
        self._ballast.unlink(missing_ok=True)


@contextmanager
def small_disk(folder: Path, size_mb: int) -> Iterator[SmallDisk]:
    """Yield a disk of its own, mounted at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        raise Unavailable(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield SmallDisk(folder)
    finally:
        # Lazy: Ray's workers may have opened something there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def run_with_shared_memory(
    command: list[str], *, size_mb: int, fill_when: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command with a /dev/shm of its own, which is filled up as soon as a file exists."""
    script = f"""
        mount -t tmpfs -o size={size_mb}m tmpfs /dev/shm || exit 77
        timeout --signal KILL 240 "$@" &
        until [ -e "$WHEN" ] || ! kill -0 $!; do sleep 0.05; done
        cat /dev/zero > /dev/shm/ballast 2> /dev/null
        wait $!
    """
    return subprocess.run(
        ["unshare", "--mount", "bash", "-c", script, "bash", *command],
        env={**os.environ, "WHEN": str(fill_when)},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
    )


@contextmanager
def little_memory(limit_bytes: int) -> Iterator[Path]:
    """Yield a control group whose processes the kernel kills when they take more than `limit_bytes`."""
    group, limits = _control_group(limit_bytes)
    try:
        group.mkdir()
        for name, value in limits.items():
            (group / name).write_text(value)
    except OSError as error:
        if group.exists():
            group.rmdir()
        raise Unavailable(f"no control group can be made here: {error}") from error
    try:
        yield group
    finally:
        group.rmdir()


def _control_group(limit_bytes: int) -> tuple[Path, dict[str, str]]:
    """Return the folder of a new group below this process's own, and the files to write there."""
    root, name = Path("/sys/fs/cgroup"), f"scarcity-{uuid.uuid4().hex[:8]}"
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, own = line.split(":", 2)
        if controllers == "memory":
            files = {"memory.limit_in_bytes": str(limit_bytes)}
            return root / "memory" / own.lstrip("/") / name, files
    files = {"memory.max": str(limit_bytes), "memory.swap.max": "0"}
    return root / name, files


@dataclass(frozen=True)
class Hunger:
    """Takes memory in a unit until the kernel kills the process.

    Args:
        group: A control group with little memory.
        folder: Where the deaths are counted.
        unit: The unit.
        times: Deaths; afterwards there is memory enough.
    """

    group: str
    folder: str
    unit: str
    times: int

    def eat(self, unit: str) -> None:
        """Take more memory than there is, in the unit of this hunger."""
        if unit != self.unit or self.deaths() >= self.times:
            return
        (Path(self.folder) / f"death-{uuid.uuid4().hex}").touch()
        (Path(self.group) / "cgroup.procs").write_text(str(os.getpid()))
        eaten = np.zeros(_HUNGER_BYTES, dtype=np.uint8)
        eaten[::_PAGE_BYTES] = 1
        raise AssertionError("the kernel did not kill this process")

    def deaths(self) -> int:
        """Return how often it was begun."""
        return len(list(Path(self.folder).glob("death-*")))


@dataclass(frozen=True)
class Holding:
    """What a process holds. `resident_bytes` leaves out what it shares."""

    pid: int
    descriptors: int
    threads: int
    resident_bytes: int


def holding() -> Holding:
    """Return what this process holds now."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return Holding(
        pid=os.getpid(),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        resident_bytes=(int(resident) - int(shared)) * _PAGE_BYTES,
    )


def do_small_unit(room: Room, unit: str) -> None:
    """Do what a long unit does, without its work: count the attempt, store states, commit, clear; and say what is held."""
    attempt = room.begin_unit(unit)
    assert attempt is not None
    keep = Checkpoints(room, unit, every_s=0.0)
    keep.load()
    for step in range(3):
        keep.maybe(lambda step=step: {"step": np.array(step)})
    room.commit_unit(
        unit, {f"{unit}.bin": unit.encode()}, attempt=attempt, metrics=asdict(holding())
    )
    keep.clear()


class SmallUnits:
    """An actor that does small units."""

    def __init__(self, room: Room) -> None:
        self._room = room

    def ready(self) -> str:
        """Return the node's name."""
        return "node"

    def work(self, unit: str) -> None:
        """Do a small unit."""
        do_small_unit(self._room, unit)


def read_holdings(room: Room) -> list[Holding]:
    """Return what the processes held in the small units of a room, in order of time."""
    markers = room.read_units(sorted(room.finished())).values()
    ordered = sorted(markers, key=lambda marker: marker.finished)
    return [Holding(**marker.metrics) for marker in ordered]


@dataclass(frozen=True)
class Process:
    """A running process."""

    pid: int
    title: str


def processes() -> Iterator[tuple[Process, int, bytes]]:
    """Yield every process that is no zombie, with its parent's id and its environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (folder / "environ").read_bytes()
        except OSError:
            continue  # it has ended in between, or is another user's
        if stat[0] != "Z":
            yield Process(int(folder.name), title.strip()), int(stat[1]), environment


def marked_processes(mark: str) -> list[Process]:
    """Return the processes that were started with `mark` in their environment."""
    return [process for process, _, environment in processes() if mark.encode() in environment]


def descendants(pid: int) -> list[Process]:
    """Return the processes below `pid`."""
    parents = {process: parent for process, parent, _ in processes()}
    found, new = [], {pid}
    while new:
        below = [process for process, parent in parents.items() if parent in new]
        found += below
        new = {process.pid for process in below}
    return found


def shared_memory_bytes(pid: int) -> int:
    """Return the bytes of shared memory behind the object stores of the processes below `pid`.

    A store's file has no name any more, so it is found by its open descriptors.
    """
    stores = {}
    for process in descendants(pid):
        for descriptor in Path(f"/proc/{process.pid}/fd").glob("*"):
            try:
                if "/plasma" in os.readlink(descriptor):
                    status = os.stat(descriptor)
                    stores[status.st_ino] = status.st_blocks * 512
            except OSError:
                continue
    return sum(stores.values())


def write_holding(folder: str) -> None:
    """Add what this process holds to the list in `folder`."""
    with open(Path(folder) / f"{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps(asdict(holding())) + "\n")


def read_written(folder: str) -> list[Holding]:
    """Return what the one process that wrote most held, in order of time."""
    lines = [path.read_text().splitlines() for path in Path(folder).glob("*.jsonl")]
    return [Holding(**json.loads(line)) for line in max(lines, key=len)]
