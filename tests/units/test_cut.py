"""A held-out part that is cut off the training images: whole, apart, and the same whatever else there is."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from tests.store.written_sources import (
    CONFIG,
    LABELS_N,
    NAMES,
    PNGS,
    WRITERS,
    parquet_of,
    tar_of,
    write_imagefolder,
)
from wmdd_ray.config import DistillConfig
from wmdd_ray.errors import ConfigError
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.parts import rank_of
from wmdd_ray.store.sources import Source, decoded_chunks
from wmdd_ray.store.sources.base import told_counts
from wmdd_ray.store.sources.listing import Split
from wmdd_ray.store.sources.passed import total
from wmdd_ray.units.cut import CutSource, open_split
from wmdd_ray.units.splitting import held_out


def asked(store: Store, fraction: float | None = 0.25) -> DistillConfig:
    return replace(DistillConfig(), data=store.uri, source=CONFIG, val_fraction=fraction)


def keys_of(source: Source) -> set[str]:
    return {key for shard in source.shards(5) for key in shard.keys}


@pytest.mark.parametrize("format", ["imagefolder", "idx", "tar"])
def test_both_parts_hold_every_image_once_with_its_class(format: str, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    if format == "tar":
        members = [(f"{NAMES[y]}/{i}.png", PNGS[i]) for i, y in enumerate(LABELS_N)]
        store.put("set.tar", tar_of(members))
    else:
        WRITERS[format](store)
    whole = open_split(asked(store, None), "train")
    config = asked(store)
    parts = {split: open_split(config, split, whole.class_names) for split in ("train", "val")}
    assert {split: part.num_images for split, part in parts.items()} == {"train": 18, "val": 6}
    assert keys_of(parts["train"]).isdisjoint(keys_of(parts["val"]))
    assert keys_of(parts["train"]) | keys_of(parts["val"]) == keys_of(whole)
    labels = {raw.key: raw.label for s in whole.shards(5) for raw in whole.read_shard(s)}
    for split, part in parts.items():
        worker = pickle.loads(pickle.dumps(part))
        read = [
            (key, label)
            for shard in part.shards(5)
            for chunk in decoded_chunks(worker, shard, CONFIG, 4)
            for key, label in zip(chunk.keys, chunk.labels_N.tolist(), strict=True)
        ]
        assert (
            dict(read) == {key: labels[key] for key in keys_of(part)}
            and len(read) == part.num_images
        )
        assert np.bincount([label for _, label in read]).tolist() == [part.num_images // 3] * 3, (
            split
        )
        assert [raw.key for raw in worker.read_keys(sorted(keys_of(part)))] == sorted(keys_of(part))


@pytest.mark.parametrize("is_nested", [True, False])
def test_tars_of_classes_are_cut_a_class_at_a_time(is_nested: bool, tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    tars = [
        (
            f"{name}.tar",
            tar_of([(f"{name}_{i}.png", PNGS[i]) for i in np.flatnonzero(y == LABELS_N)]),
        )
        for y, name in enumerate(NAMES)
    ]
    for name, content in [("set.tar", tar_of(tars))] if is_nested else tars:
        store.put(name, content)
    whole = open_split(asked(store, None), "train")
    labels = {raw.key: raw.label for s in whole.shards(5) for raw in whole.read_shard(s)}
    assert sorted(labels.values()) == sorted(LABELS_N.tolist())
    read = {}
    for split, number in (("train", 6), ("val", 2)):
        part = open_split(asked(store), cast(Split, split), whole.class_names)
        worker = pickle.loads(pickle.dumps(part))
        images = [raw for shard in part.shards(5) for raw in worker.read_shard(shard)]
        assert np.bincount([raw.label for raw in images]).tolist() == [number] * 3
        assert part.num_images == len(images)
        read |= {raw.key: raw.label for raw in images}
    assert read == labels


def test_those_of_the_lowest_ranks_are_held_out_as_prepare_does(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_imagefolder(store)
    whole = open_split(asked(store, None), "train")
    rows = [
        (key, shard.labels[0]) for shard in whole.shards(99) for key in shard.keys if shard.labels
    ]
    ranks_N = np.array([rank_of(0, key) for key, _ in rows], dtype=np.uint64)
    mask_N = held_out(np.array([label for _, label in rows]), ranks_N, 0.25)
    expected = {key for (key, _), held in zip(rows, mask_N, strict=True) if held}
    assert keys_of(open_split(asked(store), "val")) == expected


def test_the_parts_and_other_shares_have_other_fingerprints_and_the_same_one_the_same(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    write_imagefolder(store)
    prints = [
        open_split(config, split).fingerprint()
        for config in (asked(store), asked(store, 0.5))
        for split in ("train", "val")
    ]
    assert len({*prints, open_split(asked(store, None), "train").fingerprint()}) == 5
    assert open_split(asked(store), "train").fingerprint() == prints[0]
    store.put(f"train/{NAMES[0]}/new.png", store.get(f"train/{NAMES[0]}/000.png"))
    assert open_split(asked(store), "train").fingerprint() != prints[0]


def test_the_account_of_files_has_the_other_part_as_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    write_imagefolder(store)
    told = told_counts(open_split(asked(store), "train"), 18, 0)
    assert (
        told.startswith("24 files seen = 18 read + 6 passed over (")
        or "24 files seen = 18 read + 6" in told
    )
    assert "of another split" in told


def test_rows_of_parquet_are_cut_with_those_that_have_no_label_among_the_training_images(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    labels = [None, *LABELS_N[1:12].tolist()]
    store.put("a.parquet", parquet_of(PNGS[:12], labels, NAMES))
    store.put("b.parquet", parquet_of(PNGS[12:], LABELS_N[12:].tolist(), NAMES))
    read: dict[str, int] = {}
    for split, expected, bad in (("train", 17, 1), ("val", 6, 0)):
        part = open_split(asked(store), cast(Split, split), NAMES)
        worker = pickle.loads(pickle.dumps(part))
        shards = part.shards(4)
        chunks = [c for shard in shards for c in decoded_chunks(worker, shard, CONFIG, 4)]
        of_part = {k: y for c in chunks for k, y in zip(c.keys, c.labels_N.tolist(), strict=True)}
        assert (len(of_part), sum(len(c.bad) for c in chunks)) == (expected, bad)
        assert part.num_images == expected + bad == sum(s.num_images or 0 for s in shards)
        # The rows of both files = images + bad + those of the other part.
        assert expected + bad + total(group for c in chunks for group in c.passed) == 24
        assert read.keys().isdisjoint(of_part)
        read |= of_part
    rows = {f"a.parquet#{i}": LABELS_N[i] for i in range(1, 12)}
    assert read == rows | {f"b.parquet#{i}": LABELS_N[12 + i] for i in range(12)}


def test_samples_of_tar_shards_are_cut_a_class_at_a_time_and_bad_ones_stay_among_the_training_images(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    for shard, rows in (("a", range(12)), ("b", range(12, 24))):
        members = [
            (f"{i:03d}.{ending}", content)
            for i in rows
            for ending, content in (("png", PNGS[i]), ("cls", b"%d" % LABELS_N[i]))
        ]
        # A key that comes twice is a bad sample, of the same name as its like.
        members += [("003.png", PNGS[3]), ("x.cls", b"1"), ("003.png", PNGS[3]), ("LICENSE", b"")]
        store.put(f"{shard}.tar", tar_of(members))
    store.put("classes.txt", "\n".join(NAMES).encode())
    whole = open_split(asked(store, None), "train")
    labels = {
        raw.key: raw.label for s in whole.shards(9) for raw in whole.read_shard(s) if raw.label >= 0
    }
    ranks_N = np.array([rank_of(0, key) for key in labels], dtype=np.uint64)
    mask_N = held_out(np.array([*labels.values()]), ranks_N, 0.25)
    assert mask_N.sum() == 6
    read: dict[str, int] = {}
    for split, expected, bad in (("train", 18, 6), ("val", 6, 0)):
        part = open_split(asked(store), cast(Split, split), NAMES)
        worker = pickle.loads(pickle.dumps(part))
        chunks = [c for s in part.shards(4) for c in decoded_chunks(worker, s, CONFIG, 4)]
        of_part = {k: y for c in chunks for k, y in zip(c.keys, c.labels_N.tolist(), strict=True)}
        assert of_part.keys() == {
            key for key, held in zip(labels, mask_N, strict=True) if held == (split == "val")
        }
        assert [raw.label for raw in worker.read_keys([*of_part])] == [*of_part.values()]
        assert sum(len(c.bad) for c in chunks) == bad
        # The plan counts the units by these.
        assert part.num_images == expected + bad == sum(s.num_images or 0 for s in part.shards(4))
        # The samples and other members of both shards = images + bad + those of the other part + the licenses.
        assert expected + bad + total(group for c in chunks for group in c.passed) == 24 + 6 + 2
        read |= of_part
    assert read == labels


def test_a_share_beside_held_out_images_is_refused() -> None:
    with pytest.raises(ConfigError, match="--val-fraction: expected none beside --val-data"):
        DistillConfig(val_data="x", val_fraction=0.1)


def test_a_source_that_brings_held_out_images_is_read_as_it_is_without_a_share(
    tmp_path: Path,
) -> None:
    store = Store(str(tmp_path))
    for split in ("train", "val"):
        write_imagefolder(store, split)
    config = asked(store, None)
    assert open_split(config, "val", NAMES).num_images == 24
    assert not isinstance(open_split(config, "train"), CutSource)
