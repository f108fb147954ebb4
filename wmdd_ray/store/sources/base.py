"""What every source of real images is: shards, records, keys; shared ways to read and to fail."""

from __future__ import annotations

import abc
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import DataError
from wmdd_ray.store.sources import labels
from wmdd_ray.store.sources.classes import MAX_CLASSES, integer_names, plain
from wmdd_ray.store.sources.files import open_whole, read_ahead, reading, refuse_outside, streamed
from wmdd_ray.store.sources.labels import Label, Places
from wmdd_ray.store.sources.passed import PassedOver, shown_groups, total
from wmdd_ray.store.uris import arrow_filesystem

# The names of 65,536 classes have a tenth of it.
_MAX_BESIDE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One unit of reading; holds all that a worker needs beside the `Source`.

    `keys` names the images of random-access formats; `file` is the tar or Parquet file, relative to the root. `labels` are the
    distinct classes inside, ascending, or None when only reading tells; likewise `num_images`. `sizes` are the bytes of each of
    `keys`, or of `file`, as listed; of a tar inside `file` also where it begins, and its bytes.
    """

    id: str
    file: str = ""
    keys: tuple[str, ...] = ()
    num_images: int | None = None
    labels: tuple[int, ...] | None = None
    sizes: tuple[int, ...] = ()

    @property
    def size_bytes(self) -> int | None:
        """Bytes of `file` as listed; None where nothing is known."""
        return self.sizes[0] if self.file and self.sizes else None

    def written(self) -> str:
        """Return this shard as JSON, to travel in a row."""
        return json.dumps(asdict(self))

    @staticmethod
    def read(text: str) -> Shard:
        """Return the shard that was `written`."""
        fields = json.loads(text)
        labels = fields.pop("labels")
        fields |= {name: tuple(fields[name]) for name in ("keys", "sizes")}
        return Shard(labels=None if labels is None else tuple(labels), **fields)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RawImage:
    """One undecoded record: file bytes, or uint8 pixels; `problem` says why there is neither."""

    key: str
    label: int
    content: bytes | np.ndarray
    problem: str = ""


class Source(abc.ABC):
    """Labelled images under one URI, made on the driver; a pickled copy reads but does not list.

    Attributes:
        root: Absolute URI that file names are relative to.
        config: How the images are read.
        class_names: Name of class `label`, in label order.
        places: Class of each number that the files hold as a label, where it is not that number itself.
        titles: What the classes are called in words, in label order, where a file of the data says so; else empty.
        passed_over: Files under the URI that are not read, in groups. Driver only.
        read_beside: Files that were read for what they say of the images. Driver only.
        passed_inside: Members of the archive that `read_shard` went through last that are no part of an image.
    """

    format: ClassVar[str]
    # What a copy on a worker does without: the listing can be hundreds of megabytes, connections do
    # not travel.
    _transient: ClassVar[tuple[str, ...]] = (
        *("_files", "_filesystem", "_by_name", "titles", "passed_over", "read_beside"),
    )

    def __init__(
        self,
        root: str,
        files: dict[str, int],
        config: SourceConfig,
        class_names: tuple[str, ...] | None = None,
        places: Places = None,
    ) -> None:
        self.root = root
        self.config = config
        # Numbers, until it is known how they are called.
        names = integer_names(MAX_CLASSES) if class_names is None else class_names
        self.name_classes(names, places)
        self.titles: tuple[str, ...] = ()
        self.passed_over: tuple[PassedOver, ...] = ()
        self.read_beside: set[str] = set()
        self.passed_inside: tuple[PassedOver, ...] = ()
        self._files: dict[str, int] | None = files
        self._filesystem: tuple[pafs.FileSystem, str] | None = None

    def name_classes(self, class_names: tuple[str, ...], places: Places) -> None:
        """Say what the classes are, and which of them the numbers in the files mean.

        Raises:
            DataError: There is none, or there are more than soft labels can name.
        """
        if not 1 <= len(class_names) <= MAX_CLASSES:
            raise DataError(
                f"{self.root}: expected 1 to {MAX_CLASSES} classes, found {len(class_names)}"
            )
        self.class_names = class_names
        self.places = places
        # Stay what they are when somebody calls the classes otherwise.
        self._label_names = class_names
        self._by_name: dict[str, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the listing, caches and connections behind."""
        return {
            name: None if name in self._transient else value
            for name, value in self.__dict__.items()
        }

    @property
    def files(self) -> dict[str, int]:
        """Relative name -> bytes of every file that is read, sorted by name. Driver only."""
        assert self._files is not None, "shards and fingerprints are made on the driver and sent"
        return self._files

    @property
    def total_bytes(self) -> int:
        """Bytes of all files as they are stored. Driver only."""
        return sum(self.files.values())

    @property
    @abc.abstractmethod
    def num_images(self) -> int | None:
        """Images, good and bad; None when only reading tells. Driver only."""

    @abc.abstractmethod
    def shards(self, chunk_images: int) -> list[Shard]:
        """Return all shards in a fixed order. Driver only.

        Args:
            chunk_images: Most images of a shard of the random-access formats, which are cut class
                by class; tar and Parquet have one shard a file.
        """

    @abc.abstractmethod
    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        """Yield the records of a shard in a fixed order; memory is bounded by the few in flight.

        Raises:
            DataError: The file is cut or malformed, or a label is outside the classes.
            ArtifactError: The file is gone or cannot be reached.
        """

    @abc.abstractmethod
    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        """Return the records of these keys, in this order, opening every file once.

        Raises:
            DataError: A key names nothing in this source.
            ArtifactError: A file is gone or cannot be reached.
        """

    def fingerprint(self) -> str:
        """Return a SHA-256 over file names, sizes, format and classes: cheap. Driver only."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.format, self.class_names, self._numbering()]).encode())
        for name, size_bytes in sorted(self.files.items()):
            digest.update(json.dumps([name, size_bytes]).encode())
        return digest.hexdigest()

    def _numbering(self) -> object:
        return self.places

    def url(self, file: str) -> str:
        """Return the full URI of a file."""
        return f"{self.root}/{file}"

    def open_random(self, file: str, size_bytes: int | None = None) -> pa.NativeFile:
        """Open a file for reads anywhere in it; it must have the size that was listed, if given."""
        filesystem, path = self._connected()
        return open_whole(filesystem, f"{path}/{file}", self.url(file), size_bytes)

    def open_stream(self, file: str, size_bytes: int | None = None) -> pa.NativeFile:
        """Open a file for one pass from its start."""
        return streamed(self.open_random(file, size_bytes))

    def read_if_there(self, file: str) -> bytes | None:
        """Return the content of a small file, or None when there is none.

        Raises:
            DataError: It is a link that leads out of the folder, and such are not to be followed.
        """
        filesystem, path = self._connected()
        if not self.config.follow_links:
            refuse_outside(self.root, [file])
        with reading(self.url(file), "a file"):
            if filesystem.get_file_info(f"{path}/{file}").type != pafs.FileType.File:
                return None
            self.read_beside.add(file)
            with self.open_random(file) as handle:
                if handle.size() > _MAX_BESIDE_BYTES:
                    raise DataError(
                        f"{self.url(file)}: expected a file of at most {_MAX_BESIDE_BYTES} bytes, found {handle.size()}"
                    )
                return handle.read()

    def _connected(self) -> tuple[pafs.FileSystem, str]:
        if self._filesystem is None:
            self._filesystem = arrow_filesystem(self.root, self.config.bucket)
        return self._filesystem

    def _file_shards(self, counts: Mapping[str, int]) -> list[Shard]:
        """Return a shard a file, in the order of the listing, with its number of images where `counts` has it."""
        return [
            Shard(id=f"s{i:05d}", file=file, num_images=counts.get(file), sizes=(size_bytes,))
            for i, (file, size_bytes) in enumerate(self.files.items())
        ]

    def class_of(self, label: Label, key: str) -> int:
        """Return the class of a label found in a file.

        Raises:
            DataError: The label is none of the classes.
        """
        return self._class_of(label, key, self.places)

    def _class_of(self, label: Label, key: str, places: Places) -> int:
        if self._by_name is None:
            names = [plain(name) for name in self._label_names]
            counts = Counter(names)
            # A name of two classes stands for none.
            self._by_name = {name: k for k, name in enumerate(names) if counts[name] == 1}
        where = f"{self.root}: image {key}"
        of_label, numbers = self._label_names, self.config.numbers
        return labels.class_of(label, places, of_label, self._by_name, where, numbers)

    @property
    def max_content_bytes(self) -> int:
        """Largest image file that is read: that of the largest image as raw 16-bit RGBA."""
        return 8 * self.config.max_image_pixels

    def too_large(self, size_bytes: int) -> str:
        """Return why a file of this size is not read, or nothing when it is."""
        if size_bytes <= self.max_content_bytes:
            return ""
        return (
            f"{size_bytes} bytes, more than {self.max_content_bytes} (8 bytes a pixel of "
            "--source.max-image-pixels)"
        )


class FileSource(Source):
    """A source that has a file an image: read with a few files under way ahead of the consumer."""

    @abc.abstractmethod
    def _read_one(self, named: tuple[str, int | None]) -> RawImage:
        """Return the record of a key, whose file must have the size that was listed, if given."""

    def _read_file(self, key: str, label: int, path: str, size_bytes: int | None) -> RawImage:
        with reading(self.url(path), "an image file"), self.open_random(path, size_bytes) as file:
            problem = self.too_large(file.size())
            content = b"" if problem else file.read()
        return RawImage(key=key, label=label, content=content, problem=problem)

    def read_shard(self, shard: Shard) -> Iterator[RawImage]:
        self._connected()  # once, and not in every thread
        yield from read_ahead(self._read_one, zip_longest(shard.keys, shard.sizes))

    def read_keys(self, keys: Sequence[str]) -> list[RawImage]:
        self._connected()
        return list(read_ahead(self._read_one, ((key, None) for key in keys)))


def class_shards(
    keys_by_label: Iterable[tuple[int, Sequence[str]]],
    chunk_images: int,
    files: Mapping[str, int] | None = None,
) -> list[Shard]:
    """Cut each class into shards of at most `chunk_images` consecutive images; `files` has the bytes of keys that are files."""
    assert chunk_images >= 1, chunk_images
    return [
        Shard(
            id=f"c{label:05d}-{number:04d}",
            keys=tuple(keys[start : start + chunk_images]),
            num_images=len(keys[start : start + chunk_images]),
            labels=(label,),
            sizes=tuple(files[key] for key in keys[start : start + chunk_images]) if files else (),
        )
        for label, keys in keys_by_label
        for number, start in enumerate(range(0, len(keys), chunk_images))
    ]


def told_counts(
    source: Source, num_images: int, num_bad: int, inside: Sequence[PassedOver] = ()
) -> str:
    """Return the account of a pass over all files of a split, in a line; `inside` are members of archives. Driver only."""
    read, passed = len(source.files), total(source.passed_over)
    account = (
        f"{read + passed:,} files seen = {read:,} read + {passed:,} passed over{shown_groups(source.passed_over)}; in those that "
        f"were read: {num_images:,} images + {num_bad:,} bad"
    )
    return account + (
        f" + {total(inside):,} members passed over{shown_groups(inside)}" if inside else ""
    )
