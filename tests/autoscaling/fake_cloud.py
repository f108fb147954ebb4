"""A cloud on this machine: a head without CPUs, and Ray's autoscaler (v2, as KubeRay and `ray up` use it) with fake nodes.

A node is a raylet of its own with the CPUs and GPUs that its type claims; the "GPU" is a number. Started by
`unshare --pid`, so that nothing outlives it:

    unshare --pid --fork --kill-child --mount-proc python -m tests.autoscaling.fake_cloud PLAN

The plan (JSON) says which command to run, and which node to lose when; standard output is a diary, a JSON line whenever
nodes come or go, one is lost, the job says something, or ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.conftest import free_port
from wmdd_ray.store.filesystem import Store

import psutil  # isort: skip - Ray brings it

# The ids that Ray's fake provider gives to its nodes.
HEAD_ID = "f" * 51 + "00000"
NODE_TYPES = {"cpu": {"CPU": 1}, "gpu": {"CPU": 1, "GPU": 1}}
NODE_BYTES = 80 << 20
LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "rsync_exclude",
    "rsync_filter",
    "cluster_synced_files",
)
# Titles of the processes that a raylet has with no work to do.
RESTING = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
POLL_S = 0.2
REST_S = 60.0
JOB_S = 480.0


def autoscaling(gcs_address: str, nodes_a_type: int, idle_s: float) -> dict[str, Any]:
    """Return the file of `ray start --autoscaling-config`.

    The provider is named as one from outside, for `type: fake_multinode` looks for an `example.yaml` that Ray's wheel
    lacks, and its monitor dies of it without a word.
    """
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    workers = {
        name: {
            "resources": {**resources, "object_store_memory": NODE_BYTES},
            "node_config": {},
            "min_workers": 0,
            "max_workers": nodes_a_type,
        }
        for name, resources in NODE_TYPES.items()
    }
    return {
        "cluster_name": "fake",
        "max_workers": nodes_a_type * len(workers),
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": gcs_address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "auth": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in LISTS},
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, **workers},
    }


def start_head(nodes_a_type: int, idle_s: float) -> str:
    """Start the head and the autoscaler; return the address, empty where `ray start` failed twice."""
    os.environ.update(
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        RAY_health_check_initial_delay_ms="2000",
        RAY_health_check_period_ms="1000",
        RAY_health_check_timeout_ms="2000",
        RAY_health_check_failure_threshold="3",
    )
    # One start of Ray in hundreds fails, and how Ray starts is not tested here.
    return start_head_once(nodes_a_type, idle_s) or start_head_once(nodes_a_type, idle_s)


def start_head_once(nodes_a_type: int, idle_s: float) -> str:
    """Return the address of a head that was started, empty where `ray start` failed."""
    address = f"127.0.0.1:{free_port()}"
    # Not under pytest's folder: the path of a socket has at most 107 characters.
    folder = tempfile.mkdtemp(prefix="wmdd-")
    config = Path(folder) / "autoscaling.json"
    content = autoscaling(address, nodes_a_type, idle_s)
    validate_config(prepare_config(content))  # where the monitor would die without a word
    config.write_text(json.dumps(content))
    say(folder=folder)
    head = {"RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    head["RAY_NODE_TYPE_NAME"] = "ray.head.default"
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--num-cpus=0"]
    command += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
    command += [f"--temp-dir={folder}", f"--object-store-memory={NODE_BYTES}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false"]
    command += [f"--autoscaling-config={config}"]
    started = subprocess.run(command, env={**os.environ, **head}, stdout=subprocess.DEVNULL)
    return "" if started.returncode else address


_saying = threading.Lock()


def say(**about: Any) -> None:
    """Write a line of the diary."""
    with _saying:
        print(json.dumps({"at": round(time.monotonic(), 2), **about}), flush=True)


class Nodes:
    """The worker nodes that are alive, by type."""

    def __init__(self) -> None:
        self._last: dict[str, int] | None = None

    def look(self) -> Counter[str]:
        """Return type -> number of nodes alive; a change goes into the diary."""
        alive = Counter(dict.fromkeys(NODE_TYPES, 0))
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] != HEAD_ID:
                alive["gpu" if "GPU" in node["Resources"] else "cpu"] += 1
        if alive != self._last:
            self._last = alive
            say(nodes=alive)
        return alive

    def rest(self) -> None:
        """Wait until the last worker node is gone."""
        deadline = time.monotonic() + REST_S
        while self.look().total() and time.monotonic() < deadline:
            time.sleep(POLL_S)


def lose_node(node_type: str) -> list[str]:
    """Kill the raylet of a busy node and its children, as a spot machine goes; return what worked there, if any did."""
    for raylet in psutil.process_iter():
        try:
            if raylet.name() != "raylet" or raylet.environ().get("RAY_NODE_TYPE_NAME") != node_type:
                continue
            children = raylet.children(recursive=True)
            titles = ["".join(child.cmdline()[:1]) for child in children]
        except psutil.Error:
            continue
        working = [t for t in titles if t.startswith("ray::") and not t.startswith(RESTING)]
        if working:
            # The raylet first: it would tell the head that its workers died.
            for process in (raylet, *children):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            return working
    return []


def run(command: list[str], nodes: Nodes, losses: list[dict[str, Any]]) -> None:
    """Run a command to its end, and lose the nodes that the plan says on the way."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def listen() -> None:
        assert process.stdout
        for line in process.stdout:
            say(said=line.rstrip())

    listener = threading.Thread(target=listen)
    listener.start()
    deadline = time.monotonic() + JOB_S
    left = list(losses)
    while process.poll() is None:
        if time.monotonic() > deadline:
            process.kill()
        nodes.look()
        if left:
            room = Store(left[0]["room"])
            committed = room.list("units")
            if len(committed) >= left[0]["units"] and (working := lose_node(left[0]["node_type"])):
                markers = {key: room.get(key).decode() for key in committed}
                say(lost=left.pop(0), working=working, markers=markers)
        time.sleep(POLL_S)
    listener.join()
    say(exit=process.returncode)


def main(plan: dict[str, Any]) -> None:
    """Run the plan."""
    address = start_head(plan["nodes_a_type"], plan["idle_s"])
    if not address:
        raise SystemExit("`ray start` failed twice: see above")
    os.environ["RAY_ADDRESS"] = address
    ray.init(log_to_driver=False, logging_level="ERROR")
    nodes = Nodes()
    nodes.look()
    run(plan["command"], nodes, plan["losses"])
    nodes.rest()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
