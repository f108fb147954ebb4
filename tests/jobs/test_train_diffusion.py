"""The job that trains a small diffusion model: what it leaves, how it goes on after a kill, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from jobs import train_diffusion
from jobs.benches.study.otg import markdown, otg
from wmdd_ray.core.optimizer import State
from wmdd_ray.diffusion import denoising
from wmdd_ray.diffusion.card import read_card
from wmdd_ray.diffusion.model import load_model, new_unet
from wmdd_ray.diffusion.training import Training
from wmdd_ray.errors import ConfigError
from wmdd_ray.spine.checkpoints import Checkpoints

TINY = (
    *("--widths", "8", "--batch-size", "512", "--epochs", "3", "--checkpoint-s", "1e-9"),
    *("--source.image-size", "8", "--source.resize", "8"),
)


def train(out: Path, *more: str) -> int:
    return train_diffusion.main([*TINY, "--out", str(out), *more])


def contents(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_training_that_is_killed_goes_on_and_ends_with_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_diffusion, "_PREVIEW_STEPS", 1)
    assert train(tmp_path / "whole") == 0
    told = capsys.readouterr()
    assert "training    3/3 done" in told.err
    assert f"--recover.diffusion.model {tmp_path / 'whole'}" in told.out

    class Killed(BaseException):
        pass

    store = Checkpoints.maybe

    def kill(self: Checkpoints, get_state: Any) -> None:
        store(self, get_state)
        assert self._pending is not None
        self._pending.result()
        if int(get_state()["epoch"]) == 1:
            raise Killed

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "maybe", kill)
        with pytest.raises(Killed):
            train(out)
    assert any((out / "partial/training").iterdir())
    with pytest.raises(ConfigError, match=r"there is no model_index\.json in it"):
        read_card(str(out))

    begun: list[int] = []
    real = denoising.train_denoiser

    def watched(*arguments: Any, state: State | None, **options: Any) -> None:
        begun.append(-1 if state is None else int(state["epoch"]))
        real(*arguments, state=state, **options)

    monkeypatch.setattr(denoising, "train_denoiser", watched)
    assert train(out) == 0
    assert begun == [1]
    whole, again = contents(tmp_path / "whole"), contents(out)
    assert whole.keys() == again.keys()
    assert [key for key in whole if whole[key] != again[key]] == []
    assert not any(key.startswith("partial/") for key in again)

    assert train(out) == 0
    assert "found whole" in capsys.readouterr().out
    assert train(out, "--seed", "1") == 2
    error = capsys.readouterr().err
    assert "training.seed=0 (this run asks for 1); pass --overwrite" in error
    assert contents(out) == again
    assert train(out, "--seed", "1", "--overwrite") == 0
    assert contents(out)["classes.json"] != again["classes.json"]
    card = load_model(str(out), "cpu").card
    assert (card.class_names, card.null_class) == (tuple("0123456789"), 10)
    told_of = json.loads((out / "classes.json").read_text())
    assert told_of["training"]["seed"] == 1 and told_of["data"] == "digits"


def test_a_folder_with_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert train(tmp_path) == 2
    assert "expected an empty or new folder, or a model of this job" in capsys.readouterr().err
    assert contents(tmp_path) == {"mine.txt": b"keep"}


REFUSED = (
    (2, "--widths: expected at most 4 for 8 pixels", ("--widths", "8", "8", "8", "8", "8")),
    (2, "--widths: expected multiples of 8", ("--widths", "12")),
    (2, "--seed: expected in [0, 9223372036854775808), got -1", ("--seed", "-1")),
    (2, "--checkpoint-s: expected > 0, got -1.0", ("--checkpoint-s", "-1")),
    (2, "--memory-limit-gib: expected a finite number > 0, got nan", ("--memory-limit-gib", "nan")),
    (4, "raise --memory-limit-gib", ("--memory-limit-gib", "1e-9")),
)


def test_what_is_refused_leaves_the_folder_for_the_right_value_and_an_old_model_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_diffusion, "_PREVIEW_STEPS", 1)
    out = tmp_path / "out"
    for code, message, options in REFUSED:
        assert train(out, *options) == code
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert train(out, "--epochs", "1") == 0
    whole = contents(out)
    for code, message, options in REFUSED:
        assert train(out, "--epochs", "2", "--overwrite", *options) == code
        assert message in capsys.readouterr().err
        assert contents(out) == whole


def test_a_network_learns_to_tell_noise_from_images_and_classes_from_each_other() -> None:
    # Two classes of constant images: black and white.
    labels_N = np.arange(64, dtype=np.int64) % 2
    images_NHWC = np.repeat(labels_N * 255, 64).reshape(64, 8, 8, 1).astype(np.uint8)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network, scheduler = new_unet((16,), image_size=8, channels=1, num_classes=2)
    losses: list[float] = []
    denoising.train_denoiser(
        network, scheduler, images_NHWC, labels_N,
        Training(epochs=40, batch_size=16, learning_rate=5e-3, ema_decay=0.9), null_class=2,
        on_epoch=lambda epoch, loss, get_state: losses.append(loss),
    )  # fmt: skip
    assert losses[-1] < 0.3 * losses[0]
    assert not network.training
    x = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2) / 127.5 - 1
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    right_N = torch.from_numpy(labels_N)
    errors = np.zeros(2)
    for level in (500, 700, 900):
        t_N = torch.full((64,), level)
        noisy = scheduler.add_noise(x, noise, t_N)
        with torch.no_grad():
            for kind, classes_N in enumerate((right_N, 1 - right_N)):
                out = network(noisy, t_N, classes_N, return_dict=False)[0]
                errors[kind] += float((out - noise).square().mean())
    right, wrong = errors
    assert right < 0.95 * wrong


def test_a_rate_that_is_too_high_is_told() -> None:
    network, scheduler = new_unet((8,), image_size=8, channels=1, num_classes=2)
    with pytest.raises(ConfigError, match=r"loss of epoch \d+ is nan; lower --learning-rate"):
        denoising.train_denoiser(
            network, scheduler, np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, np.int64),
            Training(epochs=20, batch_size=8, learning_rate=1e30), null_class=2,
        )  # fmt: skip


@pytest.mark.slow
def test_the_bench_chooses_weights_on_training_images_and_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "out": str(tmp_path / "out"), "ipc": 1, "weights": (0.1, 0.2), "influence_weights": (0.3, 0.1),
        "influence_epochs": (0, 1), "influence_latents": 4, "steps": 2, "seeds": 1, "unet_epochs": 1, "unet_widths": (8,),
        "epochs": 1, "teacher_epochs": 1, "result": str(tmp_path / "found.json"),
    }  # fmt: skip
    otg(**options)
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    candidates = {(one["led_by"], one["weight"]): one for one in found["candidates"]}
    means = {which: one["w2_val"]["mean"] for which, one in candidates.items()}
    expected = {"nothing": (0.0,), "otg": (0.1, 0.2), "igd": (0.1, 0.3)}
    assert list(means) == [(name, weight) for name, all_ in expected.items() for weight in all_]
    rows = {row["row"]: row for row in found["rows"]}
    assert list(rows) == ["wmdd", *expected]
    for name, weights in expected.items():
        best = min(weights, key=lambda weight: means[name, weight])
        assert found["chosen"][name] == rows[name]["weight"] == best
        assert rows[name]["w2_val"]["mean"] == means[name, best]
    for one in (*rows.values(), *candidates.values()):
        assert all(len(told["values"]) == 1 for told in one.values() if isinstance(told, dict))
    # Each guidance changes what it is for, against the same noise.
    plain = candidates["nothing", 0.0]
    assert candidates["otg", 0.2]["transport"]["mean"] < plain["transport"]["mean"]
    assert candidates["igd", 0.3]["influence"]["mean"] > plain["influence"]["mean"]
    assert markdown(found) in said
    units = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("units/*.json")}
    otg(**options)
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found["rows"]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("units/*.json")} == units


@pytest.mark.parametrize("option", ["weights", "influence_weights"])
def test_a_weight_of_nothing_is_no_candidate(tmp_path: Path, option: str) -> None:
    said = f"--{option.replace('_', '-')}: expected values above 0"
    wrong: dict[str, Any] = {option: (0.0, 0.1)}
    with pytest.raises(ConfigError, match=said):
        otg(out=str(tmp_path), **wrong)
