"""Barycenters of images and labels together, in the stage: one task for all classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stages import tiny
from tests.stages.tiny import FinishedRun
from wmdd_ray.core.barycenter import solve_barycenter
from wmdd_ray.core.joint import solve_joint
from wmdd_ray.core.networks import last_linear, network_of
from wmdd_ray.records import ClassBarycenter
from wmdd_ray.spine.rooms import Room
from wmdd_ray.spine.run import unit_seed
from wmdd_ray.store import codecs
from wmdd_ray.store.filesystem import Store
from wmdd_ray.units import atoms
from wmdd_ray.units.class_features import ClassFeaturesReader
from wmdd_ray.units.teacher import TEACHER_KEY

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_local")]

OPTION = ("--barycenters.label-weight", "0.2", "--barycenters.solver", "lloyd")


def classes_of(out: Path) -> list[ClassBarycenter]:
    return [
        codecs.decode_class_barycenter(
            (out / "barycenters" / atoms.barycenter_key(label)).read_bytes()
        )
        for label in range(10)
    ]


def test_the_stage_solves_all_classes_by_the_rows_of_the_teachers_last_layer(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features")
    assert tiny.job(out, *OPTION, "--until", "recover") == 0
    reader = ClassFeaturesReader(Room(Store(str(out)), "features"))
    teacher = codecs.decode_teacher((out / "teacher" / TEACHER_KEY).read_bytes())
    expected = solve_joint(
        [reader.read(label).features_ND for label in range(10)],
        last_linear(network_of(teacher, torch.device("cpu"))).weight.detach().numpy(),
        4,
        tiny.config(*OPTION).barycenters,
        seeds=[unit_seed(0, "barycenters", atoms.unit_of(label)) for label in range(10)],
        where=[""] * 10,
    )
    moved = 0.0
    for label, (found, joint) in enumerate(zip(classes_of(out), expected, strict=True)):
        alone = solve_barycenter(
            reader.read(label).features_ND,
            4,
            tiny.config(*OPTION).barycenters,
            seed=unit_seed(0, "barycenters", atoms.unit_of(label)),
        )
        np.testing.assert_array_equal(found.barycenter.atoms_KD, joint.atoms_KD)
        np.testing.assert_array_equal(found.barycenter.weights_K, joint.weights_K)
        assert found.barycenter.cost >= alone.cost
        moved += float(np.abs(found.barycenter.atoms_KD - alone.atoms_KD).sum())
    assert moved > 0
    assert (out / "images" / "stage.json").exists()


def test_what_is_finished_stays_and_the_rest_comes_out_the_same(
    finished_run: FinishedRun, tmp_path: Path
) -> None:
    out = tiny.copy_rooms(finished_run.out, tmp_path / "run", "teacher", "features")
    assert tiny.job(out, *OPTION, "--until", "barycenters") == 0
    room = out / "barycenters"
    whole = {path.name: path.read_bytes() for path in (room / "classes").iterdir()}
    (room / "stage.json").unlink()
    for label in (2, 7):
        (room / atoms.barycenter_key(label)).unlink()
        (room / "units" / f"{label:05d}.json").unlink()
    before = (room / "units" / "00003.json").stat().st_mtime_ns
    assert tiny.job(out, *OPTION, "--until", "barycenters") == 0
    assert {path.name: path.read_bytes() for path in (room / "classes").iterdir()} == whole
    assert (room / "units" / "00003.json").stat().st_mtime_ns == before
