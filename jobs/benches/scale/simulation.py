"""A stage on a cluster that loses nodes, event by event: makespan, efficiency, and where the paid seconds go.

Workers stand in groups. Ray Train restarts a whole group when one of its workers is lost, and again when a
replacement joins; every unit in flight in the group then falls back to its last checkpoint. One group of all workers,
several small groups, and isolated workers (groups of one) are the same program with another `group_size`.

A node is paid from `boot_s` before it can work until it is lost or released. Useful is the core time of every unit,
counted once; efficiency = useful / paid.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

# Kinds of paid time that are not useful; idle is what remains.
KINDS = BOOT, START, OVERHEAD, REDONE, IDLE = "boot", "start", "overhead", "redone", "idle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """What the cluster is made of, and what it does when a node goes. Seconds."""

    num_workers: int
    """Workers, one a node."""
    group_size: int
    """Workers that restart together; 1: isolated workers."""
    arrival_s: float = 60.0
    """The first nodes become ready evenly over this time."""
    boot_s: float = 120.0
    """Paid before a node can work: boot, image, joining the cluster."""
    first_boot: bool = True
    """Whether the first nodes boot for this stage; else they are there from the stage before."""
    replacement_s: float = 300.0
    """From the loss of a node until another can work in its place, its boot included."""
    detect_s: float = 10.0
    """From the loss of a node until its group is stopped; the others work on in this time."""
    start_s: float = 25.0
    """From a group's start or restart until its workers take units: processes, imports, teacher."""
    grow_s: float = 60.0
    """How often a group looks whether it can grow (Ray Train's elastic_resize_monitor_interval_s)."""
    idle_s: float = 60.0
    """A node without work is released after this time (the autoscaler's idle timeout)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Units:
    """A stage's units of work and what surrounds each. Seconds."""

    seconds: Sequence[float]
    """Core time of every unit, in the order of the queue."""
    overhead_s: float = 0.0
    """Reading inputs before a unit and committing it after: paid, not useful."""
    checkpoint_s: float = 0.0
    """Work between two checkpoints; 0: none."""
    stall_s: float = 0.0
    """How long a checkpoint holds up the work; 0 when it is written in the background."""
    write_s: float = 0.0
    """From a checkpoint's state until it can be read back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a stage took. `shares` of the paid seconds are not useful; with the efficiency they sum to 1."""

    makespan_s: float
    paid_s: float
    efficiency: float
    shares: dict[str, float]
    num_losses: int
    num_starts: int
    most_attempts: int


@dataclass(slots=True)
class _Worker:
    """A place in a group. `since` is when its node could work first, None while there is none."""

    group: int
    since: float | None = None
    node: int = 0  # changes with its node
    member: bool = False  # of the group as it was started last
    unit: int | None = None
    task: int = 0  # changes with its unit
    began: float = 0.0


@dataclass(slots=True)
class _Group:
    workers: list[int]
    began: float = 0.0
    round: int = 0  # changes with every start
    taking: bool = False  # started, and its workers take units
    starting: bool = False  # another start is planned
    released: bool = False


