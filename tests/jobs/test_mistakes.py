"""The likeliest mistakes of a user, each made for real, and the whole message that answers it.

A message says what was expected, what came, where, and what to do, without a traceback. In commands and messages HERE is the
test's folder, S3 an empty bucket and GONE a server that is not there; NUMBER and WORD stand for what differs from run to run.
Boxes that the command line's parser draws are compared as the words in them.
"""

# ruff: noqa: E501 - a message is written as it is read
from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import s3fs
import safetensors.numpy
from PIL import Image

from jobs import distill, evaluate, export, prepare, report
from tests.conftest import S3Uri, free_port
from tests.stages import scarcity, tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.executors import streams
from wmdd_ray.store import codecs, retries

JOBS: dict[str, Callable[[list[str]], int]] = {
    "distill": distill.main,
    "evaluate": evaluate.main,
    "export": export.main,
    "prepare": prepare.main,
    "report": report.main,
}
COLOR = "--recipe digits --source.format imagefolder --source.mean 0.5 0.5 0.5 --source.std 0.5 0.5 0.5 --source.channels 3"
SMALL = "--squeeze.network.width 8 --squeeze.epochs 1 --squeeze.min-top1 0.01 --num-workers 0 --out HERE/new"
TINY = " ".join(tiny.OPTIONS)


@dataclass(frozen=True)
class Mistake:
    """What is typed, and how it ends."""

    what: str
    typed: str
    code: int
    message: str
    environment: dict[str, str | None] = field(default_factory=dict)


