"""The page about a run: what it says, and that a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from jobs import distill, report
from tests.browser import Browser, browser
from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.config import DistillConfig
from wmdd_ray.errors import ArtifactError
from wmdd_ray.product.pages import page
from wmdd_ray.product.pages.classes import PICTURE_BYTES, chosen_labels, shown_classes
from wmdd_ray.product.pages.facts import classes, config_of, read_run
from wmdd_ray.product.pages.projection import project
from wmdd_ray.product.pages.thumbnails import fit, thumbnail
from wmdd_ray.product.pages.timeline import Axis, Bar, Timeline, lanes, timeline_of
from wmdd_ray.product.tables import size
from wmdd_ray.recipes import recipe_of
from wmdd_ray.records import Barycenter, ClassBarycenter, ClassFeatures, ClassImages, Moments
from wmdd_ray.spine.rooms import Room, StageCommit, UnitMarker
from wmdd_ray.stages.pipeline import PIPELINE
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.sources import RawImage

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def copy_of(run: FinishedRun, out: Path, *but: str) -> Path:
    """Return a copy of a finished run without some of its rooms or files."""
    shutil.copytree(run.out, out)
    for name in but:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return out


def written(out: Path, *options: str) -> Path:
    """Return the page that the command writes for a run."""
    assert report.main([str(out), *options]) == 0
    return out / "report.html"


def text_of(path: Path) -> str:
    """Return the words of a page, without what scripts add."""
    content = re.sub(r"<(script|style).*?</\1>", "", path.read_text(), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", content).split())


def facts_in(path: Path) -> dict[str, Any]:
    """Return the data of a page's charts."""
    found = re.search(r'id="facts">(.*?)</script>', path.read_text(), flags=re.DOTALL)
    assert found is not None
    facts: dict[str, Any] = json.loads(found[1])
    return facts


# In a browser ----------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (420, "dark")])
def test_the_page_of_a_finished_run_is_drawn_whole_by_a_browser(
    window: Browser, finished_run: FinishedRun, width: int, scheme: str
) -> None:
    window.resize(width, 900)
    window.prefer(scheme)
    window.open(finished_run.out / "report.html")
    assert window.complaints() == []
    images = window.ask("[...document.images].map((i) => [i.complete, i.naturalWidth])")
    # A row of 4 a class, and of one class each image beside its start.
    assert images == [[True, 16]] * (10 * 4 + 4 * 2)
    charts = window.ask(
        "[...document.querySelectorAll('.chart')].map((c) => [c.id, c.querySelectorAll('.trace, .point').length > 0])"
    )
    assert charts == [
        [f"chart-{name}", True]
        for name in ("accuracy", "projection", "curves", "weights", "cost", "bytes", "time")
    ]
    assert window.ask("document.documentElement.scrollWidth") == width, "it scrolls sideways"
    assert window.ask("document.querySelector('.absent:not([hidden])')") is None
    with Image.open(io.BytesIO(window.screenshot(whole=True))) as shot:
        pixels = np.asarray(shot.convert("L")).astype(int)
    assert pixels.shape[1] == width and pixels.shape[0] > 2000
    # Every part of it has something on it, on a ground of the scheme that was asked for.
    for part in np.array_split(pixels, 8):
        assert np.ptp(part) > 100
    assert (np.median(pixels) > 200) == (scheme == "light")


