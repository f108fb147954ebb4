"""assemble: images, labels, weights, class names and teacher as one data set that needs nothing else.

`dataset/manifest.json` names every file with size and checksum and is written last: a reader sees a whole data set
or none.
"""

from __future__ import annotations

from typing import Any

from wmdd_ray.config import READING, DistillConfig
from wmdd_ray.errors import LostRaceError
from wmdd_ray.executors.dispatch import do_each
from wmdd_ray.options import fingerprint_options
from wmdd_ray.product.card import dataset_card
from wmdd_ray.redaction import public
from wmdd_ray.spine.provenance import versions
from wmdd_ray.spine.rooms import Room, StageCommit
from wmdd_ray.spine.run import StageRun, Work
from wmdd_ray.store import documents
from wmdd_ray.units.dataset_files import FileWriter, image_files
from wmdd_ray.units.teacher import TEACHER_KEY, labelers_of

CARD_KEY = "README.md"


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the assembled set depends on."""
    return {"assemble": fingerprint_options(config.assemble)}


def plan(stage: StageRun) -> Work:
    """Return one unit an images file, one a labels file, and one a teacher; known once the labels are."""
    config = stage.config
    num_classes = len(stage.run.source("train").class_names)
    commit = stage.run.room("labels").read_commit()
    size = sum(f.size_bytes for f in commit.files.values()) if commit else 0
    units = [*image_files(config, num_classes), *labelers_of(config), "preview"]
    return Work(
        units=(*units, *(f"labels-{unit}" for unit in commit.units)) if commit else None,
        estimated_bytes=size
        + num_classes * config.ipc * config.source.image_size**2 * config.source.channels // 2,
    )


def work(stage: StageRun) -> dict[str, Any]:
    """Write every file that is not finished, then the manifest."""
    units = plan(stage).units
    assert units is not None, "labels are committed before they are assembled"
    class_names = stage.run.source("train").class_names
    arguments = (
        stage.room,
        *(stage.run.room(r) for r in ("images", "labels", "teacher")),
        class_names,
        stage.config,
    )
    do_each(stage, FileWriter, arguments, units, light=True)
    return _publish(stage, units, class_names)


def _publish(
    stage: StageRun, units: tuple[str, ...], class_names: tuple[str, ...]
) -> dict[str, Any]:
    """Write the card, then the manifest that makes the data set visible."""
    config = stage.config
    markers = stage.room.read_units(units)
    files = [entry for marker in markers.values() for entry in marker.files]
    total = {
        kind: sum(f.size_bytes for f in files if f.key.startswith(kind))
        for kind in ("data/", "labels/", "teacher")
    }
    features = stage.inputs["features"].metrics
    several = stage.inputs["teacher"].metrics.get("teachers_top1", [])[: config.num_labelers]
    source = stage.run.source("train")
    meta = {
        "class_names": list(class_names),
        "image_size": config.source.image_size,
        "channels": config.source.channels,
        "mean": list(config.source.mean),
        "std": list(config.source.std),
        "ipc": config.ipc,
        "num_images": config.ipc * len(class_names),
        "tiles": config.recover.tiles,
        "label_epochs": config.relabel.epochs,
        "labels": {
            name: getattr(config.relabel, name)
            for name in ("labels", "compression", "top_k", "precision", "step", "batch_size")
        },
        "image_bytes": total["data/"],
        "label_bytes": total["labels/"],
        "teacher_bytes": total["teacher"],
        "teacher_top1": stage.inputs["teacher"].metrics["top1"],
        **({"teachers_top1": several} if len(several) > 1 else {}),
        "source": {
            "uri": public(config.data),
            **({} if config.val_fraction is None else {"val_fraction": config.val_fraction}),
            "num_images": features["num_images"],
            "stored_bytes": source.total_bytes,
            "bad_images": len(features["bad_images"]),
        },
        "provenance": {
            "recipe": config.recipe,
            "seed": config.seed,
            "teacher_sha256": next(f.sha256 for f in files if f.key == TEACHER_KEY),
            "options": options_of(config),
            "fingerprints": {name: commit.fingerprint for name, commit in stage.inputs.items()},
            **versions(),
        },
    }
    stage.room.store.put(CARD_KEY, dataset_card(meta, config, None).encode())
    content = documents.encode_manifest(meta, files)
    if not stage.room.store.create(documents.MANIFEST_KEY, content):
        old_meta, old_files = documents.read_manifest(stage.room.store)
        if old_files != files:
            raise LostRaceError(
                f"{stage.room.store.uri} holds another data set's manifest; give each run its own --out"
            )
    return {
        k: meta[k] for k in ("image_bytes", "label_bytes", "teacher_bytes", "num_images", "source")
    }


def options_of(config: DistillConfig) -> dict[str, Any]:
    """Return the options of a run as its set tells them, without places."""
    options = fingerprint_options(config, with_absent=True)
    del options["evaluate"]  # students come later, and may be trained again by others
    told: dict[str, Any] = public(options)
    # Whole, and those of no fingerprint too: whoever follows the set to its real images finds their labels alike.
    told["source"] |= {name: getattr(config.source, name) for name in READING}
    return told


def write_card(run_room: Room, config: DistillConfig, commit: StageCommit) -> None:
    """Write the card again, now with the results of an evaluation."""
    meta, _ = documents.read_manifest(run_room.store)
    run_room.store.put(CARD_KEY, dataset_card(meta, config, commit.metrics["table"]).encode())
