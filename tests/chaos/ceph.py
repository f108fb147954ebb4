"""Ceph's object gateway on this machine: one monitor, one OSD that keeps its objects in memory, and the gateway."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "cephkey", "AWS_SECRET_ACCESS_KEY": "cephsecret"}
INSTALL = "apt-get install --no-install-recommends ceph-mon ceph-osd radosgw"
_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_TIMEOUT_S = 120


def is_installed() -> bool:
    """Return whether all programs are there that a gateway takes."""
    return all(map(shutil.which, _PROGRAMS))


@contextlib.contextmanager
def running(folder: Path, objectstore: str = "memstore") -> Iterator[str]:
    """Yield the endpoint of a gateway with one user, that of `KEYS`; all listens on 127.0.0.1 only.

    Args:
        folder: A new folder, for all files.
        objectstore: `memstore`, or `bluestore`, which is on disk and flushes as that of a real cluster.
    """
    cluster = _Cluster(folder)
    try:
        try:
            cluster.start(objectstore)
        except (OSError, subprocess.SubprocessError) as error:
            said = cluster.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"Ceph did not start: {error}\n{said}") from error
        yield cluster.endpoint
    finally:
        cluster.kill()


class _Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.log.touch()
        self.endpoint = f"http://127.0.0.1:{free_port()}"
        self._env = {**os.environ, "CEPH_CONF": str(folder / "ceph.conf"), "CEPH_ARGS": ""}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self, objectstore: str) -> None:
        """Make the cluster, its user and the gateway, and wait until it answers."""
        fsid, disk, monitor = str(uuid.uuid4()), str(uuid.uuid4()), f"v2:127.0.0.1:{free_port()}"
        options = {
            "fsid": fsid,
            "mon host": monitor,
            "mon data": self.folder / "mon",
            "osd data": self.folder / "osd",
            "public addr": "127.0.0.1",
            "cluster addr": "127.0.0.1",
            "auth cluster required": "none",
            "auth service required": "none",
            "auth client required": "none",
            # The gateway asks the monitor for encryption otherwise, which takes keys.
            "ms mon client mode": "crc",
            # One disk holds all, and there is no manager that would choose the numbers of groups.
            "osd crush chooseleaf type": 0,
            "osd pool default size": 1,
            "osd pool default pg num": 1,
            "osd pool default pg autoscale mode": "off",
            "mon allow pool size one": "true",
            "paxos propose interval": 0.05,  # each new pool waits for it
            "osd objectstore": objectstore,
            "bluestore block size": 4 << 30,
            # By default what is read comes 40 ms late: its second packet waits until the first is acknowledged.
            "rgw frontends": f"beast tcp_nodelay=1 endpoint={self.endpoint.removeprefix('http://')}",
            # All else would go to /var.
            "run dir": self.folder,
            "admin socket": "",
            "pid file": "",
            "log file": "",
            "mon cluster log file": "",
            "log to stderr": "true",
        }
        lines = [f"{name} = {value}" for name, value in options.items()]
        (self.folder / "ceph.conf").write_text("\n".join(["[global]", *lines, ""]))
        for part in ("mon", "osd"):
            (self.folder / part).mkdir()
        monmap, keys = str(self.folder / "monmap"), list(KEYS.values())
        self._do("monmaptool", "--create", "--fsid", fsid, "--addv", "a", f"[{monitor}]", monmap)
        self._do("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap)
        self._keep("ceph-mon", "-i", "a")
        self._do("ceph", "osd", "new", disk)
        self._do("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", disk)
        self._keep("ceph-osd", "-i", "0")
        user = ["--uid", "tests", "--display-name", "tests"]
        self._do("radosgw-admin", "user", "create", *user, "--access-key", keys[0], "--secret-key", keys[1])  # fmt: skip
        self._keep("radosgw", "-n", "client.rgw")
        deadline = time.monotonic() + _TIMEOUT_S
        while not self._answers():
            if time.monotonic() > deadline or self._daemons[-1].poll() is not None:
                raise TimeoutError("the gateway does not answer")
            time.sleep(0.1)

    def _do(self, *command: str) -> None:
        with open(self.log, "ab") as log:
            subprocess.run(
                command, env=self._env, stdout=log, stderr=log, check=True, timeout=_TIMEOUT_S
            )

    def _keep(self, *command: str) -> None:
        with open(self.log, "ab") as log:
            self._daemons.append(
                subprocess.Popen([*command, "-f"], env=self._env, stdout=log, stderr=log)
            )

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        """End the daemons with SIGKILL."""
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
