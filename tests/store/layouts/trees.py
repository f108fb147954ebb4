"""Small trees of images, written as paths: the pixels of an image follow from its path, so that they tell which it is."""

from __future__ import annotations

import io
import itertools
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.store.written_sources import NAMES, parquet_of, tar_of
from wmdd_ray.store.filesystem import Store
from wmdd_ray.store.images import encode_png

WNIDS = ("n01443537", "n01629819", "n01641577")
Truth = dict[str, str]  # path of an image -> its class


def each(pattern: str, classes: tuple[str, ...] = NAMES, count: int = 2, first: int = 0) -> Truth:
    """Return the paths of a few images of each class: {c} is the class, {i} a number within it, {n} one over all."""
    numbers = itertools.count(1)
    return {
        pattern.format(c=name, i=i, n=next(numbers)): name
        for name in classes
        for i in range(first, first + count)
    }


def pixels_of(path: str) -> np.ndarray:
    """Return the pixels (8, 8, 1) of the image at a path."""
    generator = np.random.default_rng(zlib.crc32(path.encode()))
    return generator.integers(0, 256, (8, 8, 1), dtype=np.uint8)


def png_of(path: str) -> bytes:
    return encode_png(pixels_of(path))


def lines(truth: Truth, line: str, head: str = "", classes: tuple[str, ...] = NAMES) -> bytes:
    """Return a text file with a line an image: {name} and {stem} of its file, its class {c}, and that one's place {k}."""
    rows = [
        line.format(
            path=path,
            name=path.rpartition("/")[2],
            stem=path.rpartition("/")[2].partition(".")[0],
            c=name,
            k=classes.index(name) if name in classes else -1,
        )
        for path, name in truth.items()
    ]
    return "".join(f"{row}\n" for row in [head] * bool(head) + rows).encode()


def json_lines(truth: Truth, label: str = "label") -> bytes:
    """Return Hugging Face's metadata.jsonl beside the images."""
    rows = [{"file_name": path.rpartition("/")[2], label: name} for path, name in truth.items()]
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def shard(truth: Truth, label: str = "cls", classes: tuple[str, ...] = NAMES) -> bytes:
    """Return a tar with each image and, unless `label` is empty, its class as a number; paths are names of members."""
    members: list[tuple[Any, bytes]] = []
    for path, name in truth.items():
        members.append((path, png_of(path)))
        if label:
            stem = path.rpartition(".")[0]
            members.append((f"{stem}.{label}", b"%d" % classes.index(name)))
    return tar_of(members)


def table(truth: Truth) -> bytes:
    """Return a Parquet file."""
    labels = [NAMES.index(name) for name in truth.values()]
    return parquet_of([png_of(path) for path in truth], labels, NAMES)


def meta_mat(classes: tuple[str, ...]) -> bytes:
    """Return ILSVRC's meta.mat: ids from 1 that are not in the order of names, and a synset that is no leaf."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    rows = [(float(i), name, 0.0) for i, name in enumerate(reversed(classes), 1)]
    synsets = np.array([*rows, (float(len(rows) + 1), "n00001740", 3.0)], dtype=kind)
    sink = io.BytesIO()
    savemat(sink, {"synsets": synsets})
    return sink.getvalue()


@dataclass(frozen=True)
class Case:
    """A layout: what lies there, and what must come out or be said.

    Attributes:
        name: Of the case.
        train: Images with their classes, or the words of the refusal.
        val: The same of the held-out images; None when they are not looked at.
        files: What lies beside the images of both, or instead of them where they are packed.
        packed: Whether `files` holds the images already.
        options: Of SourceConfig.
        at: What is opened, below the folder.
        val_at: Where held-out images are opened by themselves.
        bad: Images that must be named as bad.
        images: More images, which come out in neither.
    """

    name: str
    train: Truth | str
    val: Truth | str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)
    packed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""
    val_at: str | None = None
    bad: int = 0
    images: Truth = field(default_factory=dict)

    def write(self, folder: Path) -> Store:
        store = Store(str(folder))
        for path, content in self.files.items():
            store.put(path, content)
        trees = [tree for tree in (self.train, self.val, self.images) if isinstance(tree, dict)]
        if not self.packed:
            for path in itertools.chain(*trees):
                if path not in self.files:
                    store.put(path, png_of(path))
        return store
