"""The files of cluster/ without a cloud: their fields exist, and they are what the README of cluster/ says they are."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
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
RAY_VERSION = re.search(r"^ray\[.*\]==(\S+)$", (ROOT / "requirements-run.txt").read_text(), re.M)[1]
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
    for commands in (config["head_setup_commands"], config["worker_setup_commands"]):
        assert any("~/wmdd_ray/requirements-run.lock" in command for command in commands)


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


def image_sources() -> dict[str, str]:
    """Return what of the checkout the image holds -> its place under the working directory, by its COPY lines."""
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copies = [shlex.split(line)[1:] for line in lines if line.startswith("COPY ")]
    found = {}
    for *sources, target in ([word for word in words if word[:2] != "--"] for words in copies):
        for source in sources:
            found[source] = source if target == "./" else target.rstrip("/")
    return found


def working_directory() -> str:
    return re.search(r"^WORKDIR (\S+)$", (CLUSTER / "Dockerfile").read_text(), re.M)[1]


def copy_image(folder: Path) -> Path:
    """Fill a folder with the files that the image has as working directory, and no others."""
    for source, target in image_sources().items():
        path = ROOT / source
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / target, ignore=ignore, dirs_exist_ok=True)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder / target)
    return folder


def test_the_image_holds_all_that_the_job_imports(tmp_path: Path) -> None:
    image = copy_image(tmp_path / "image")
    code = "import jobs.distill, wmdd_ray.stages.pipeline, sys; print(*sys.path, sep='\\n')"
    code += "; print(*(m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(image)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=image, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = [line for line in done.stdout.splitlines() if line.startswith(f"{image}/")]
    assert len(loaded) > 30
    # The environment may lie in the checkout (.venv, .ci/venv); the checkout's own code must not be found.
    own = [f"{ROOT}/{folder}" for folder in ("wmdd_ray", "jobs", "tests")]
    assert not [
        line
        for line in done.stdout.splitlines()
        if line == str(ROOT) or line.startswith(tuple(own))
    ]


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_nodes_hold_what_the_image_holds_where_the_image_holds_it(name: str) -> None:
    config = launcher(name)
    inside = {
        source: target.removeprefix(f"{working_directory()}/")
        for target, source in config["file_mounts"].items()
        if target.startswith(working_directory())
    }
    assert inside == image_sources()
    assert all((ROOT / source).exists() for source in inside)
    assert f"--env PYTHONPATH={working_directory()}" in config["docker"]["run_options"]
    # Ray runs a submitted command where `ray start` ran.
    here = working_directory().replace("/home/ray", "~")
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert f"cd {here};" in commands[-1].partition("ray start")[0]


def admitted(policy: Config, namespace: str, labels: dict[str, str], port: int) -> bool:
    """Return whether an ingress policy of the namespace `default` lets a pod of another one in."""

    def matches(selector: Config, found: dict[str, str]) -> bool:
        return selector.get("matchLabels", {}).items() <= found.items()

    return any(
        "namespaceSelector" in peer
        and matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
        and matches(peer.get("podSelector", {}), labels)
        for rule in policy["spec"]["ingress"]
        if port in [p["port"] for p in rule.get("ports", [{"port": port}])]
        for peer in rule["from"]
    )


def test_only_the_operators_own_namespace_reaches_the_ports_and_prometheus_its_numbers() -> None:
    policy = kubernetes("rayjob.yaml")["NetworkPolicy"]
    operator = {"app.kubernetes.io/component": "kuberay-operator"}
    assert admitted(policy, "ray-system", operator, 8265)
    assert not admitted(policy, "ray-system", {}, 8265)
    assert not admitted(policy, "elsewhere", operator, 8265), "anybody can label a pod"
    assert admitted(policy, "prometheus-system", {}, 8080)
    assert not admitted(policy, "prometheus-system", {}, 8265)
    policy["spec"]["ingress"][0]["from"][1]["namespaceSelector"] = {}
    assert admitted(policy, "elsewhere", operator, 8265), "the planted fault is seen"


def test_a_job_of_kuberay_ends_and_nothing_that_tidies_up_takes_its_head() -> None:
    job, cluster = kubernetes("rayjob.yaml")["RayJob"]["spec"], ray_cluster("rayjob.yaml")
    assert job["backoffLimit"] == 0  # KubeRay knows no exit codes; `again` does
    assert job["activeDeadlineSeconds"] > 123 * 3600  # the slowest row of cluster/README.md
    assert cluster["headGroupSpec"]["template"]["metadata"]["annotations"] == {
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
        "karpenter.sh/do-not-disrupt": "true",
    }
    for name in KUBERAY_FILES:
        assert kubernetes(name)["ServiceAccount"]["imagePullSecrets"] == [{"name": "wmdd-registry"}]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"].endswith("-YOUR_TAG"), (
            "one tag for all revisions mixes their code"
        )
        assert "ephemeral-storage" in container["resources"]["requests"]
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8")
    assert readme.count("s#YOUR_TAG#$REVISION#") == len(KUBERAY_FILES)


def test_every_pod_starts_ray_in_the_images_working_directory() -> None:
    cluster = ray_cluster("rayjob.yaml")
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert container["workingDir"] == working_directory()


def submitted_commands() -> list[str]:
    """Return what the README and rayjob.yaml submit, `$BUCKET` and the like filled in."""
    readme = (CLUSTER / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    typed = re.findall(r"^ray job submit (.*?)(?:  +#.*)?$", readme, re.M)
    assert all(" -- " in command and "--working-dir" not in command for command in typed)
    entrypoint = kubernetes("rayjob.yaml")["RayJob"]["spec"]["entrypoint"]
    prefix, _, again = entrypoint.partition(" python ")
    assert prefix == "sh again" and image_sources()["cluster/again"] == "again"
    commands = [*(command.partition(" -- ")[2] for command in typed), f"python {again}"]
    return [command.replace("$BUCKET", "bucket") for command in commands]


def test_every_submitted_command_is_the_main_one_with_options_that_exist() -> None:
    from jobs.distill import parse

    commands = submitted_commands()
    bare = "python jobs/distill.py --ipc 100"  # writes to $WMDD_RAY_RUNS
    assert (commands.count(bare), len(commands)) == (3, 7)
    for name in ("aws.yaml", "gcp.yaml", "rayjob.yaml", "raycluster.yaml"):
        assert "WMDD_RAY_RUNS" in (CLUSTER / name).read_text(encoding="utf-8")
    for command in (command for command in commands if command != bare):
        assert command.startswith("python jobs/distill.py --ipc 100 "), command
        job = parse(shlex.split(command)[2:])
        assert (job.config.recipe, job.config.ipc) == ("imagenet1k", 100)
        # A head without CPUs cannot say how many workers there will be.
        assert job.resources.num_workers > 0
        assert job.resources.gpus_per_worker == 1
        assert job.out
        assert "://" in job.out


@pytest.mark.parametrize(
    ("codes", "ends_with"),
    [("0", 0), ("2", 2), ("3", 3), ("4", 4), ("143", 143), ("1 5 137 0", 0), ("5 5 5 5 0", 5), ("1 2 0", 2)],
)  # fmt: skip
def test_only_a_command_that_lost_what_may_come_back_is_run_again(
    codes: str, ends_with: int, tmp_path: Path
) -> None:
    left = tmp_path / "codes"
    left.write_text("".join(f"{code}\n" for code in codes.split()))
    ends = f'code=$(head -n 1 "{left}"); sed -i 1d "{left}"; exit $code'
    command = ["sh", str(CLUSTER / "again"), "sh", "-c", ends]
    environment = {**os.environ, "AGAIN_AFTER_S": "0"}
    assert subprocess.run(command, env=environment, check=False).returncode == ends_with
    assert left.read_text() == {"5 5 5 5 0": "0\n", "1 2 0": "0\n"}.get(codes, "")


def test_the_image_is_made_of_a_base_by_digest_that_nobody_invented() -> None:
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    (base,) = (line for line in lines if line.startswith("FROM "))
    assert base.endswith("@${DIGEST}") and lines[lines.index(base) - 1] == "ARG DIGEST"


def test_pinned_packages_have_one_version_everywhere() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in CLUSTER.iterdir())
    for part in ("-run", ""):
        text += (ROOT / f"requirements{part}.txt").read_text(encoding="utf-8")
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"([\w.-]+)(?:\[[\w,]+\])?==([\w.]+)", text):
        versions.setdefault(name.lower(), set()).add(version)
    assert {"ray", "gcsfs", "google-api-python-client"} <= versions.keys()
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def test_no_credentials_stand_in_the_files() -> None:
    for path in CLUSTER.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|BEGIN [A-Z ]*PRIVATE KEY", text), (
            path
        )
        assert not re.search(
            r"(?i)secret_?access_?key['\"]?\s*[:=]\s*['\"]?[A-Za-z0-9/+]{20,}", text
        ), path