@slow
def test_pickers_buttons_and_pictures_do_what_they_say(
    window: Browser, finished_run: FinishedRun
) -> None:
    window.resize(1400, 900)
    window.prefer("light")
    window.open(finished_run.out / "report.html")
    facts = facts_in(finished_run.out / "report.html")

    def seen() -> tuple[str, list[str], list[float]]:
        wall = window.ask("[...document.querySelectorAll('#wall .card img')].map((i) => i.src)")
        atoms = window.ask("document.getElementById('chart-projection').data[2].x")
        return window.ask("document.getElementById('picker').value"), wall, atoms

    def expected(label: int) -> tuple[str, list[str], list[float]]:
        one = facts["shown"][label]
        wall = [image[kind] for image in one["images"] for kind in ("distilled", "real")]
        return str(label), wall, one["projection"]["atoms"][0]

    assert seen() == expected(0)
    window.do(
        "const p = document.getElementById('picker'); p.value = '7'; p.dispatchEvent(new Event('change'))"
    )
    assert seen() == expected(7)
    window.click("#after")
    assert seen() == expected(8)
    window.click("#before")
    window.click("#before")
    assert seen() == expected(6)
    window.click("#sheet .row:nth-child(3)")
    assert seen() == expected(2)
    window.click("#wall .card:nth-child(2)")
    assert window.ask("document.getElementById('zoom').open")
    shown = window.ask("[...document.querySelectorAll('#zoom img')].map((i) => i.src)")
    assert shown == expected(2)[1][2:4]
    assert window.ask("document.querySelector('#zoom img').getBoundingClientRect().width") > 200
    window.click("#zoom-close")
    width = "document.querySelector('#wall img').getBoundingClientRect().width"
    small = window.ask(width)
    window.do(
        "const s = document.getElementById('size'); s.value = 160; s.dispatchEvent(new Event('input'))"
    )
    assert (small, window.ask(width)) == (72, 160)
    ground = "getComputedStyle(document.body).backgroundColor"
    before = window.ask(ground)
    window.click("#theme")
    assert window.ask(ground) != before
    assert window.complaints() == []


@slow
@pytest.mark.parametrize(
    ("rooms", "said", "drawn"),
    [
        (
            ("evaluation",),
            "6 of 7 stages finished, not evaluate",
            ["projection", "curves", "weights", "cost", "bytes", "time"],
        ),
        (
            ("images", "labels", "dataset", "evaluation"),
            "3 of 7 stages finished, not recover, relabel, assemble, evaluate",
            ["projection", "weights", "cost", "time"],
        ),
        (tiny.ROOMS[1:], "1 of 7 stages finished", ["time"]),
    ],
)
def test_an_unfinished_run_has_a_page_that_says_what_is_missing(
    window: Browser,
    finished_run: FinishedRun,
    tmp_path: Path,
    rooms: tuple[str, ...],
    said: str,
    drawn: list[str],
) -> None:
    path = written(copy_of(finished_run, tmp_path / "run", *rooms))
    assert said in text_of(path)
    assert "Nothing to show yet: the stage evaluate is not begun" in text_of(path)
    window.resize(1000, 800)
    window.open(path)
    assert window.complaints() == []
    charts = window.ask(
        "[...document.querySelectorAll('.chart')].filter((c) => c.querySelector('.trace, .point')).map((c) => c.id)"
    )
    assert charts == [f"chart-{name}" for name in drawn]
    assert all(window.ask("[...document.images].map((i) => i.complete && i.naturalWidth > 0)"))


def test_classes_that_only_some_rooms_know_are_shown_by_number(finished_run: FinishedRun) -> None:
    facts = read_run(Store(str(finished_run.out)), PIPELINE, None)
    known = facts.class_names
    facts.class_names = known[:2]
    assert [one["name"] for one in classes(facts)][1:4] == [known[1], "class 2", "class 3"]


@slow
def test_class_names_are_text_wherever_they_stand(
    window: Browser, finished_run: FinishedRun, tmp_path: Path
) -> None:
    facts = read_run(Store(str(finished_run.out)), PIPELINE, None)
    evil = "</script><img src=x onerror='window.hit=1'><b>猫"
    facts.class_names = (evil, facts.class_names[1], "lone \ud800", *facts.class_names[3:])
    facts.stages["assemble"] = replace(facts.stages["assemble"], commit=None)
    shown, _ = shown_classes(facts, None, [0, 1])
    path = tmp_path / "report.html"
    path.write_bytes(page.render(facts, shown, [f"{evil} is missing"]))
    window.open(path)
    assert window.complaints() == []
    assert window.ask("window.hit") is None
    names = window.ask("[...document.querySelectorAll('#picker option')].map((o) => o.textContent)")
    assert names == [evil, facts.class_names[1]]
    assert evil in window.ask("document.querySelector('.missing').textContent")
    assert window.ask("document.querySelector('#costs td').textContent") == evil


