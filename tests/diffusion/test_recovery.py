"""Images from a diffusion model: a tiny DiT with a VAE through the recover stage, and every model that is refused."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.config import DiffusionConfig, RecoverConfig
from wmdd_ray.diffusion import recovery, surrogate
from wmdd_ray.diffusion.card import (
    LEVELS_KEY,
    SCHEDULERS,
    ModelCard,
    check_card,
    class_ids_of,
    read_card,
)
from wmdd_ray.diffusion.model import fit_pictures, load_model, new_unet, save_model
from wmdd_ray.diffusion.sampling import SampleTarget, sample_group
from wmdd_ray.errors import ArtifactError, ConfigError, WmddError
from wmdd_ray.recipes import recipe_of
from wmdd_ray.stages import recover
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import images

DIGITS = tuple("0123456789")
OTHERS = ("1", "0", *DIGITS[2:])


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of random weights with the 1000 classes that its pipeline takes for granted; digit d is its class 100 + d."""
    from diffusers.models import AutoencoderKL, DiTTransformer2DModel
    from diffusers.pipelines import DiTPipeline
    from diffusers.schedulers import DDIMScheduler

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, patch_size=4, in_channels=2, out_channels=4, num_layers=1,
        num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=1000,
    )  # fmt: skip
    # The last layer begins at 0, and with it all noise that is predicted.
    torch.nn.init.normal_(transformer.proj_out_2.weight, std=0.5)
    vae = AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4, scaling_factor=0.5,
    )  # fmt: skip
    names = {i: f"thing {i}, word {i}" for i in range(1000)}
    names |= {100 + d: f"a digit, {d}" for d in range(10)}
    folder = tmp_path_factory.mktemp("dit")
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(transformer, vae, scheduler).save_pretrained(folder)
    # The repository on the hub has them there; the pipeline reads them, and does not write them.
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": names}))
    return folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A UNet of random weights, as jobs/train_diffusion.py stores one for the digits."""
    return saved_unet(tmp_path_factory.mktemp("unet"), DIGITS)


def saved_unet(folder: Path, names: tuple[str, ...], seed: int = 0) -> Path:
    torch.manual_seed(seed)
    network, scheduler = new_unet((8,), image_size=16, channels=1, num_classes=10)
    for key, content in save_model(network, scheduler, names, {"data": "digits"}).items():
        Store(str(folder)).put(key, content)
    return folder


def options(model: Path | str, *more: str) -> tuple[str, ...]:
    return (
        *("--until", "recover", "--recover.method", "diffusion"),
        *("--recover.diffusion.model", str(model), "--recover.diffusion.steps", "6"),
        *("--recover.diffusion.ot-weight", "0.2", "--recover.diffusion.real-per-step", "8"),
        *("--recover.diffusion.sinkhorn-iterations", "5", *more),
    )


@pytest.fixture
def before_recover(finished_run: FinishedRun, tmp_path: Path) -> Path:
    rooms = ("teacher", "features", "barycenters")
    return tiny.copy_rooms(finished_run.out, tmp_path / "run", *rooms)


@pytest.mark.slow
@pytest.mark.chaos
def test_a_group_of_a_dit_that_is_killed_goes_on_from_its_step_and_ends_with_the_same_bytes(
    before_recover: Path, dit: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    whole = shutil.copytree(before_recover, before_recover.with_name("whole"))
    assert tiny.job(whole, *options(dit)) == 0
    log = before_recover.with_name("log")
    often = options(dit, "--recover.checkpoint-s", "1e-9")
    killed = tiny.forked(
        before_recover,
        *often,
        ray_address=ray.get_runtime_context().gcs_address,
        die_at_step=15,
        log=log,
    )
    assert killed.exitcode == -signal.SIGKILL, log.read_text()
    assert tiny.markers(before_recover, "images") == {}

    steps: list[str] = []
    count = images.Checkpoints.maybe

    def counted(self: images.Checkpoints, get_state: Any) -> None:
        steps.append(self._folder.split("/")[1])
        count(self, get_state)

    monkeypatch.setattr(images.Checkpoints, "maybe", counted)
    assert tiny.job(before_recover, *often) == 0
    # Four images of six steps each; the first group had come to step 15.
    assert [steps.count(f"g{i:05d}") for i in range(5)] == [24 - 15, 24, 24, 24, 24]
    tiny.assert_same_payloads(before_recover, tiny.payloads(whole), "images")

    made = images.ClassImagesReader(tiny_room(whole)).read(range(10))
    for one in made:
        assert one.images_KHWC.shape == (4, 16, 16, 1)
        np.testing.assert_allclose(one.weights_K, 0.25)
        assert one.curve_at_P is not None and one.curve_at_P.tolist() == [1, 2, 3, 4]
        assert one.losses == {"ot": pytest.approx(float(one.curves["ot"][-1]))}
        assert one.features_KD is not None and np.isfinite(one.features_KD).all()
    assert len({one.images_KHWC.tobytes() for one in made}) == 10


def tiny_room(out: Path) -> Any:
    from wmdd_ray.spine.rooms import Room

    return Room(Store(str(out)), "images")


@pytest.mark.slow
def test_later_stages_take_sampled_images_and_another_model_of_the_same_name_is_noticed(
    before_recover: Path,
    unet: Path,
    ray_local: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine = shutil.copytree(unet, before_recover.with_name("unet"))
    more = options(mine, "--relabel.epochs", "2", "--relabel.epochs-per-unit", "1")
    whole = ("--until", "assemble", *more[2:])
    assert tiny.job(before_recover, *whole) == 0
    assert (before_recover / "dataset/preview.png").exists()
    assert tiny.job(before_recover, *whole) == 0
    assert "recover     5/5 found committed" in capsys.readouterr().err
    saved_unet(mine, DIGITS, seed=1)
    assert tiny.job(before_recover, *whole) == 2
    assert "images was made with recover.model=" in capsys.readouterr().err


INFLUENCE = (
    *(
        "--recover.diffusion.influence-weight",
        "0.2",
        "--recover.diffusion.influence-epochs",
        "0",
        "2",
    ),
    *("--recover.diffusion.influence-latents", "20", "--recover.checkpoint-s", "1e-9"),
)


@pytest.mark.slow
def test_a_surrogate_is_a_unit_before_the_groups_and_both_go_on_where_they_were(
    before_recover: Path, unet: Path, ray_local: None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = shutil.copytree(before_recover, before_recover.with_name("whole"))
    asked = options(unet, *INFLUENCE)
    assert tiny.job(whole, *asked) == 0
    assert "recover     6/6" in capsys.readouterr().err
    commit = tiny_room(whole).committed()
    assert sorted(commit.units) == [*(f"g{i:05d}" for i in range(5)), surrogate.UNIT]
    assert len(commit.units[surrogate.UNIT].metrics["epoch_losses"]) == 2
    plain = shutil.copytree(before_recover, before_recover.with_name("plain"))
    assert tiny.job(plain, *options(unet)) == 0
    led, unled = (
        images.ClassImagesReader(tiny_room(out)).read(range(10)) for out in (whole, plain)
    )
    assert all((a.images_KHWC != b.images_KHWC).any() for a, b in zip(led, unled, strict=True))

    begun: list[int] = []
    train, keep = surrogate.train_surrogate, surrogate.Checkpoints.maybe

    def stopped(*args: Any, on_epoch: Any, **more: Any) -> Any:
        def stop(epoch: int, *rest: Any) -> None:
            begun.append(epoch)
            on_epoch(epoch, *rest)
            if len(begun) == 1:
                raise WmddError("stopped in the training")

        return train(*args, on_epoch=stop, **more)

    def at_once(self: Any, get_state: Any) -> None:
        keep(self, get_state)
        self._pending.result()

    def not_sampled(*args: Any, **more: Any) -> None:
        raise WmddError("stopped before the first group")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surrogate, "train_surrogate", stopped)
        patch.setattr(surrogate.Checkpoints, "maybe", at_once)
        assert tiny.job(before_recover, *asked) != 0
        assert tiny.markers(before_recover, "images") == {}
        patch.setattr(recovery.Sampler, "make", not_sampled)
        assert tiny.job(before_recover, *asked) != 0
        assert list(tiny.markers(before_recover, "images")) == ["images/units/surrogate.json"]
        assert begun == [1, 2]
    said = capsys.readouterr().err
    assert "stopped in the training" in said and "stopped before the first group" in said
    assert tiny.job(before_recover, *asked) == 0
    assert begun == [1, 2], "not trained again"
    tiny.assert_same_payloads(before_recover, tiny.payloads(whole), "images")


def test_images_without_influence_are_not_made_again_because_there_is_such_an_option(
    unet: Path,
) -> None:
    def made_by(*more: str) -> Any:
        return recover.options(tiny.config(*options(unet, *more)))["recover"]["diffusion"]

    assert not [name for name in made_by() if name.startswith("influence")]
    assert made_by(*INFLUENCE[2:]) == made_by()
    led = made_by(*INFLUENCE)
    assert (led["influence_weight"], led["influence_epochs"], led["influence_latents"]) == (
        0.2,
        (0, 2),
        20,
    )


def test_latents_too_small_for_a_surrogate_are_told_before_any_work(unet: Path) -> None:
    small = card(shape_CHW=(1, 4, 4), num_classes=10)
    recovery.checked(small, tiny.config(*options(unet)), DIGITS)
    with pytest.raises(
        ConfigError, match=r"influence-weight: expected 0 for m, whose latents are 4"
    ):
        recovery.checked(small, tiny.config(*options(unet, *INFLUENCE)), DIGITS)


def test_without_guidance_the_images_are_those_of_diffusers_own_pipeline(
    dit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers.pipelines import DiTPipeline
    from diffusers.pipelines.dit import pipeline_dit

    model = load_model(str(dit), "cpu")
    config = DiffusionConfig(model="-", steps=5, eta=0.0, guidance_scale=3.0)
    real = model.encode(np.zeros((1, 16, 16, 1), np.uint8))
    ids = (100, 107)
    starts: list[torch.Tensor] = []

    def predict(x: torch.Tensor, t: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        starts.append(x.clone())
        return model.predict(x, t, classes, guidance_scale=3.0, mixed_precision=False)

    found = sample_group(
        predict, model.scheduler,
        [SampleTarget(label=i, class_id=c, real_MCHW=real) for i, c in enumerate(ids)],
        config, num_images=1, shape_CHW=model.shape_CHW, seed=0, device="cpu",
    )  # fmt: skip
    ours = np.concatenate([model.decode(one.latents_KCHW) for one in found])

    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: starts[0])
    pipeline = DiTPipeline.from_pretrained(dit, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        list(ids), guidance_scale=3.0, num_inference_steps=5, output_type="np"
    ).images  # (N, H, W, C) in [0, 1]
    assert theirs.std() > 0.01
    assert pipeline.get_label_ids(["7"]) == [107]
    np.testing.assert_allclose(ours / 255, theirs, atol=0.51 / 255)


def test_real_images_come_back_from_pixels_and_a_vae_is_asked_for_its_means(
    dit: Path, unet: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 1), dtype=np.uint8)
    plain = load_model(str(unet), "cpu")
    np.testing.assert_array_equal(plain.decode(plain.encode(pixels)), pixels)
    latent = load_model(str(dit), "cpu")
    encoded = latent.encode(pixels)
    assert encoded.shape == (20, 2, 8, 8)
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        means = latent.vae.encode(x).latent_dist.mean
    torch.testing.assert_close(encoded, means * 0.5)


def test_a_model_is_read_from_object_storage(unet: Path) -> None:
    store = Store("memory://models/unet")
    for path in (p for p in unet.rglob("*") if p.is_file()):
        store.put(path.relative_to(unet).as_posix(), path.read_bytes())
    here, there = load_model(str(unet), "cpu"), load_model(store.uri, "cpu")
    assert here.card.identity == there.card.identity
    for one, other in zip(here.network.parameters(), there.network.parameters(), strict=True):
        assert torch.equal(one, other)


def changed(model: Path, tmp_path: Path, part: str) -> Path:
    """Return a copy of a model with one thing wrong."""
    folder = shutil.copytree(model, tmp_path / "model")
    weights = next(folder.glob("*/diffusion_pytorch_model.safetensors"))
    if part == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif part == "no weights":
        weights.unlink()
    elif part == "flipped bit":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif part == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif part == "other kind":
        index = json.loads((folder / "model_index.json").read_text())
        index["text_encoder"], index["unet"] = index["unet"], ["diffusers", "UNet2DConditionModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
    elif part == "latent":
        index = json.loads((folder / "model_index.json").read_text())
        index["vqvae"] = ["diffusers", "VQModel"]
        (folder / "model_index.json").write_text(json.dumps(index))
    elif "=" in part:
        key, _, value = part.partition("=")
        levels = json.loads((folder / LEVELS_KEY).read_text())
        (folder / LEVELS_KEY).write_text(json.dumps(levels | {key: value}))
    elif part.endswith("Scheduler"):
        import diffusers

        getattr(diffusers, part)().save_pretrained(folder / "scheduler")
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", part]
        (folder / "model_index.json").write_text(json.dumps(index))
    elif part == "no scheduler":
        shutil.rmtree(folder / "scheduler")
    elif part == "other shape":
        config = json.loads((folder / "unet/config.json").read_text())
        config["block_out_channels"] = [16]
        (folder / "unet/config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("part", "kind", "message"),
    [
        (
            "pickle",
            ArtifactError,
            r"found \['unet/.*\.bin'\]; weights in other formats are pickles",
        ),
        (
            "no weights",
            ArtifactError,
            "expected unet/diffusion_pytorch_model.safetensors, found no",
        ),
        ("flipped bit", ArtifactError, "expected weights with SHA-256"),
        ("cut", ArtifactError, "expected weights with SHA-256"),
        ("other kind", ConfigError, "expected a pipeline of a DiTTransformer2DModel"),
        ("no scheduler", ConfigError, "there is no scheduler/scheduler_config.json in it"),
        ("other shape", ArtifactError, "its files could not be read"),
        ("latent", ConfigError, r"found \{'vqvae': 'VQModel'\}; .* is not supported"),
        *(
            (
                name,
                ConfigError,
                rf"\(DDIMScheduler, .*found {name} in model_index\.json; .*take another",
            )
            for name in (
                *("CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler"),
                *("ScoreSdeVeScheduler", "EDMEulerScheduler"),
            )
        ),
        (
            "_class_name=FlowMatchEulerDiscreteScheduler",
            ConfigError,
            r"found FlowMatchEulerDiscreteScheduler in scheduler/scheduler_config\.json",
        ),
        (
            "prediction_type=flow_prediction",
            ConfigError,
            r"a prediction_type that DDIM has \(epsilon, sample, v_prediction\), found 'flow_pred",
        ),
        ("beta_schedule=sigmoid", ConfigError, "a beta_schedule that DDIM has .*found 'sigmoid'"),
        ("timestep_type=continuous", ConfigError, "a timestep_type .*found 'continuous'"),
    ],
)
def test_a_model_with_something_wrong_is_refused_by_name(
    unet: Path, tmp_path: Path, part: str, kind: type[Exception], message: str
) -> None:
    folder = changed(unet, tmp_path, part)
    with pytest.raises(kind, match=message) as caught:
        load_model(str(folder), "cpu")
    assert str(folder) in str(caught.value)


# Some of them make arrays of tensors.
@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_ddim_has_the_noise_levels_of_every_scheduler_that_is_taken(
    dit: Path, tmp_path: Path, name: str
) -> None:
    import diffusers

    told: dict[str, Any] = {
        "beta_start": 0.001,
        "beta_end": 0.015,
        "beta_schedule": "scaled_linear",
    }
    theirs = getattr(diffusers, name)(**told, prediction_type="v_prediction")
    folder = changed(dit, tmp_path, name)
    theirs.save_pretrained(folder / "scheduler")
    ours = load_model(str(folder), "cpu").scheduler
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=0, atol=0)
    assert ours.config.prediction_type == "v_prediction"
    # DDIM by itself would clip latents whose scheduler knows of no such thing.
    assert ours.config.clip_sample == theirs.config.get("clip_sample", False)


def test_a_cut_file_of_somebody_elses_model_is_refused(dit: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="its files could not be read .*download or train"):
        load_model(str(changed(dit, tmp_path, "cut")), "cpu")


@pytest.mark.parametrize("name", ["somebody/some-model", "no/such/folder at all"])
def test_a_model_that_is_nowhere_is_told_with_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    real = huggingface_hub.snapshot_download

    def offline(asked: str, **options: Any) -> str:
        if "/" in asked and " " not in asked:
            raise LocalEntryNotFoundError("no connection")
        return real(asked, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError, match=f"{name}: expected the folder, URI or hub name") as told:
        read_card(name)
    assert "jobs/train_diffusion.py makes one" in str(told.value)
    if " " not in name:
        assert f"`hf download {name} --local-dir FOLDER`" in str(told.value)


def test_a_snapshot_of_the_hub_is_known_by_its_commit(
    unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = shutil.copytree(unet, tmp_path / "snapshots/0123abcd")
    asked: list[Any] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_card("somebody/digits").identity == "hub:0123abcd"
    assert load_model("somebody/digits", "cpu").card.num_classes == 10
    assert asked == [
        ("somebody/digits", ["*.json"]),
        ("somebody/digits", ["*.json", "*.safetensors"]),
    ]


def card(**changes: Any) -> ModelCard:
    plain = ModelCard(
        uri="m", kind="unet", image_size=16, channels=1, shape_CHW=(1, 16, 16), num_classes=10, null_class=10,
        class_names=(), ordered=False, train_steps=1000, identity="",
    )  # fmt: skip
    return replace(plain, **changes)


TWICE = card(
    num_classes=4,
    class_names=("Cardigan, Cardigan Welsh corgi", "crane, sandhill crane", "cardigan", "crane"),
)


def test_classes_are_those_that_were_given_or_named_or_as_many(dit: Path) -> None:
    assert class_ids_of(read_card(str(dit)), DIGITS, ()) == tuple(range(100, 110))
    assert class_ids_of(read_card(str(dit)), ("thing 7", "WORD 3"), ()) == (7, 3)
    assert class_ids_of(card(), ("a", "b"), (9, 4)) == (9, 4)
    assert class_ids_of(card(num_classes=2), ("a", "b"), ()) == (0, 1)
    assert class_ids_of(card(num_classes=None, null_class=None), ("a", "b"), ()) == (0, 0)
    mine = card(class_names=DIGITS, ordered=True)
    assert class_ids_of(mine, DIGITS, ()) == tuple(range(10))
    assert class_ids_of(TWICE, ("cardigan", "Cardigan"), ()) == (2, 0)
    assert class_ids_of(TWICE, ("Sandhill Crane", "cardigan welsh CORGI"), ()) == (1, 0)
    assert class_ids_of(replace(TWICE, num_classes=2), ("x", "y"), ()) == (0, 1)


@pytest.mark.parametrize(
    ("found", "names", "given", "message"),
    [
        (
            card(class_names=OTHERS, ordered=True),
            DIGITS,
            (),
            r"first at class 0: \('1', '0', '2'\)",
        ),
        (
            card(class_names=DIGITS, ordered=True),
            DIGITS[:9],
            (),
            "10 against the data's 9, first at",
        ),
        (
            card(num_classes=1000),
            DIGITS,
            (),
            "has 1000 classes and the data 10, .*class-ids 0 217",
        ),
        (
            TWICE,
            ("Cardigan", "crane"),
            (),
            "of whose names 1 .*one class of the model: 'crane'; say",
        ),
        (TWICE, ("CARDIGAN", "x"), (), "of whose names 2 .*: 'CARDIGAN', 'x'; say"),
        (TWICE, ("Cardigan", "Cardigan Welsh corgi", "x", "y"), (), "4 do not each mean one"),
        (
            card(num_classes=3, class_names=("airplane", "bird", "cat")),
            ("cat", "bird", "plane"),
            (),
            "has 3 classes and the data 3, .* 1 do not .*: 'plane'; say",
        ),
        (card(), DIGITS, (1, 2), "expected 10 classes below 10, one a class of the data, got"),
        (card(), ("a", "b"), (1, 10), "expected 2 classes below 10"),
    ],
)
def test_a_model_of_other_classes_is_refused(
    found: ModelCard, names: tuple[str, ...], given: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        class_ids_of(found, names, given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 3}, "it makes pictures of 3 channels, --source.channels is 1"),
        ({"train_steps": 40}, "steps: expected at most the model's 40, got 50"),
        ({"null_class": None}, "guidance-scale: expected 1 for m, which was not trained to do"),
    ],
)
def test_a_model_that_cannot_do_what_is_asked_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    check_card(card(), channels=1, steps=50, guidance_scale=4.0)
    with pytest.raises(ConfigError, match=message):
        check_card(card(**changes), channels=1, steps=50, guidance_scale=4.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("window", (0.5, 0.2)),
        ("eta", 2.0),
        ("class_ids", (1, 1)),
        ("ot_weight", float("nan")),
        ("influence_weight", -1.0),
        ("influence_epochs", ()),
        ("influence_epochs", (0, 5, 5)),
        ("influence_epochs", (-1, 5)),
        ("influence_latents", 0),
        ("regularization", 0.0),
        ("steps", 0),
        ("model", "s3://user:secret@bucket/m"),
    ],
)
def test_options_that_cannot_be_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"--recover\.diffusion\.{option.replace('_', '-')}: "):
        DiffusionConfig(**{option: value})


def test_diffusion_without_a_model_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"--recover\.diffusion\.model: expected .* folder, URI or"
    ):
        RecoverConfig(method="diffusion")


def test_a_dry_run_says_that_the_model_is_of_other_classes_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_unet(tmp_path / "model", OTHERS)
    assert tiny.job(tmp_path / "run", *options(model), "--dry-run") == 2
    assert "it was trained on other classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_recipe_of_imagenette_names_its_classes_among_those_of_imagenet() -> None:
    found = recipe_of("imagenette", 10).recover.diffusion
    dit = card(kind="dit", num_classes=1000, null_class=1000, channels=3, uri=found.model)
    names = tuple(f"n{i:08d}" for i in range(10))
    assert class_ids_of(dit, names, found.class_ids)[-1] == 701
    assert recipe_of("imagenet1k", 10).recover.diffusion.model == "facebook/DiT-XL-2-256"


def test_options_of_inversion_know_nothing_of_diffusion() -> None:
    found = recover.options(tiny.config())["recover"]
    assert "diffusion" not in found and "method" not in found
    assert recover.options(tiny.config("--recover.diffusion.steps", "7"))["recover"] == found


def test_pictures_are_cropped_as_real_ones_are_and_those_of_the_right_size_left_alone() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    fit = partial(fit_pictures, pixels)
    np.testing.assert_array_equal(fit(resize=20, image_size=16), pixels)
    np.testing.assert_array_equal(fit(resize=16, image_size=12), pixels[:, 2:14, 2:14])
    assert fit(resize=32, image_size=28).shape == (2, 28, 28, 3)


@pytest.mark.parametrize(
    ("kind", "part", "key", "value"),
    [
        ("unet", "unet", "sample_size", None),
        ("unet", "unet", "sample_size", [8, 16]),
        ("unet", "unet", "in_channels", "3"),
        ("unet", "unet", "num_class_embeds", -1),
        ("unet", "scheduler", "num_train_timesteps", 1e30),
        ("dit", "transformer", "num_embeds_ada_norm", None),
        ("dit", "vae", "block_out_channels", 2),
    ],
)
def test_numbers_of_a_foreign_model_that_cannot_be_are_named(
    kind: str, part: str, key: str, value: Any, dit: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(dit if kind == "dit" else saved_unet(tmp_path / "unet", DIGITS), model)
    file = model / part / f"{'scheduler_' if part == 'scheduler' else ''}config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=rf"{key} as a .*, found {re.escape(repr(value))}"):
        read_card(str(model))


def test_a_model_that_knows_no_classes_is_sampled_without_any(tmp_path: Path) -> None:
    from diffusers.models import UNet2DModel
    from diffusers.pipelines import DDPMPipeline
    from diffusers.schedulers import DDPMScheduler

    network = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=8,
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), "cpu")
    assert (model.card.num_classes, model.card.null_class) == (None, None)
    x = torch.zeros(2, 1, 8, 8)
    found = [
        model.predict(x, torch.tensor(500), torch.tensor(ids), guidance_scale=1, mixed_precision=m)
        for ids, m in (([0, 0], False), ([3, 4], False), ([0, 0], True))
    ]
    assert torch.equal(found[0], found[1])
    assert found[2].dtype == torch.float32
