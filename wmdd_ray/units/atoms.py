"""The weighted atoms of a class, and the real images that recover and the baselines start from: a unit a class. Light: no torch."""

from __future__ import annotations

import socket
import time
from dataclasses import replace

import numpy as np

from wmdd_ray.config import DistillConfig
from wmdd_ray.records import Barycenter, ClassBarycenter, ClassFeatures
from wmdd_ray.spine.rooms import Attempt, Room
from wmdd_ray.spine.run import unit_seed
from wmdd_ray.store import codecs, documents
from wmdd_ray.units.class_features import ClassFeaturesReader

# Real images of a class that the mosaic start crops from (300 in RDED).
_POOL = 300


def unit_of(label: int) -> str:
    """Return the unit id of a class."""
    return f"{label:05d}"


def barycenter_key(label: int) -> str:
    """Return the key of a class's barycenter."""
    return f"classes/{label:05d}.safetensors"


def read_barycenter(
    room: Room, commit_files: dict[str, documents.FileEntry], label: int
) -> ClassBarycenter:
    """Return one class's barycenter, verified."""
    return codecs.decode_class_barycenter(room.read(commit_files[barycenter_key(label)]))


class ClassSolver:
    """Solves one class a call. Holds only where things are: features come from storage, results go there."""

    def __init__(
        self,
        room: Room,
        features_room: Room,
        class_names: tuple[str, ...],
        config: DistillConfig,
        last_layer: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        self._room = room
        self._features = ClassFeaturesReader(features_room)
        self._class_names = class_names
        self._config = config
        self._last_layer = last_layer

    def ready(self) -> str:
        """Return the node's name once the actor can work: imports are the larger part of its start."""
        import wmdd_ray.core.barycenter  # noqa: F401

        return socket.gethostname()

    def work(self, unit: str) -> None:
        """Solve the class `unit`, or all at once, and commit what is not finished."""
        if self._config.barycenters.label_weight is not None:
            self._work_all()
            return
        attempt = self._room.begin(unit)
        if attempt is None:
            return
        real = self._features.read(int(unit))
        in_core = time.perf_counter()
        self._commit(real, self._solve(real, self._config.num_atoms), attempt, in_core)

    def _work_all(self) -> None:
        from wmdd_ray.core.joint import solve_joint

        assert self._last_layer is not None, "label embeddings are the rows of the last layer"
        began, config = time.perf_counter(), self._config
        classes = [self._features.read(label) for label in range(len(self._class_names))]
        solved = solve_joint(
            [real.features_ND for real in classes],
            self._last_layer[0],
            config.num_atoms,
            config.barycenters,
            seeds=[self._seed(real.label) for real in classes],
            where=[self._where(real.label) for real in classes],
        )
        share = (time.perf_counter() - began) / len(classes)
        for real, barycenter in zip(classes, solved, strict=True):
            attempt = self._room.begin(unit_of(real.label))
            if attempt is not None:
                began = attempt.began - share
                self._commit(real, barycenter, replace(attempt, began=began), began)

    def _solve(self, real: ClassFeatures, num_atoms: int) -> Barycenter:
        from wmdd_ray.core.selection import margin_of, solve_with_margin

        margin_N = np.zeros(len(real.keys))
        if self._config.barycenters.margin_fraction > 0:
            assert self._last_layer is not None, "margins are those of the last layer"
            margin_N = margin_of(real.features_ND, *self._last_layer, real.label)
        return solve_with_margin(
            real.features_ND,
            margin_N,
            num_atoms,
            self._config.barycenters,
            seed=self._seed(real.label),
            where=self._where(real.label),
        )

    def _commit(
        self, real: ClassFeatures, barycenter: Barycenter, attempt: Attempt, in_core: float
    ) -> None:
        """Commit a class with the real images that recover and the baselines start from."""
        from wmdd_ray.core.barycenter import nearest_images

        config, count = self._config, len(real.keys)
        nearest = whole = nearest_images(barycenter.atoms_KD, real.features_ND)
        if config.num_atoms > config.ipc:
            whole = nearest_images(self._solve(real, config.ipc).atoms_KD, real.features_ND)
        seed = unit_seed(config.seed, "random_real", unit_of(real.label))
        rng = np.random.Generator(np.random.Philox(key=seed))
        pool = min(count, max(4 * config.num_atoms, _POOL))
        drawn = rng.choice(count, size=pool, replace=False)
        record = ClassBarycenter(
            label=real.label,
            num_images=count,
            barycenter=barycenter,
            nearest_keys=tuple(real.keys[i] for i in nearest),
            whole_keys=tuple(real.keys[i] for i in whole),
            random_keys=tuple(real.keys[i] for i in drawn),
            moments=real.moments,
        )
        attempt.commit(
            {barycenter_key(real.label): codecs.encode_class_barycenter(record)},
            metrics={
                "cost": barycenter.cost,
                "num_iters": barycenter.num_iters,
                "converged": barycenter.converged,
                "num_images": count,
                "seconds_in_core": round(time.perf_counter() - in_core, 4),
            },
        )

    def _seed(self, label: int) -> int:
        return unit_seed(self._config.seed, "barycenters", unit_of(label))

    def _where(self, label: int) -> str:
        return f'class {label} ("{self._class_names[label]}")'