@slow
def test_every_term_of_the_loss_has_a_curve(
    window: Browser, finished_run: FinishedRun, tmp_path: Path
) -> None:
    facts = read_run(Store(str(finished_run.out)), PIPELINE, None)
    shown, _ = shown_classes(facts, None, [0])
    terms = shown[0]["curves"]["terms"]
    terms |= {"anchor": terms["bn"], "new_term": terms["bn"]}
    path = tmp_path / "report.html"
    path.write_bytes(page.render(facts, shown, []))
    window.open(path)
    assert window.complaints() == []
    titles = "Object.entries(document.getElementById('chart-curves').layout)"
    titles += ".filter(([k]) => k.startsWith('yaxis')).map(([, a]) => a.title.text)"
    assert window.ask(titles) == ["total", "feature", "moments", "anchors", "new_term"]


ATTACKS = (
    "</script><script>window.hit=1</script>",
    "<img src=x onerror='window.hit=1'>",
    '<a href="https://evil.example/">log in</a>',
)


@slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_foreign_run_says_is_text_wherever_it_stands(
    window: Browser, finished_run: FinishedRun, tmp_path: Path, attack: str
) -> None:
    out = copy_of(finished_run, tmp_path / "run")
    begun = {"run": attack, "stage": attack, "unit": attack, "node": attack, "attempt": attack}
    lines: list[dict[str, Any]] = [
        {"at": "2020-01-01T00:00:00+00:00", "event": "unit_started", **begun},
        {"at": "2020-01-01T00:00:09+00:00", "event": "unit_failed", "reason": attack, **begun},
        {
            "at": "2020-01-01T00:00:10+00:00",
            "event": "run_ended",
            "run": attack,
            "exit_code": attack,
        },
    ]
    (out / "events" / "a-00000.jsonl").write_text("\n".join(map(json.dumps, lines)))
    record = json.loads((out / "run.json").read_text())
    record |= {"hardware": attack, "git_revision": attack, "versions": {attack: attack}}
    record["config"]["data"] = attack
    (out / "run.json").write_text(json.dumps(record))
    facts = read_run(Store(str(out)), PIPELINE, None)
    facts.timeline.sessions[0].exit_code = cast(Any, attack)
    shown, _ = shown_classes(facts, None, [0])
    path = tmp_path / "report.html"
    path.write_bytes(page.render(facts, shown, [attack]))
    window.resize(1400, 900)
    window.open(path)
    assert window.complaints() == []
    assert window.ask("window.hit") is None
    links = "[...document.querySelectorAll('a')].map((a) => a.getAttribute('href') ?? a.getAttribute('xlink:href'))"
    assert {link[0] for link in window.ask(links)} == {"#"}
    assert window.ask("document.querySelectorAll('img[src=x]').length") == 0
    told = "document.getElementById('chart-time').textContent"
    assert attack in window.ask(told), "the name of the stage"
    assert attack in window.ask("document.querySelector('#options').textContent")
    assert f"exit code {attack}" in window.ask("document.querySelector('#time').textContent")


@slow
def test_the_policy_of_the_page_runs_nothing_that_the_page_does_not_bring(
    window: Browser, finished_run: FinishedRun
) -> None:
    window.open(finished_run.out / "report.html")
    assert window.complaints() == []
    policy = "document.querySelector('meta[http-equiv]').content"
    assert "unsafe-inline" not in window.ask(policy).partition("script-src")[2]
    window.do(
        "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.setAttribute('onerror', 'window.hit = 1'); i.src = 'x'; document.body.append(i)"
    )
    assert window.ask("window.hit") is None
    assert len([line for line in window.complaints() if "Content Security Policy" in line]) >= 2


