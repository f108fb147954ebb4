"""The doctor in worlds that are broken for real, and in two that are not. On clusters: test_job_submit.py."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import s3fs
from safetensors.numpy import save

from jobs import distill, doctor
from jobs.checks import cluster as checks
from jobs.checks.report import Visit
from tests.conftest import S3Uri, free_port
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from tests.store.faulty_s3 import FaultyS3
from tests.store.written_sources import write_imagefolder, write_parquet, write_webdataset
from wmdd_ray.executors import cluster
from wmdd_ray.spine.rooms import Room
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.teacher import read_teacher

Report = dict[str, list[str]]
Examine = Callable[..., tuple[int, Report]]

SMALL_IMAGES = (
    "--recipe", "digits",
    "--source.format", "auto", "--source.image-size", "8", "--source.resize", "8", "--ipc", "4",
)  # fmt: skip


def report_of(said: str) -> Report:
    """Return check -> its lines, with their advice."""
    report: Report = {}
    name = ""
    for line in said.splitlines():
        if line[:8].strip() in ("ok", "warning", "FAIL", "skipped"):
            mark, name, found = line.split(maxsplit=2)
            report.setdefault(name, []).append(f"{mark} {found}")
        elif line.strip().startswith("->"):
            report[name][-1] += f" {line.strip()}"
    return report


@pytest.fixture
def examine(capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run the doctor without a cluster, unless told otherwise, and return its exit code and report."""

    def run(*options: str, cluster: bool = False) -> tuple[int, Report]:
        code = doctor.main([*tiny.OPTIONS, *options, *([] if cluster else ["--no-cluster"])])
        return code, report_of(capsys.readouterr().out)

    return run


def failures(report: Report) -> list[str]:
    """Return the names of the checks that failed."""
    return [
        name for name, lines in report.items() if any(line.startswith("FAIL") for line in lines)
    ]


@pytest.fixture
def fresh_clients() -> Iterator[None]:
    """A client keeps the endpoint and the credentials that it was made with."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """Put a small disk in memory at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk takes more rights than this process has")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_good_world_passes_and_nothing_is_left_in_it(examine: Examine, tmp_path: Path) -> None:
    code, report = examine("--out", str(tmp_path / "runs" / "new"))
    assert (code, failures(report)) == (0, [])
    assert list(tmp_path.iterdir()) == []
    assert list(report) == [
        *(
            "options",
            "versions",
            "credentials",
            "storage",
            "commits",
            "speed",
            "data",
            "teacher",
            "plan",
        ),
    ]
    assert report["data"][0] == (
        "ok train: 1437 images (digits, 92.0 KB) of 10 classes (0, 1, 2 and 7 more), 138 to 147 of each"
    )


@pytest.mark.slow  # the session's Ray
@pytest.mark.usefixtures("ray_local", "fresh_clients")
def test_a_good_world_on_s3_passes_on_every_node_and_keeps_its_objects(
    examine: Examine, s3_server: S3Uri
) -> None:
    out, data = s3_server(), Store(s3_server())
    for split in ("train", "val"):
        write_imagefolder(data, split)
    Store(out).put("mine", b"here before")
    code, report = examine("--out", out, "--data", data.uri, *SMALL_IMAGES, cluster=True)
    assert (code, failures(report)) == (0, []), report
    assert report["credentials"] == ["ok from env, lasting"]
    assert " answers in " in report["endpoint"][0]
    assert report["nodes"][0].startswith(
        "ok 1 node with the versions of here, seeing --out and --data; "
    )
    # The session's Ray has no token, and no job API that could be asked.
    assert report["cluster"][-1].startswith("warning RAY_AUTH_MODE is disabled -> ")
    assert Store(out).list() == {"mine": 11}


@pytest.mark.usefixtures("fresh_clients")
def test_wrong_credentials_are_refused_by_name_and_never_shown(
    examine: Examine, s3_server: S3Uri, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = s3_server()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG0")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-and-secret")

    def actions_without_check(number: str) -> None:
        url = f"{s3_endpoint}/moto-api/reset-auth"
        urllib.request.urlopen(
            urllib.request.Request(url, number.encode(), {"Content-Type": "text/plain"})
        ).close()

    actions_without_check("0")
    try:
        code, report = examine("--out", out)
    finally:
        actions_without_check("inf")
    assert (code, failures(report)) == (5, ["storage"])
    assert "access denied" in report["storage"][0] and out in report["storage"][0]
    assert report["credentials"][0].startswith("warning from env: temporary")
    assert report["speed"] == ["skipped needs storage"]
    assert len(report["data"]) == 4
    assert "AKIAWRONG" not in str(report) and "and-secret" not in str(report)