@dataclass(eq=False)
class _Simulation:
    units: Units
    cluster: Cluster
    lives: Iterator[float]
    now: float = 0.0
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS[:-1], 0.0))
    ended_s: float = 0.0
    num_losses: int = 0
    num_starts: int = 0

    def __post_init__(self) -> None:
        n, size, num_units = (
            self.cluster.num_workers,
            self.cluster.group_size,
            len(self.units.seconds),
        )
        self.workers = [_Worker(group=i // size) for i in range(n)]
        self.groups = [_Group(list(range(i, min(i + size, n)))) for i in range(0, n, size)]
        self.waiting = deque(range(num_units))
        self.left = num_units
        self.saved = [0.0] * num_units
        self.attempts = [0] * num_units
        self.events: list[tuple[float, int, str, int, int]] = []
        self.num_events = 0
        self.released: list[tuple[float, float]] = []
        for i in range(n):
            self.at(self.cluster.arrival_s * i / n, "arrive", i, 0)

    def run(self) -> Outcome:
        """Handle events until no unit is left, and add up what was paid."""
        while self.left:
            self.now, _, event, which, ticket = heapq.heappop(self.events)
            getattr(self, event)(which, ticket)
        # Nodes that were let go early are paid until the idle timeout, or the end, whichever comes first.
        released_s = math.fsum(min(until, self.now) - since for since, until in self.released)
        here_s = math.fsum(self.now - w.since for w in self.workers if w.since is not None)
        paid_s = self.spent[BOOT] + self.ended_s + released_s + here_s
        useful_s = math.fsum(self.units.seconds)
        idle_s = paid_s - useful_s - math.fsum(self.spent.values())
        spent = {**self.spent, IDLE: idle_s}
        return Outcome(
            makespan_s=self.now,
            paid_s=paid_s,
            efficiency=useful_s / paid_s,
            shares={kind: seconds / paid_s for kind, seconds in spent.items()},
            num_losses=self.num_losses,
            num_starts=self.num_starts,
            most_attempts=max(self.attempts),
        )

    def at(self, time: float, event: str, which: int, ticket: int) -> None:
        """Plan an event; one whose ticket has been changed meanwhile is void."""
        self.num_events += 1
        heapq.heappush(self.events, (time, self.num_events, event, which, ticket))

    # Nodes

    def arrive(self, i: int, ticket: int) -> None:
        """A node can work now: its group starts, or grows at its next look."""
        worker, group = self.workers[i], self.groups[self.workers[i].group]
        if worker.node or self.cluster.first_boot:
            self.spent[BOOT] += self.cluster.boot_s
        worker.since = self.now
        worker.node += 1
        self.at(self.now + next(self.lives), "lose", i, worker.node)
        if group.released:
            self.release(i)
        elif group.starting:
            return
        elif not any(self.workers[j].member for j in group.workers):
            group.starting = True
            self.at(self.now, "start", worker.group, group.round)
        else:
            group.starting = True
            looks = (self.now - group.began) // self.cluster.grow_s + 1
            self.at(group.began + looks * self.cluster.grow_s, "start", worker.group, group.round)

    def lose(self, i: int, ticket: int) -> None:
        """A node is gone; its group is stopped a little later, and another node is asked for."""
        worker = self.workers[i]
        if worker.node != ticket or worker.since is None:
            return
        group = self.groups[worker.group]
        self.num_losses += 1
        self.interrupt(i)
        self.ended_s += self.now - worker.since
        worker.since = None
        if worker.member:
            worker.member = False
            group.starting = True
            self.at(self.now + self.cluster.detect_s, "start", worker.group, group.round)
        self.at(self.now + self.cluster.replacement_s, "arrive", i, 0)

    def release(self, i: int) -> None:
        """A node is no longer needed; it is paid until the idle timeout."""
        worker = self.workers[i]
        if worker.since is not None:
            self.released.append((worker.since, self.now + self.cluster.idle_s))
        worker.since, worker.member = None, False
        worker.node += 1

    # Groups

    def start(self, g: int, ticket: int) -> None:
        """A group starts, or starts anew, on the nodes that are there."""
        group = self.groups[g]
        if group.round != ticket or group.released:
            return
        group.starting = False
        here = [i for i in group.workers if self.workers[i].since is not None]
        if not here:
            return
        for i in here:
            self.interrupt(i)
            self.workers[i].member = True
            self.workers[i].began = self.now
        group.began, group.taking = self.now, False
        group.round += 1
        self.num_starts += 1
        self.at(self.now + self.cluster.start_s, "take_all", g, group.round)

    def take_all(self, g: int, ticket: int) -> None:
        """A started group's workers take their first units."""
        group = self.groups[g]
        if group.round != ticket:
            return
        group.taking = True
        members = [i for i in group.workers if self.workers[i].member]
        for i in members:
            self.spent[START] += self.now - self.workers[i].began
        for i in members:
            self.take(i)

    # Units

    def take(self, i: int) -> None:
        """A worker takes the next unit; a group whose workers all find none lets its nodes go."""
        worker = self.workers[i]
        group = self.groups[worker.group]
        if self.waiting:
            unit = self.waiting.popleft()
            self.attempts[unit] += 1
            worker.unit, worker.began = unit, self.now
            worker.task += 1
            self.at(self.now + self.wall_s(unit), "finish", i, worker.task)
        elif not group.released and all(self.workers[j].unit is None for j in group.workers):
            group.released = True
            for j in group.workers:
                self.release(j)

    def wall_s(self, unit: int) -> float:
        """Return how long the rest of a unit takes, with its checkpoints."""
        rest = self.units.seconds[unit] - self.saved[unit]
        return self.units.overhead_s + rest + self.stalls(rest)

    def stalls(self, work_s: float) -> float:
        """Return how long the checkpoints of so much work hold it up."""
        every = self.units.checkpoint_s
        return self.units.stall_s * (work_s // every) if every else 0.0

    def finish(self, i: int, ticket: int) -> None:
        """A unit is committed."""
        worker = self.workers[i]
        unit = worker.unit
        if unit is None or worker.task != ticket:
            return
        rest = self.units.seconds[unit] - self.saved[unit]
        self.spent[OVERHEAD] += self.units.overhead_s + self.stalls(rest)
        worker.unit = None
        self.left -= 1
        self.take(i)

    def interrupt(self, i: int) -> None:
        """A worker is stopped: its unit falls back to the last checkpoint that can be read, and waits again."""
        worker, group = self.workers[i], self.groups[self.workers[i].group]
        if worker.member and not group.taking:
            self.spent[START] += self.now - worker.began
        if worker.unit is None:
            return
        spent_s, kept_s, every = self.now - worker.began, 0.0, self.units.checkpoint_s
        if every:
            at_work_s = max(0.0, spent_s - self.units.overhead_s - self.units.write_s)
            rest = self.units.seconds[worker.unit] - self.saved[worker.unit]
            kept_s = min(at_work_s // (every + self.units.stall_s) * every, rest)
        self.saved[worker.unit] += kept_s
        self.spent[REDONE] += spent_s - kept_s
        self.waiting.appendleft(worker.unit)
        worker.unit = None


def simulate(units: Units, cluster: Cluster, lives: Iterator[float]) -> Outcome:
    """Return what a stage takes on a cluster.

    Args:
        units: The stage.
        cluster: The cluster.
        lives: Seconds from when a node can work until it is lost, one a node in the order of their coming.
    """
    return _Simulation(units, cluster, lives).run()


def random_lives(losses_per_hour: float, seed: int) -> Iterator[float]:
    """Yield the lives of nodes of which so large a share is lost in an hour, without notice."""
    if not losses_per_hour:
        yield from itertools.repeat(math.inf)
    rng = np.random.default_rng(seed)
    while True:
        yield float(rng.exponential(3600 / losses_per_hour))
