"""The files of cluster/ without a cloud: their fields exist, and they are what the README of cluster/ says they are."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import botocore.session
import jsonschema
import pytest
import yaml
from botocore.validate import ParamValidator

from tests.kuberay_schema import KINDS

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "cluster"
RAY_VERSION = re.search(r"^ray\[.*\]==(\S+)$", (ROOT / "requirements.txt").read_text(), re.M)[1]
# The options of a Compute Engine machine that gcp.yaml has a use for (its API's `instances` resource).
GCP_MACHINE = {"disks", "machineType", "metadata", "scheduling", "serviceAccounts"}

Config = dict[str, Any]


def kubernetes(name: str) -> dict[str, Config]:
    """Return the resources of a Kubernetes file by their kind."""
    documents = yaml.safe_load_all((CLUSTER / name).read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def ray_cluster(name: str) -> Config:
    """Return the RayCluster spec of a KubeRay file."""
    found = kubernetes(name)
    return (
        found["RayJob"]["spec"]["rayClusterSpec"]
        if "RayJob" in found
        else found["RayCluster"]["spec"]
    )


def launcher(name: str) -> Config:
    """Return a file of `ray up` as written."""
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def check_kubernetes(resources: dict[str, Config]) -> None:
    for kind, document in resources.items():
        jsonschema.validate(document, KINDS[kind])


def check_launcher(config: Config) -> Config:
    """Return `config` as `ray up` would use it, with its defaults, after Ray's own checks."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def check_ec2(node_config: Config) -> None:
    """Hold a machine's options against botocore's description of EC2, as the call that starts it would."""
    service = botocore.session.Session().get_service_model("ec2")
    request = {"MinCount": 1, "MaxCount": 1, **node_config}
    report = ParamValidator().validate(request, service.operation_model("RunInstances").input_shape)
    assert not report.has_errors(), report.generate_report()


def node_terms(pod: Config) -> list[Config]:
    affinity = pod["spec"]["affinity"]["nodeAffinity"]
    return affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]


KUBERAY_FILES = ("rayjob.yaml", "raycluster.yaml")
LAUNCHER_FILES = ("aws.yaml", "gcp.yaml")


@pytest.mark.parametrize("name", KUBERAY_FILES)
def test_kuberay_files_have_only_fields_that_exist(name: str) -> None:
    check_kubernetes(kubernetes(name))


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_files_pass_rays_own_checks(name: str) -> None:
    check_launcher(launcher(name))


def test_aws_machines_have_only_options_that_exist() -> None:
    for node_type in launcher("aws.yaml")["available_node_types"].values():
        check_ec2(node_type["node_config"])


def test_gcp_machines_have_only_options_that_we_know() -> None:
    for node_type in launcher("gcp.yaml")["available_node_types"].values():
        assert set(node_type["node_config"]) <= GCP_MACHINE


def rename(config: Config, *path: str | int, to: str) -> None:
    """Misspell the last field of a path."""
    *parents, field = path
    for step in parents:
        config = config[step]
    config[to] = config.pop(field)


HEAD = ("RayJob", "spec", "rayClusterSpec", "headGroupSpec")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: rename(r, "RayJob", "spec", "backoffLimit", to="backOffLimit"),
        lambda r: rename(r, "RayJob", "spec", "rayClusterSpec", "authOptions", to="authOption"),
        lambda r: rename(
            r, "RayJob", "spec", "rayClusterSpec", "enableInTreeAutoscaling", to="enableAutoscaling"
        ),
        lambda r: rename(
            r, *HEAD, "template", "spec", "terminationGracePeriodSeconds", to="gracePeriod"
        ),
        lambda r: r["RayJob"]["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"),
        lambda r: r["RayJob"]["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(
            {"num-cpus": 0}
        ),
        lambda r: r["RayJob"]["spec"]["rayClusterSpec"].pop("workerGroupSpecs"),
        lambda r: rename(r, "NetworkPolicy", "spec", "podSelector", to="podSelectors"),
    ],
)
def test_a_planted_mistake_in_a_kuberay_file_is_refused(spoil: Callable[[Config], None]) -> None:
    resources = kubernetes("rayjob.yaml")
    spoil(resources)
    with pytest.raises(jsonschema.ValidationError):
        check_kubernetes(resources)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: rename(c, "max_workers", to="max_worker"),
        lambda c: rename(c, "docker", "run_options", to="run_option"),
        lambda c: c["available_node_types"]["gpu"].update(resources={"GPU": 0.5}),
        lambda c: c.update(head_node_type="haed"),
    ],
)
def test_a_planted_mistake_in_a_launcher_file_is_refused(spoil: Callable[[Config], None]) -> None:
    config = launcher("aws.yaml")
    spoil(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        check_launcher(config)


def test_a_planted_mistake_in_an_aws_machine_is_refused() -> None:
    machine = launcher("aws.yaml")["available_node_types"]["gpu"]["node_config"]
    rename(machine, "InstanceMarketOptions", to="InstanceMarketOption")
    with pytest.raises(AssertionError, match="Unknown parameter"):
        check_ec2(machine)


def test_every_image_has_the_ray_of_the_requirements() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in CLUSTER.iterdir())
    tags = re.findall(r"(?:rayproject/ray|wmdd-ray):([\w.]+)", text)
    assert len(tags) >= 9
    assert set(tags) == {RAY_VERSION}
    assert {ray_cluster(name)["rayVersion"] for name in KUBERAY_FILES} == {RAY_VERSION}