@slow
def test_a_driver_that_was_killed_and_its_unit_show_in_the_chart_of_time(
    window: Browser, finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = copy_of(finished_run, tmp_path / "run")
    lines = [
        {"at": "2020-01-01T00:00:00.000+00:00", "run": "a", "event": "run_started"},
        {
            **{"at": "2020-01-01T00:00:01.000+00:00", "run": "a", "event": "unit_started"},
            **{"stage": "squeeze", "unit": "teacher", "node": "n1", "attempt": 1},
        },
        {"at": "2020-01-01T00:00:31.000+00:00", "run": "a", "event": "stage_started"},
    ]
    (out / "events" / "a-00000.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = written(out)
    assert "2 runs: no end in its log (killed, or still at work); exit code 0." in text_of(path)
    window.resize(1400, 900)
    window.open(path)
    names = window.ask("document.getElementById('chart-time').data.map((t) => t.name)")
    assert {"done", "ended with its driver"} <= set(names)
    told = window.ask("document.getElementById('chart-time').layout.annotations.map((a) => a.text)")
    assert told == ["restart"]
    assert window.complaints() == []


# What is in the page ---------------------------------------------------------------------------


@slow
def test_every_run_ends_with_a_page_and_says_where(finished_run: FinishedRun) -> None:
    path = finished_run.out / "report.html"
    assert f"report          {path}\n" in finished_run.typed.stdout
    assert "warning" not in finished_run.typed.stderr
    said = text_of(path)
    assert "10 classes of digits; all 7 stages finished." in said
    assert "One run, which ended with exit code 0." in said
    facts = facts_in(path)
    assert len(facts["time"]["bars"]) == sum(tiny.UNITS.values())
    for row in facts["accuracy"]:
        assert (len(row["top1"]), row["labels"]) == (2, "soft")
    commit = Room(Store(str(finished_run.out)), "barycenters").committed()
    assert [one["cost"] for one in facts["classes"]] == commit.metrics["cost_per_class"]
    for one in facts["shown"]:
        assert one["curves"]["at"] == list(range(1, 13))
        assert list(one["curves"]["terms"]) == ["bn", "feature", "total"]
        weights = [one["weights"][image["atom"]] for image in one["images"]]
        assert weights == sorted(weights, reverse=True)
        assert all(image["image_distance"] > 0 for image in one["images"])


@slow
def test_the_pictures_of_the_page_are_those_of_the_data_set(finished_run: FinishedRun) -> None:
    facts = facts_in(finished_run.out / "report.html")
    content = (finished_run.out / "images" / "classes" / "00003.safetensors").read_bytes()
    stored = codecs.decode_class_images(content).images_KHWC
    for image in facts["shown"][3]["images"]:
        _, _, packed = image["distilled"].partition("base64,")
        with Image.open(io.BytesIO(base64.b64decode(packed))) as picture:
            np.testing.assert_array_equal(np.asarray(picture), stored[image["atom"], :, :, 0])


@slow
def test_the_page_asks_the_network_for_nothing(finished_run: FinishedRun) -> None:
    content = (finished_run.out / "report.html").read_text()
    assert "default-src 'none'; img-src data: blob:;" in unescape(content)
    own = re.sub(r'<script type="text/plain" id="plotly">.*?</script>', "", content, flags=re.S)
    assert re.findall(r"(?:src|href)=[\"'](?!data:|#)([^\"']*)", own) == ["dataset/README.md"]
    assert re.findall(r"https?://|@import|url\(", own) == []


@slow
def test_the_page_says_how_the_set_is_made_and_used(finished_run: FinishedRun) -> None:
    out = finished_run.out
    content = unescape((out / "report.html").read_text())
    assert '<a href="dataset/README.md">' in content and (out / "dataset" / "README.md").exists()
    snippet = re.search(r'<pre id="snippet"><code>(.*?)</code>', content, re.S)
    command = re.search(r'<pre id="command"><code>(.*?)</code>', content, re.S)
    assert snippet is not None and command is not None
    seen: list[Any] = []
    exec(snippet[1].replace("...", "seen.append(len(view))"), {"seen": seen})
    assert sum(seen) == 40 * 6 and max(seen) <= 25  # 40 images, 6 label epochs
    words = shlex.split(command[1].replace("\\\n", " "))
    assert words[:2] == ["python", "jobs/distill.py"]
    job = distill.parse(words[2:])
    assert job.out == str(out)
    assert job.config == read_run(Store(str(out)), PIPELINE, None).config
    made = read_run(Store(str(out)), PIPELINE, None).metrics("assemble")
    sizes = [size(made[f"{part}_bytes"]) for part in ("image", "label", "teacher")]
    assert "{} images + {} labels + {} teacher; real set".format(*sizes) in text_of(
        out / "report.html"
    )


@pytest.mark.parametrize(
    "event",
    [
        {"event": "run_ended", "exit_code": "0; rm"},
        {"event": "unit_done", "stage": "s", "unit": "u", "seconds": "long"},
        {"event": "unit_done", "stage": ["s"], "unit": {"u": 1}, "seconds": 1e300},
        {"event": "unit_started", "stage": "s", "unit": "u", "attempt": "many"},
        {"event": ["unit_started"]},
    ],
)
def test_events_of_other_types_than_ours_are_read_as_far_as_they_make_sense(
    event: dict[str, Any],
) -> None:
    told = timeline_of([{"at": "2026-01-01T00:00:00+00:00", "run": "r", **event}], {})
    assert all(isinstance(s.exit_code, int | None) for s in told.sessions)
    assert all(0 <= bar.end - bar.begin < 1e9 for bar in told.bars)


def test_a_run_whose_record_is_of_another_kind_is_told_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in ("[1]", '{"config": [2]}', '{"config": {"ipc": "<b>"}}', '{"versions": 3}'):
        (tmp_path / "run.json").write_text(content)
        assert report.main([str(tmp_path)]) == 5
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("error: ")


@slow
def test_real_images_that_are_gone_or_others_are_told_and_the_rest_is_shown(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = copy_of(finished_run, tmp_path / "run")
    record = json.loads((out / "run.json").read_text())
    record["config"]["data"] = str(tmp_path / "gone")
    (out / "run.json").write_text(json.dumps(record))
    path = written(out)
    assert "Real images, which are not read where the run read them" in text_of(path)
    assert all(list(i) >= ["atom"] for one in facts_in(path)["shown"] for i in one["images"])
    assert not any("real" in i for one in facts_in(path)["shown"] for i in one["images"])
    assert any(
        "real" in i for i in facts_in(written(out, "--data", "digits"))["shown"][0]["images"]
    )
    commit = json.loads((out / "features" / "stage.json").read_text())
    other = SimpleNamespace(fingerprint=lambda: "other")
    content = report.page_of(Store(str(out)), source=cast(Any, other))
    assert commit["inputs"]["data"] != "other"
    assert b"are not the ones that the features were made from" in content


@slow
def test_rooms_that_do_not_belong_together_are_told(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = copy_of(finished_run, tmp_path / "run")
    room = Room(Store(str(out)), "features")
    commit = room.committed()
    (out / "features" / "stage.json").unlink()
    assert room.commit(replace(commit, fingerprint="0123456789abcdef"))
    said = text_of(written(out))
    assert "barycenters/ was made from another version of features/" in said


@slow
def test_a_page_that_cannot_be_written_ends_no_run_that_is_done(
    finished_run: FinishedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> bytes:
        raise ArtifactError("the disk is full")

    monkeypatch.setattr(report, "page_of", fail)
    before = (finished_run.out / "report.html").read_bytes()
    assert tiny.job(finished_run.out) == 0
    captured = capsys.readouterr()
    assert "report.html was not written (ArtifactError: the disk is full)" in captured.err
    assert "this run took" in captured.out and "report  " not in captured.out
    assert (finished_run.out / "report.html").read_bytes() == before


@slow
def test_the_command_writes_where_it_is_told_and_shows_the_classes_asked_for(
    finished_run: FinishedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "other" / "page.html"
    options = [str(finished_run.out), "--out", str(target), "--classes", "7", "2"]
    assert report.main(options) == 0
    assert capsys.readouterr().out.startswith(f"report          {target} (")
    assert [one["label"] for one in facts_in(target)["shown"]] == [2, 7]
    assert "2 of 10 classes" in text_of(target)
    assert report.main([str(finished_run.out), "--classes", "10"]) == 2
    assert "--classes: expected labels from 0 to 9, got [10]" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == 2
    assert "expected the --out of a run" in capsys.readouterr().err
    assert report.main([str(tmp_path), "--out", "page.txt"]) == 2
    assert "--out: expected a file that ends in .html" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["digits", "imagenet1k"])
def test_a_recorded_configuration_comes_back_whatever_newer_options_it_has(recipe: str) -> None:
    config = recipe_of(recipe, 10)
    record = json.loads(json.dumps(asdict(config)))
    assert config_of(record, "run.json") == config
    record["recover"]["option_of_tomorrow"] = 3
    assert config_of(record, "run.json") == config
    assert config_of({}, "run.json") == DistillConfig()
    record["recover"]["iterations"] = -1
    with pytest.raises(ArtifactError, match="another version of wmdd_ray"):
        config_of(record, "run.json")


# A thousand classes ----------------------------------------------------------------------------


# More than the page has room for.
SIDE = 96


class NoiseSource:
    """Real images that compress as badly as any."""

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        rng = np.random.default_rng(len(keys))
        noise = rng.integers(0, 256, (len(keys), SIDE, SIDE, 3), dtype=np.uint8)
        return [
            RawImage(key=k, label=0, content=pixels) for k, pixels in zip(keys, noise, strict=True)
        ]


def big_run(store: Store, num_classes: int, ipc: int) -> DistillConfig:
    """Commit barycenters of all classes and what is shown of them: features and images of noise."""
    config = recipe_of("imagenet1k", ipc)
    config = replace(config, source=replace(config.source, image_size=SIDE, resize=SIDE))
    rng = np.random.default_rng(0)
    real_ND = rng.normal(size=(150, 64)).astype(np.float32)
    nothing = np.zeros(0)
    moments = Moments(channels_L=(), count_L=nothing, mean_S=nothing, m2_S=nothing)
    keys = tuple(map(str, range(150)))
    pixels = rng.integers(0, 256, (ipc, SIDE, SIDE, 3), dtype=np.uint8)
    weights_K = rng.random(ipc)
    weights_K /= weights_K.sum()
    found = Barycenter(
        **{"atoms_KD": real_ND[:ipc], "weights_K": weights_K, "cost": 1.0},
        **{"cost_history": (1.0,), "num_iters": 1, "converged": True},
    )
    near = {"nearest_keys": keys[:ipc], "whole_keys": keys[:ipc], "random_keys": keys}
    curves = {name: rng.random(200, dtype=np.float32) for name in ("feature", "bn", "total")}
    rooms: dict[str, dict[str, UnitMarker]] = {"features": {}, "barycenters": {}, "images": {}}

    def commit(room: str, unit: str, key: str, content: bytes | None, **metrics: Any) -> None:
        payloads = {} if content is None else {key: content}
        done = Room(store, room).commit_unit(unit, payloads, attempt=1, metrics=metrics)
        rooms[room][unit] = done

    shown = set(chosen_labels(num_classes, ()))
    for label in range(num_classes):
        features = ClassFeatures(label=label, keys=keys, features_ND=real_ND, moments=moments)
        barycenter = ClassBarycenter(
            label=label, num_images=150, barycenter=found, moments=moments, **near
        )
        images = ClassImages(
            **{"label": label, "images_KHWC": pixels, "weights_K": weights_K, "curves": curves},
            **{"curve_at_P": np.arange(200, dtype=np.int32), "features_KD": real_ND[-ipc:]},
        )
        here = label in shown
        key = f"classes/{label:05d}.safetensors"
        unit = f"class-{label:05d}"
        commit("features", unit, key, codecs.encode_class_features(features) if here else None)
        commit(
            *("barycenters", f"{label:05d}", key),
            codecs.encode_class_barycenter(barycenter) if here else None,
            **{"cost": float(label), "num_iters": 3, "converged": True, "num_images": 150},
        )
        commit(
            *("images", f"g{label:05d}", key),
            codecs.encode_class_images(images) if here else None,
            **{"labels": [label], "losses": [{"total": 1.0}]},
        )
    counts = {"class_counts": [150] * num_classes}
    for stage in PIPELINE:
        if stage.room in rooms:
            made = StageCommit(
                **{"stage": stage.name, "version": 1, "fingerprint": stage.room, "options": {}},
                **{"inputs": {}, "units": rooms[stage.room], "metrics": counts, "seconds": 1.0},
                **{"host": "h", "run": "r", "finished": "2026-01-01T00:00:00+00:00"},
            )
            assert Room(store, stage.room).commit(made)
    return config


@slow
def test_a_page_of_1000_classes_of_100_images_stays_below_20_megabytes(tmp_path: Path) -> None:
    store = Store("memory://report-of-many")
    config = big_run(store, 1000, 100)
    facts = read_run(store, PIPELINE, config)
    shown, missing = shown_classes(facts, cast(Any, NoiseSource()), chosen_labels(1000, ()))
    content = page.render(facts, shown, missing)
    store.delete("")
    assert len(content) < 20_000_000
    pictures = [value for one in shown for image in one["images"] for value in image.values()]
    used = sum(len(value) for value in pictures if isinstance(value, str))
    assert PICTURE_BYTES / 3 < used < 1.2 * PICTURE_BYTES
    assert len(shown) == 40 and all(1 <= len(one["images"]) < 100 for one in shown)
    assert shown[0]["label"] == 0 and shown[-1]["label"] == 999
    path = tmp_path / "report.html"
    path.write_bytes(content)
    assert len(facts_in(path)["classes"]) == 1000
    assert "40 of 1000 classes, evenly spread" in text_of(path)
    assert len(facts_in(path)["time"]["bars"]) == 1500
    assert "Left out for brevity" in text_of(path)


def test_pixels_are_given_up_before_images() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    each = len(thumbnail(noise, 224))
    assert fit([noise], 10, 5, 50 * each) == (224, 5)
    side, images = fit([noise], 10, 5, 50 * each - 1)
    assert side < 224 and images == 5
    side, images = fit([noise], 10, 5, 10 * len(thumbnail(noise, 56)))
    assert (side, images) == (56, 1)
    assert fit([], 10, 5, 100) == (224, 5)


# Time ------------------------------------------------------------------------------------------


def event(at_s: float, kind: str, unit: str = "", run: str = "r", **about: Any) -> dict[str, Any]:
    at = f"2026-01-01T{int(at_s) // 3600:02d}:{int(at_s) // 60 % 60:02d}:{at_s % 60:06.3f}+00:00"
    named = {"stage": "recover", "unit": unit} if unit else {}
    return {"at": at, "run": run, "event": kind, **named, **about}


def test_a_bar_is_an_attempt_and_tells_how_it_ended() -> None:
    told = timeline_of(
        [
            event(0, "run_started"),
            event(1, "unit_started", "g0", node="n1"),
            event(1, "unit_started", "g1"),
            event(2, "unit_started", "g2"),
            event(3, "unit_done", "g0"),
            event(4, "unit_retried", "g1", reason="lost"),
            event(5, "unit_started", "g1", attempt=2),
            event(6, "unit_failed", "g1", reason="again"),
            event(7, "unit_done", "x", seconds=0.5),
            event(9, "stage_started"),
        ],
        {},
    )
    found = [(b.unit, b.state, b.end - b.begin, b.attempt, b.reason) for b in told.bars]
    assert found == [
        ("g0", "done", 2.0, 1, ""),
        ("g1", "retried", 3.0, 1, "lost"),
        ("g2", "cut", 7.0, 1, "its driver ended"),
        ("g1", "failed", 1.0, 2, "again"),
        ("x", "done", 0.5, 1, ""),
    ]
    (session,) = told.sessions
    assert (session.ended, session.end - session.begin) == (False, 9.0)


def test_a_straggler_is_slow_among_its_kind() -> None:
    lengths = {"a-0": 10, "a-1": 10, "a-2": 21, "b-0": 100, "b-1": 100, "b-2": 100, "c-0": 500}
    events = [event(0, "unit_started", unit) for unit in lengths]
    events += [
        event(s, "unit_done", unit) for unit, s in sorted(lengths.items(), key=lambda i: i[1])
    ]
    assert [bar.unit for bar in timeline_of(events, {}).bars if bar.state == "slow"] == ["a-2"]


def test_markers_stand_in_for_events_that_a_kill_lost() -> None:
    marker = UnitMarker(
        **{"unit": "g1", "files": (), "metrics": {}, "seconds": 4.0, "host": "h", "run": "r"},
        **{"attempt": 2, "finished": "2026-01-01T00:00:10.000+00:00"},
    )
    events = [event(1, "unit_started", "g0"), event(3, "unit_done", "g0")]
    told = timeline_of(events, {"recover": {"g0": replace(marker, unit="g0"), "g1": marker}})
    assert [(b.unit, b.end - b.begin, b.node) for b in told.bars] == [
        ("g0", 2.0, ""),
        ("g1", 4.0, "h"),
    ]


def test_pauses_between_runs_are_cut_and_work_is_not() -> None:
    told = timeline_of(
        [
            event(0, "run_started", run="a"),
            event(100, "run_ended", run="a", exit_code=143),
            event(5000, "run_started", run="b"),
            event(5200, "run_ended", run="b", exit_code=0),
        ],
        {},
    )
    axis = Axis(told)
    first, second = told.sessions
    assert (first.exit_code, second.exit_code) == (143, 0)
    assert axis(first.begin) == 0 and axis(first.end) == 100
    assert 100 < axis(second.begin) < 110
    assert axis(second.end) - axis(second.begin) == 200 and axis.active_s == 300


def test_bars_of_one_row_do_not_overlap() -> None:
    rng = np.random.default_rng(0)
    begins = np.sort(rng.random(60) * 10)
    bars = [
        Bar(stage=f"s{i % 3}", unit=str(i), node="", attempt=1, begin=b, end=b + rng.random(), state="done")
        for i, b in enumerate(begins.tolist())
    ]  # fmt: skip
    rows, blocks = lanes(bars)
    for row in set(rows):
        own = [bar for bar, r in zip(bars, rows, strict=True) if r == row]
        assert len({bar.stage for bar in own}) == 1
        assert all(a.end <= b.begin + 1e-3 for a, b in zip(own, own[1:], strict=False))
    assert sum(count for _, _, count in blocks) == len(set(rows)) < len(bars)
    assert lanes([]) == ([], []) and Axis(Timeline()).length == 0


# Features --------------------------------------------------------------------------------------


def test_a_projection_is_that_of_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    real_ND = rng.normal(size=(300, 20)) * np.linspace(5, 0.1, 20) + 3
    plane = project(real_ND, real_ND[:4], real_ND[4:6])
    centered = real_ND - real_ND.mean(axis=0)
    _, values, axes = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ axes[:2].T
    for axis in (0, 1):
        found = np.array(plane["real"][axis])
        sign = np.sign(found @ expected[:, axis])
        np.testing.assert_allclose(found, sign * expected[:, axis], atol=0.05)
        np.testing.assert_array_equal(plane["atoms"][axis], found[:4])
        np.testing.assert_array_equal(plane["reached"][axis], found[4:6])
    shares = values[:2] ** 2 / (values**2).sum()
    np.testing.assert_allclose(plane["explained"], shares, atol=2e-3)
    assert project(real_ND, real_ND[:4], None)["reached"] is None


@pytest.mark.parametrize("real_ND", [np.ones((1, 3)), np.ones((9, 3)), np.eye(2, 5)])
def test_a_class_of_one_or_equal_images_has_a_projection_too(real_ND: np.ndarray) -> None:
    plane = project(real_ND, real_ND[:1] + 1, None)
    assert len(plane["real"][0]) == len(real_ND)
    assert np.isfinite([*plane["real"][0], *plane["atoms"][0], *plane["explained"]]).all()


def test_many_real_images_are_shown_by_some_of_them() -> None:
    plane = project(np.random.default_rng(0).normal(size=(9000, 4)), np.zeros((2, 4)), None)
    assert (len(plane["real"][0]), plane["num_real"]) == (400, 9000)


def test_images_keep_their_curves_and_features_in_storage() -> None:
    record = ClassImages(
        label=1,
        images_KHWC=np.zeros((2, 4, 4, 1), dtype=np.uint8),
        weights_K=np.array([0.5, 0.5]),
        losses={"bn": 2.0},
        curves={"bn": np.array([3, 2], dtype=np.float32)},
        curve_at_P=np.array([1, 9], dtype=np.int32),
        features_KD=np.eye(2, 3, dtype=np.float32),
    )
    content = codecs.encode_class_images(record)
    again = codecs.decode_class_images(content)
    np.testing.assert_equal(asdict(again), asdict(record))
    assert codecs.encode_class_images(again) == content
    with pytest.raises(AssertionError, match="curve bn"):
        replace(record, curve_at_P=np.array([1], dtype=np.int32))
    with pytest.raises(AssertionError, match="features_KD"):
        replace(record, features_KD=np.zeros((3, 3), dtype=np.float32))