LOCAL = [
    Mistake(
        "an option that does not exist",
        "distill --recover.iteration 500",
        2,
        "error: --recover.iteration: there is no such option; did you mean --recover.iterations? --help-all shows every option",
    ),
    Mistake(
        "a recipe that does not exist",
        "distill --recipe cifar",
        2,
        "error: --recipe: expected one of digits, fashion_mnist, cifar10, cifar100, imagenette, tiny_imagenet, "
        "imagenet1k, or auto with --data, got 'cifar'",
    ),
    Mistake(
        "images that are not there",
        "distill --data HERE/nowhere --out HERE/new",
        4,
        "error: HERE/nowhere: expected images, found nothing there; check --data and --val-data",
    ),
    Mistake(
        "own images by the recipe of the embedded ones",
        "distill --recipe digits --data HERE/images --out HERE/new",
        4,
        "error: HERE/images: the recipe or --source.format says `digits`, which is embedded and has no files; pass --data digits for "
        "them, or --source.format auto (and the size, channels, mean and std of these images, or the --recipe that is made for them)",
    ),
    Mistake(
        "mean and std of gray images for colored ones",
        "distill --recipe digits --data HERE/images --source.channels 3",
        2,
        "Value error Error parsing config.source: --source.mean: expected 3 values, one a channel of --source.channels, got (0.3053,) "
        "For full helptext, see jobs/distill.py --help",
    ),
    Mistake(
        "a folder without images",
        "distill --recipe imagenette --data HERE/notes --out HERE/new",
        4,
        "error: HERE/notes: expected IDX files (train-images-idx3-ubyte.gz, ...), CIFAR's binary version (data_batch_1.bin, ..., or "
        "cifar-10-binary.tar.gz), WebDataset shards (*.tar), Parquet files "
        "(*.parquet), image folders (CLASS/*.jpg or train/CLASS/*.jpg), a table of paths and labels (labels.csv, train.csv, ...), "
        "found 1 other files (1 x .txt): 'a.txt'; check --data, --val-data and --source.format",
    ),
    Mistake(
        "folders of folders of images",
        "distill --recipe imagenette --data HERE/levels --out HERE/new",
        4,
        "error: HERE/levels: the layout is in doubt: images lie two levels down, in folders such as 'tame/cat', 'wild/ant': the "
        "classes may be the upper 2 or the lower 3 folders; say what is meant by --source.layout '{class}', or by --source.layout "
        "'*/{class}'",
    ),
    Mistake(
        "CIFAR in the version with pickles",
        "distill --recipe cifar10 --data HERE/pickles --out HERE/new",
        4,
        "error: HERE/pickles: expected the binary version of CIFAR, found the python one (cifar-10-batches-py/data_batch_1), whose "
        "pickles can run any code and are never read; take https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz or "
        "cifar-100-binary.tar.gz",
    ),
    Mistake(
        "held-out labels that are numbers, of classes that are words",
        f"distill --data HERE/images/train --val-data HERE/numbers {COLOR} {SMALL}".replace("imagefolder", "auto"),
        4,
        "error: HERE/numbers: image NUMBER.png has label NUMBER, a number, and nothing says which of the 3 classes 'ant', 'bee', "
        "'cat' it means; put classes.txt with the names in label order beside the files, or pass --source.numbers index if numbers "
        "count the training classes in this order (index-from-1: from 1)",
    ),
    Mistake(
        "no held-out images",
        f"distill --data HERE/images/train {COLOR} {SMALL}",
        4,
        "error: HERE/images/train: expected held-out images in folders or files named dev, test, testing, val, valid, validation, "
        "found 'ant/', 'bee/', 'cat/'; pass held-out images as --val-data, or --val-fraction 0.1 to hold out a tenth of each class",
    ),
    Mistake(
        "held-out images of other classes",
        f"distill --data HERE/images/train --val-data HERE/other {COLOR} {SMALL}",
        4,
        "error: HERE/other: expected the 3 training classes, found 1 others: 'dog'; absent: 'cat'; pass held-out images with the "
        "same class names",
    ),
    Mistake(
        "more images a class than the class has",
        f"distill --ipc 10 --data HERE/images {COLOR} {SMALL}",
        4,
        'error: class 0 ("ant") has 2 images but ipc is 10; lower --ipc or drop the class',
    ),
    Mistake(
        "more unreadable images than are allowed",
        f"distill --ipc 1 --source.max-bad-images 1 --data HERE/broken {COLOR} {SMALL}",
        4,
        "error: HERE/broken: 2 images cannot be used, --source.max-bad-images allows 1; repair or remove them, or raise the limit. "
        "The first: train/ant/0.png: expected a JPEG, PNG or WebP image, got 9 bytes that start with b'<!DOCTYP'; train/ant/1.png: "
        "expected a JPEG, PNG or WebP image, got 9 bytes that start with b'<!DOCTYP'",
    ),
    Mistake(
        "a GPU on a machine without",
        f"distill --gpus-per-worker 1 --out HERE/new {TINY}".replace("--num-workers 0", ""),
        2,
        "error: --num-workers NUMBER of --gpus-per-worker 1: this machine has 0 GPUs; lower them, or join a cluster that has more "
        "(RAY_ADDRESS, or ray job submit)",
    ),
    Mistake(
        "more workers than processors",
        f"distill --num-workers 99 --out HERE/new {TINY}".replace("--num-workers 0", ""),
        2,
        "error: --num-workers 99 of --cpus-per-worker 1: this machine has NUMBER CPUs; lower them, or join a cluster that has "
        "more (RAY_ADDRESS, or ray job submit)",
    ),
    Mistake(
        "a teacher of other classes",
        f"distill --teacher HERE/run --data HERE/images {COLOR} {SMALL}",
        4,
        "error: --teacher HERE/run: its 10 classes differ from the data's 3, first at class 0: ('0', '1', '2') against ('ant', "
        "'bee', 'cat'); use the teacher of this data",
    ),
    Mistake(
        "a teacher with its classes in another order",
        f"distill --teacher HERE/reordered.safetensors {SMALL}",
        4,
        "error: HERE/reordered.safetensors: its classes are in another order than the data's: 2 of 10 are exchanged (class 0 "
        '("0") is its class 6, class 6 ("6") is its class 0); its top-1 is NUMBER as it is. Reorder the class names of the data or '
        "the teacher's last layer, or go on as it is by --squeeze.no-check-class-order",
    ),
    Mistake(
        "a teacher whose moments cannot be matched, for it has no BatchNorm",
        f"distill --squeeze.network.arch vit_tiny --executor here {SMALL}",
        2,
        "error: --squeeze.network.arch: expected a teacher with BatchNorm2d layers, whose moments the images are made to match, got "
        "VisionTransformer without any; choose another architecture, or --recover.moments none, which makes images without them",
    ),
    Mistake(
        "weights that torchvision does not have",
        f"distill --teacher torchvision:ResNet18 {SMALL}",
        2,
        "error: --teacher torchvision:ResNet18: no such weights; expected a classifier of torchvision, as resnet18, or its "
        "weights, as ResNet18_Weights.IMAGENET1K_V1; near to it: resnet18, resnet152, resnet101",
    ),
    Mistake(
        "an older run with other options in the way",
        f"distill {TINY} --recover.iterations 13 --out HERE/run",
        2,
        "error: HERE/run/images was made with recover.iterations=12 (this run asks for 13); pass --overwrite to replace this room "
        "and those after it, or another --out to keep both",
    ),
    Mistake(
        "a cluster that is not there",
        "distill --out HERE/new",
        2,
        "error: no cluster at RAY_ADDRESS=GONE: [Errno 111] Connection refused; start its head, or unset RAY_ADDRESS to work on "
        "this machine alone",
        {"RAY_ADDRESS": "GONE"},
    ),
    Mistake(
        "a password in a URI",
        "distill --out s3://key:secret@bucket/run",
        2,
        "error: --out: expected a URI without a password or a query, which would be repeated in logs and files; pass "
        "s3://bucket/prefix, and credentials by a role, AWS_PROFILE or the environment",
    ),
    Mistake(
        "a run where a data set is wanted",
        "export HERE/run --out HERE/new --format imagefolder",
        5,
        "error: no distilled data set at HERE/run: expected manifest.json there; pass HERE/run/dataset, which is the one of this run",
    ),
    Mistake(
        "a data set where a run is wanted",
        "report HERE/run/dataset",
        2,
        "error: HERE/run/dataset: expected the --out of a run (with run.json and a folder a stage), found neither; pass the folder or "
        "URI that `python jobs/distill.py` names, not the dataset/ inside it",
    ),
    Mistake(
        "a data set of which a file is missing",
        "export HERE/incomplete --out HERE/new --format imagefolder",
        5,
        "error: HERE/incomplete/data/WORD.parquet: expected NUMBER bytes with SHA-256 WORD..., found no object; restore the object, "
        "or delete the room that holds it and run the stage again",
    ),
    Mistake(
        "a data set that was changed by hand",
        "evaluate HERE/changed --out HERE/new",
        5,
        "error: HERE/changed/manifest.json: expected a document with the checksum of its content, found another content; "
        "restore the object, or delete the folder that holds it and run the stage again",
    ),
    Mistake(
        "an export into a folder that is in use",
        "export HERE/run/dataset --out HERE/notes --format imagefolder",
        2,
        "error: --out HERE/notes: expected an empty or new folder, or an earlier export, found 1 other files: 'a.txt'; give "
        "another --out",
    ),
    Mistake(
        "nothing to evaluate",
        "evaluate HERE/nowhere",
        4,
        "error: HERE/nowhere: expected a distilled set (a run of jobs/distill.py, its dataset/, or images that somebody else "
        "distilled), found nothing there",
    ),
    Mistake(
        "soft labels of images without a teacher",
        "evaluate HERE/images/train --labels soft",
        2,
        "error: --labels soft: HERE/images/train brings images and classes only; pass --teacher (a run, torchvision:WEIGHTS, "
        "timm:MODEL, or a checkpoint file) for soft labels, or --labels hard",
    ),
    Mistake(
        "nothing to export",
        "export HERE/nowhere --out HERE/new --format webdataset",
        5,
        "error: no distilled data set at HERE/nowhere: expected manifest.json there; pass the dataset/ folder of a finished run",
    ),
    Mistake(
        "nothing to report on",
        "report HERE/nowhere",
        2,
        "error: HERE/nowhere: expected the --out of a run (with run.json and a folder a stage), found neither; pass the folder or URI "
        "that `python jobs/distill.py` names, not the dataset/ inside it",
    ),
    Mistake(
        "nothing to prepare",
        "prepare HERE/nowhere --out HERE/new",
        4,
        "error: HERE/nowhere: expected images, found nothing there; check SOURCE_URI and --val-data",
    ),
    Mistake(
        "class names that are not there",
        "prepare HERE/images --classes HERE/nowhere.txt --out HERE/new",
        2,
        "error: --classes HERE/nowhere.txt: expected a file with class names, found none",
    ),
    Mistake(
        "class names that are too few",
        "prepare HERE/images --classes HERE/table/classes.txt --out HERE/new",
        4,
        "error: HERE/images/train: expected the 1 classes of --classes, found 2 others: 'ant', 'bee'; let the file name every class "
        "of the images, in label order",
    ),
    Mistake(
        "a label outside of the class map",
        "prepare HERE/table --out HERE/new",
        4,
        "error: HERE/table: image b.png has label 'dog', expected one of the 1 classes 'cat'; correct the label or the class names",
    ),
    Mistake(
        "prepared images among the real ones",
        "prepare HERE/images --out HERE/images/prepared",
        2,
        "error: --out HERE/images/prepared: expected a place outside of the images' folder HERE/images, which would hold them twice; "
        "pass another folder",
    ),
]  # fmt: skip