def test_the_two_kuberay_files_describe_the_same_cluster() -> None:
    assert ray_cluster("rayjob.yaml") == ray_cluster("raycluster.yaml")
    assert (
        kubernetes("rayjob.yaml")["NetworkPolicy"] == kubernetes("raycluster.yaml")["NetworkPolicy"]
    )


def test_kuberay_asks_for_a_token_and_shows_no_dashboard_outside() -> None:
    cluster = ray_cluster("rayjob.yaml")
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"].get("enableIngress", False)
    assert "dashboard-host" not in cluster["headGroupSpec"]["rayStartParams"]
    selected = kubernetes("rayjob.yaml")["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert selected.items() <= group["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_asks_for_a_token_on_every_node_and_binds_the_dashboard_to_loopback(
    name: str,
) -> None:
    config = check_launcher(launcher(name))
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        starts = [command for command in commands if "ray start" in command]
        assert starts
        assert all(command.startswith("export RAY_AUTH_MODE=token;") for command in starts)
    assert "--dashboard-host=127.0.0.1" in "".join(config["head_start_ray_commands"])
    assert "0.0.0.0" not in str(config)
    assert config["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    # Ray's defaults would install a wheel of another version on every node.
    assert "ray-wheels" not in str(config)
    assert any("wmdd_requirements.txt" in command for command in config["head_setup_commands"])
    assert any("wmdd_requirements.txt" in command for command in config["worker_setup_commands"])


def test_kuberay_gpus_are_spot_from_none_up_and_the_head_never_is() -> None:
    cluster = ray_cluster("rayjob.yaml")
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    (head_term,) = node_terms(cluster["headGroupSpec"]["template"])
    assert {expression["operator"] for expression in head_term["matchExpressions"]} == {"NotIn"}
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert {group["minReplicas"] for group in groups.values()} == {0}
    gpu_terms = node_terms(groups["gpu"]["template"])
    spot = {expression["key"] for expression in head_term["matchExpressions"]}
    assert {
        expression["key"] for term in gpu_terms for expression in term["matchExpressions"]
    } == spot
    (container,) = groups["gpu"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


@pytest.mark.parametrize(
    ("name", "spot_machine"),
    [
        (
            "aws.yaml",
            lambda machine: machine.get("InstanceMarketOptions") == {"MarketType": "spot"},
        ),
        (
            "gcp.yaml",
            lambda machine: machine.get("scheduling", {}).get("provisioningModel") == "SPOT",
        ),
    ],
)
def test_launcher_gpus_are_spot_from_none_up_and_the_head_never_is(
    name: str, spot_machine: Callable[[Config], bool]
) -> None:
    config = check_launcher(launcher(name))
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    assert not spot_machine(types["head"]["node_config"])
    assert types["gpu"]["resources"]["GPU"] == 1
    assert spot_machine(types["gpu"]["node_config"])
    for node_type in ("cpu", "gpu"):
        assert types[node_type]["min_workers"] == 0
        assert types[node_type]["max_workers"] > 1
        assert types[node_type]["labels"]["market"] == (
            "spot" if spot_machine(types[node_type]["node_config"]) else "on-demand"
        )
    assert config["max_workers"] >= types["cpu"]["max_workers"] + types["gpu"]["max_workers"]


def test_kuberay_pods_have_time_to_drain_and_shared_memory() -> None:
    cluster = ray_cluster("rayjob.yaml")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        drain_s = {e["name"]: e["value"] for e in container["env"]}[
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
        ]
        assert int(drain_s) < pod["terminationGracePeriodSeconds"] <= 120
        (volume,) = pod["volumes"]
        assert volume["emptyDir"]["medium"] == "Memory"
        assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/dev/shm"}]
        assert container["workingDir"] == "/home/ray/wmdd_ray"


def test_the_job_of_kuberay_is_the_main_command() -> None:
    entrypoint = kubernetes("rayjob.yaml")["RayJob"]["spec"]["entrypoint"]
    assert entrypoint.startswith(
        "python jobs/distill.py --ipc 100 --recipe imagenet1k --data s3://"
    )
    assert " --out s3://" in entrypoint


def test_no_credentials_stand_in_the_files() -> None:
    for path in CLUSTER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), (
            path
        )
        assert not re.search(
            r"(?i)secret_?access_?key['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+]{20,}", text
        ), path
