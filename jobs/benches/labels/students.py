"""The options at one ipc: its images, and the students that learn from what is read back of each option's files."""

from __future__ import annotations

import hashlib
import statistics
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch

from jobs.benches.accuracy.splits import Labeled, Workplace
from jobs.benches.labels.files import ask, store
from jobs.benches.labels.options import Option
from jobs.benches.reporting import Row
from wmdd_ray.config import DistillConfig
from wmdd_ray.core.barycenter import nearest_images, solve_barycenter
from wmdd_ray.core.batches import eval_batches
from wmdd_ray.core.embedding import features_and_moments
from wmdd_ray.core.networks import build_network, load_weights, network_of, weights_of
from wmdd_ray.core.training import accuracy, train_student
from wmdd_ray.core.views import StoredImages
from wmdd_ray.records import Teacher
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import fingerprint
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units.images import read_images

_BATCH_IMAGES = 256


class Comparison:
    """The options at one ipc."""

    def __init__(
        self,
        config: DistillConfig,
        teacher: Teacher,
        images: str | None,
        options: list[Option],
        place: Workplace,
    ) -> None:
        self._config, self._teacher, self._place = config, teacher, place
        self.options, self.student = options, config.evaluate
        self._network = network_of(teacher, torch.device("cpu"))
        pixels = _distilled(images, config, teacher.num_classes) if images else None
        self._kind = "distilled" if pixels is not None else "nearest real"
        if pixels is None:
            pixels = _nearest(config, teacher, self._network, place.train)
        self._images = StoredImages(pixels, teacher.mean_C, teacher.std_C)
        self.num_images = len(pixels)
        self._labeled_by = {
            "teacher": hashlib.sha256(codecs.encode_teacher(teacher)).hexdigest(),
            "pixels": hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest(),
        }
        self._top1: dict[str, dict[int, float]] = {}

    def unit(self, option: Option, seed: int) -> str:
        """Return the id of a student: what it is in words, and the fingerprint of all that its weights depend on.

        Options of equal labels have one student: `option` is the first of them (`learned_from`).
        """
        about = {
            **self._labeled_by,
            "relabel": asdict(option.relabel),
            "shared": option.shared,
            # What a student of soft labels does not depend on is set to one value.
            "student": asdict(replace(self.student, num_seeds=1, baselines=(), all_real_epochs=1)),
            "seeds": [self._config.seed, seed],
        }
        return f"i{self._config.ipc:03d}-{option.key}-s{seed}-{fingerprint(about)[:10]}"

    def label(self) -> None:
        """Draw all views, ask the teacher, and store the labels of every option."""
        self.asked = ask(self._config, self._network, self._images, self._teacher.image_size)
        self.stored = {option.name: store(self.asked, option) for option in self.options}

    def rows(self) -> list[Row]:
        """Return a row an option, with the students so far."""
        found: list[Row] = []
        for option in self.options:
            size_bytes = self.stored[option.name].size_bytes
            row: Row = {
                "ipc": self._config.ipc,
                "images": self._kind,
                "labels": option.name,
                "label_epochs": self._config.relabel.epochs // option.shared,
                "bytes": size_bytes,
            }
            row["bytes_a_view"] = round(size_bytes / len(self._images) / row["label_epochs"], 1)
            row["times_smaller"] = round((found[0] if found else row)["bytes"] / size_bytes, 1)
            if option.relabel.labels == "online":
                row["with_teacher"] = size_bytes + len(codecs.encode_teacher(self._teacher))
            top1, fkd = (self._top1.get(name, {}) for name in (option.key, "fkd"))
            if top1:
                percent = [100 * value for value in top1.values()]
                row["top1"] = round(statistics.mean(percent), 2)
                row["std"] = round(statistics.stdev(percent), 2) if len(percent) > 1 else None
                paired = [100 * (top1[seed] - fkd[seed]) for seed in top1.keys() & fkd.keys()]
                row["difference"] = round(statistics.mean(paired), 2) if paired else None
                row["students"] = [round(value, 2) for value in percent]
            found.append(row)
        return found

    def score(self, option: Option, seed: int, scored: Labeled) -> None:
        """Keep the top-1 of an option's student, which is trained where it is not there yet."""
        network, unit, room = self._new(seed), self.unit(option, seed), self._place.room("students")
        attempt = room.begin_unit(unit) if unit not in room.finished() else None
        if attempt is not None:
            self._train(network, option, seed, unit, attempt)
        state = codecs.decode_state(room.read(room.read_unit(unit).files[0]))
        load_weights(network, {k: torch.tensor(v) for k, v in state.items()}, f"student {unit}")
        batches = eval_batches(
            scored.images_NHWC,
            scored.labels_N,
            mean_C=self._teacher.mean_C,
            std_C=self._teacher.std_C,
            batch_size=_BATCH_IMAGES,
        )
        top1, _ = accuracy(network.eval(), batches)
        self._top1.setdefault(option.key, {})[seed] = top1
        told = f"ipc {self._config.ipc}, {option.name}, seed {seed}: {100 * top1:.2f}"
        print(told, file=sys.stderr, flush=True)

    def _new(self, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_network(
            self.student.network,
            num_classes=self._teacher.num_classes,
            channels=self._teacher.channels,
            image_size=self._teacher.image_size,
        )

    def _train(
        self, network: torch.nn.Module, option: Option, seed: int, unit: str, attempt: int
    ) -> None:
        """Train a student from scratch and commit its weights, those after the last epoch."""
        started = time.perf_counter()
        train_student(
            network,
            self._images,
            self.stored[option.name].epoch,
            None,
            self.student,
            epochs=self.student.epochs,
            image_size=self._teacher.image_size,
            seed=seed,
        )
        self._place.room("students").commit_unit(
            unit,
            {f"{unit}.safetensors": codecs.encode_state(weights_of(network))},
            attempt=attempt,
            seconds=time.perf_counter() - started,
        )


def _distilled(run: str, config: DistillConfig, num_classes: int) -> np.ndarray | None:
    """Return a run's distilled images, uint8 NHWC; None where it has another ipc."""
    classes = read_images(Room(Store(run), "images", "bench"), range(num_classes))
    if any(len(found.images_KHWC) != config.ipc for found in classes):
        return None
    return np.concatenate([found.images_KHWC for found in classes])


def _nearest(
    config: DistillConfig, teacher: Teacher, network: torch.nn.Module, train: Labeled
) -> np.ndarray:
    """Return the real images of `train` nearest to the barycenters' atoms, class by class, uint8 NHWC."""
    features_ND = np.concatenate(
        [
            features_and_moments(
                network, images, labels_B.numpy(), batch_size=config.features.batch_size
            )[0]
            for images, labels_B in eval_batches(
                train.images_NHWC,
                train.labels_N,
                mean_C=teacher.mean_C,
                std_C=teacher.std_C,
                batch_size=config.features.chunk_images,
            )
        ]
    )
    chosen = []
    for label in range(teacher.num_classes):
        members = train.of_class(label)
        atoms = solve_barycenter(
            features_ND[members], config.ipc, config.barycenters, seed=label, where=str(label)
        ).atoms_KD
        chosen.append(members[nearest_images(atoms, features_ND[members])])
    return np.asarray(train.images_NHWC[np.concatenate(chosen)])