REMOTE = [
    Mistake(
        "a bucket that does not exist",
        "distill --out s3://no-such-bucket/run",
        5,
        "error: cannot read s3://no-such-bucket/run/taken.json: there is no such bucket (The specified bucket does not exist); "
        "create it or correct the URI",
    ),
    Mistake(
        "images in a bucket that does not exist",
        "distill --recipe imagenette --data s3://no-such-bucket/images --out HERE/new",
        5,
        "error: cannot read s3://no-such-bucket/images: When listing objects under key 'images/' in bucket 'no-such-bucket': AWS "
        "Error NO_SUCH_BUCKET during ListObjectsV2 operation: The specified bucket does not exist (Request ID: WORD); create the "
        "bucket or correct the URI",
    ),
    Mistake(
        "no credentials",
        "distill --out S3",
        5,
        "error: cannot read S3/taken.json: no credentials were found (Unable to locate credentials); set AWS_ACCESS_KEY_ID "
        "and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role",
        {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ),
    Mistake(
        "an endpoint where nobody listens",
        "distill --out S3",
        5,
        'error: cannot read S3/taken.json: EndpointConnectionError: Could not connect to the endpoint URL: "http://GONE/WORD/run'
        '/taken.json"; check that the bucket exists, the endpoint and region are right (AWS_ENDPOINT_URL, AWS_REGION) and the '
        "store answers, then run the same command again: finished units are kept",
        {"AWS_ENDPOINT_URL": "http://GONE"},
    ),
    Mistake(
        "the endpoint of another region",
        "distill --out S3",
        5,
        "error: cannot read S3/taken.json: the bucket is in another region ([Errno 22] The authorization header is malformed; the "
        "region 'us-east-1' is wrong; expecting 'eu-central-1'); set AWS_REGION to the bucket's, and AWS_ENDPOINT_URL if it has one",
        {"AWS_ENDPOINT_URL": "http://ELSEWHERE"},
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def here(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what is typed wrongly about."""
    root = tmp_path_factory.mktemp("here")
    for name, count in (("images", 2), ("broken", 3)):
        for split in ("train", "val"):
            for kind in ("ant", "bee", "cat"):
                for index in range(count):
                    draw(root / name / split / kind / f"{index}.png", index)
    for kind in ("ant", "bee", "dog"):
        draw(root / "other" / kind / "0.png", 0)
    for index in range(2):
        (root / "broken/train/ant" / f"{index}.png").write_bytes(b"<!DOCTYPE")
    for kind in ("tame/cat", "wild/ant", "wild/bee"):
        draw(root / "levels" / kind / "0.png", 0)
    (root / "notes").mkdir()
    (root / "notes/a.txt").write_text("no image")
    draw(root / "table/a.png", 0)
    draw(root / "table/b.png", 1)
    (root / "table/labels.csv").write_text("path,label\na.png,cat\nb.png,dog\n")
    (root / "table/classes.txt").write_text("cat\n")
    draw(root / "numbers/0.png", 0)
    draw(root / "numbers/1.png", 1)
    (root / "numbers/labels.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    (root / "pickles/cifar-10-batches-py").mkdir(parents=True)
    (root / "pickles/cifar-10-batches-py/data_batch_1").write_bytes(b"\x80\x02}q\x01.")

    shutil.copytree(finished_run.out, root / "run")
    shutil.copytree(finished_run.out / "dataset", root / "incomplete")
    next((root / "incomplete/data").iterdir()).unlink()
    shutil.copytree(finished_run.out / "dataset", root / "changed")
    manifest = root / "changed/manifest.json"
    manifest.write_text(manifest.read_text().replace('"ipc": 4', '"ipc": 5'))

    found = codecs.decode_teacher((root / "run/teacher/teacher.safetensors").read_bytes())
    order = [6, 1, 2, 3, 4, 5, 0, 7, 8, 9]
    weights = {
        k: np.array(v[order] if v.shape[:1] == (10,) else v) for k, v in found.weights.items()
    }
    safetensors.numpy.save_file(weights, root / "reordered.safetensors")
    return root


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[str]:
    """An S3 of another region than the one that requests are signed for."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            said = (
                b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>The authorization header is malformed; the region "
                b"'us-east-1' is wrong; expecting 'eu-central-1'</Message><Region>eu-central-1</Region></Error>"
            )
            self.send_response(400)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said if self.command == "GET" else b"")

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def make(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Make a mistake and compare how it ends."""

    def made(mistake: Mistake, **places: str) -> None:
        places |= {"HERE": str(here), "GONE": f"127.0.0.1:{free_port()}"}

        def filled(text: str) -> str:
            for name, place in places.items():
                text = text.replace(name, place)
            return text

        for name, value in mistake.environment.items():
            if value is None:
                monkeypatch.delenv(name)
            else:
                monkeypatch.setenv(name, filled(value))
        # As wide as it takes for the parser's boxes to break lines between words only.
        monkeypatch.setenv("COLUMNS", "100")
        job, *arguments = filled(mistake.typed).split()
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *arguments])
        try:
            code = JOBS[job](arguments)
        except SystemExit as ended:  # of the parser of options
            code = ended.code
        said = the_message(capsys.readouterr().err)
        expected = re.escape(filled(mistake.message))
        expected = expected.replace("NUMBER", r"[\d.]+").replace("WORD", r"[\w.-]+")
        assert re.fullmatch(expected, said), f"\nsaid      {said}\nexpected  {mistake.message}"
        assert code == mistake.code
        assert not (here / "new/dataset").exists()
        shutil.rmtree(here / "new", ignore_errors=True)

    return made


def the_message(stderr: str) -> str:
    """Return what was said beside the lines of progress, in one line; a message has one, a box of the parser several."""
    lines = [line.strip("│ ") for line in stderr.splitlines()]
    lines = [line for line in lines if line and not re.match(r"\w+ +\d+/\d+|writing to ", line)]
    if any("─" in line for line in lines):
        lines = [line.strip("╭╮╰╯─ ") for line in lines]
    else:
        assert len(lines) == 1, lines
    return " ".join(" ".join(lines).split())


@pytest.mark.slow
@pytest.mark.parametrize("mistake", LOCAL, ids=[m.what.replace(" ", "_") for m in LOCAL])
def test_a_mistake_is_answered_by_what_to_do(
    mistake: Mistake, make: Callable[..., None], ray_local: None
) -> None:
    make(mistake)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", REMOTE, ids=[m.what.replace(" ", "_") for m in REMOTE])
def test_a_mistake_about_storage_is_answered_by_what_to_do(
    mistake: Mistake,
    make: Callable[..., None],
    s3_server: S3Uri,
    elsewhere: str,
    ray_local: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retries, "WAITS_S", (0.01, 0.01, 0.01))
    s3fs.S3FileSystem.clear_instance_cache()
    make(mistake, S3=s3_server(), ELSEWHERE=elsewhere)
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_a_class_that_is_too_small_is_refused_before_an_image_is_read(
    make: Callable[..., None], ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "embedded", lambda *_: pytest.fail("images are read"))
    make(next(mistake for mistake in LOCAL if "--ipc 10 --data" in mistake.typed))


@pytest.mark.slow
def test_a_full_disk_is_answered_by_what_to_do(
    make: Callable[..., None], ray_local: None, tmp_path: Path
) -> None:
    try:
        with scarcity.small_disk(tmp_path / "disk", size_mb=4) as disk:
            disk.leave(12 << 10)
            make(
                Mistake(
                    "a full disk",
                    f"distill {TINY} --num-workers 0 --out DISK/run",
                    5,
                    "error: cannot create DISK/run/teacher/attempts/teacher.json: [Errno 28] No space left on device; check the free space, the "
                    "permissions and the mount of this disk, then run the same command again: finished units are kept",
                ),
                DISK=str(disk.folder),
            )
    except scarcity.Unavailable as error:
        pytest.skip(str(error))