@pytest.mark.usefixtures("fresh_clients", "s3_server")
def test_a_missing_bucket_is_named(examine: Examine) -> None:
    code, report = examine("--out", "s3://nobody-made-this-bucket/run")
    assert (code, failures(report)) == (5, ["storage"])
    assert "s3://nobody-made-this-bucket/run" in report["storage"][0]
    assert "there is no such bucket" in report["storage"][0]


@pytest.mark.usefixtures("fresh_clients", "s3_server")
def test_an_endpoint_that_is_down_is_told_once_and_hides_nothing_else(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    code, report = examine("--out", "s3://bucket/run")
    assert (code, failures(report)) == (5, ["endpoint"])
    assert report["endpoint"][0].startswith(f"FAIL {url} does not answer: ")
    assert (
        "Connection refused" in report["endpoint"][0]
        and "AWS_ENDPOINT_URL" in report["endpoint"][0]
    )
    assert report["storage"] == ["skipped needs endpoint"]
    assert len(report["data"]) == 4


@pytest.mark.usefixtures("fresh_clients")
def test_a_store_that_ignores_conditions_fails_unless_that_is_accepted(
    examine: Examine, s3_server: S3Uri, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyS3(s3_endpoint) as server:
        server.ignores_conditions = True
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        code, report = examine("--out", s3_server())
        accepted = examine("--out", s3_server(), "--allow-unsafe-commits")
    assert (code, failures(report)) == (5, ["commits"])
    assert "does not keep conditional writes" in report["commits"][0]
    assert accepted[0] == 0
    assert accepted[1]["commits"][0].startswith("warning ")


def test_a_folder_that_cannot_be_written_fails(examine: Examine, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=4m,ro") as disk:
        code, report = examine("--out", str(disk / "run"))
    assert (code, failures(report)) == (5, ["storage"])
    assert "Read-only file system" in report["storage"][0]


def test_a_disk_with_too_little_room_fails_before_it_is_full(
    examine: Examine, tmp_path: Path
) -> None:
    with mounted(tmp_path / "disk", "size=100k") as disk:
        code, report = examine("--out", str(disk / "run"))
        assert list(disk.iterdir()) == []
    assert (code, failures(report)) == (5, ["plan"])
    assert "102 KB free on the disk of --out -> make room" in report["plan"][-1]
    assert report["speed"] == ["skipped only 102 KB free"]


@pytest.mark.parametrize("write", [write_imagefolder, write_parquet])
def test_a_class_with_fewer_images_than_ipc_fails_and_is_named(
    write: Callable[..., None], examine: Examine, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        write(Store(str(tmp_path / "data")), split)
    options = ("--out", str(tmp_path / "run"), "--data", str(tmp_path / "data"), *SMALL_IMAGES)
    assert examine(*options)[0] == 0
    code, report = examine(*options, "--ipc", "9")
    assert (code, failures(report)) == (4, ["data"])
    assert 'class 0 ("ant") has 8 images, class 1 ("bee") has 8 images' in str(report["data"])
    assert "but ipc is 9 -> lower --ipc, or drop the class" in str(report["data"])


def test_a_class_without_any_image_fails(examine: Examine, tmp_path: Path) -> None:
    data = Store(str(tmp_path / "data"))
    for split in ("train", "val"):
        write_parquet(data, split, names=("ant", "bee", "cat", "dog"))
    code, report = examine("--out", str(tmp_path / "run"), "--data", data.uri, *SMALL_IMAGES)
    assert (code, failures(report)) == (4, ["data"])
    assert 'FAIL train: class 3 ("dog") has 0 images, but ipc is 4' in str(report["data"])
    assert 'warning val: class 3 ("dog") has 0 images' in str(report["data"])


def test_bad_images_of_a_sample_are_counted_and_the_first_is_named(
    examine: Examine, tmp_path: Path
) -> None:
    data = Store(str(tmp_path / "data"))
    for split in ("train", "val"):
        write_webdataset(data, split)
    write_webdataset(data, "train", pngs=[b"no picture"] * 24)
    options = ("--out", str(tmp_path / "run"), "--data", data.uri, *SMALL_IMAGES)
    code, report = examine(*options)
    assert (code, failures(report)) == (4, ["data"])
    assert "FAIL train: 24 of 24 sampled images are bad, first train-000.tar#" in str(
        report["data"]
    )


def test_data_that_is_not_there_fails_and_hides_nothing_else(
    examine: Examine, tmp_path: Path
) -> None:
    code, report = examine(
        "--out", str(tmp_path / "run"), "--data", str(tmp_path / "none"), "--source.format", "auto"
    )
    assert (code, failures(report)) == (4, ["data"])
    assert f"FAIL {tmp_path}/none: expected images, found nothing there" in report["data"][0]
    assert report["commits"][0].startswith("ok ")


@pytest.mark.slow  # the finished run of the session
def test_a_finished_run_passes_and_another_one_on_its_folder_is_refused_by_option(
    examine: Examine, finished_run: FinishedRun, tmp_path: Path
) -> None:
    before = tiny.markers(finished_run.out)
    code, report = examine("--out", str(finished_run.out))
    assert (code, failures(report)) == (0, [])
    assert "in their order, top-1 " in report["teacher"][0]
    assert report["plan"][0] == f"ok units: {', '.join(f'{stage} done' for stage in tiny.STAGES)}"
    code, report = examine("--out", str(finished_run.out), "--recover.iterations", "13")
    assert (code, failures(report)) == (2, ["plan"])
    assert "images was made with recover.iterations=12 (this run asks for 13)" in report["plan"][0]
    assert examine("--out", str(finished_run.out), "--ipc", "5", "--overwrite")[0] == 0
    begun = tiny.copy_rooms(finished_run.out, tmp_path / "begun", "teacher")
    (begun / "teacher" / "stage.json").unlink()
    (begun / "teacher" / "units" / "teacher.json").unlink()
    code, report = examine("--out", str(begun), "--squeeze.epochs", "4")
    assert code == 2 and "teacher was made with squeeze.epochs=3" in report["plan"][0]
    assert tiny.markers(finished_run.out) == before


@pytest.mark.slow  # the finished run of the session
def test_a_teacher_with_its_classes_in_another_order_fails(
    examine: Examine, finished_run: FinishedRun, tmp_path: Path
) -> None:
    teacher = read_teacher(Room(Store(str(finished_run.out)), "teacher"))
    given = tmp_path / "given.safetensors"
    options = ("--out", str(tmp_path / "run"), "--teacher", str(given))
    given.write_bytes(save(teacher.weights))
    assert examine(*options)[0] == 0
    weights = dict(teacher.weights)
    last = list(weights)[-2:]
    assert weights[last[0]].shape[0] == 10
    for name in last:
        weights[name] = weights[name][[1, 0, *range(2, 10)]].copy()
    given.write_bytes(save(weights))
    code, report = examine(*options)
    assert (code, failures(report)) == (4, ["teacher"])
    assert "its classes are in another order than the data's: 2 of 10" in report["teacher"][0]


def test_a_cluster_that_is_not_there_fails_in_seconds(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    code, report = examine("--out", str(tmp_path / "run"), cluster=True)
    assert (code, failures(report)) == (2, ["cluster"])
    assert report["cluster"][0].startswith(f"FAIL no cluster at RAY_ADDRESS={address}: ")
    assert report["nodes"] == ["skipped needs cluster"]


@pytest.mark.parametrize(
    ("options", "grows", "mark"),
    [
        (("--num-workers", "8"), False, "FAIL"),
        (("--gpus-per-worker", "1", "--num-workers", "1"), False, "FAIL"),
        (("--num-workers", "8"), True, "ok"),
        (("--num-workers", "2"), False, "ok"),
    ],
)
def test_workers_that_can_never_exist_fail_unless_something_adds_nodes(
    options: tuple[str, ...],
    grows: bool,
    mark: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has = {"CPU": 2.0}
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr(cluster, "ray", SimpleNamespace(cluster_resources=lambda: has))
    job = distill.parse(["--out", str(tmp_path), *options])
    found = checks._workers(Visit(job, distill.open_run(job)), has, grows=grows)
    assert (found.mark, bool(found.advice)) == (mark, mark == "FAIL")


def test_a_wrong_option_fails_like_in_the_job(examine: Examine) -> None:
    code, report = examine("--recipe", "nothing")
    assert (code, failures(report)) == (2, ["options"])
    assert "nothing" in report["options"][0]


def test_the_versions_below_the_bounds_fail(
    examine: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A real older package: its metadata, first on the path.
    old = tmp_path / "site" / "ray-2.54.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: ray\nVersion: 2.54.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    code, report = examine("--out", str(tmp_path / "run"))
    assert (code, failures(report)) == (2, ["versions"])
    assert (
        "FAIL ray 2.54.0 (needs >=2.56) -> pip install -r requirements-run.txt"
        in report["versions"][0]
    )
