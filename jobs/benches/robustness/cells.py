"""The rows of the table: a method at an ipc by a plain teacher or by one with GUARD's curvature term."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from jobs.benches.accuracy.definitions import Options, variants
from jobs.benches.accuracy.rows import group_of, recovered
from wmdd_ray.config import DistillConfig, SqueezeConfig

if TYPE_CHECKING:
    from jobs.benches.accuracy.splits import Workplace
    from jobs.benches.accuracy.units import StudentUnit

Method = Literal["wmdd", "sre2l"]
METHODS: dict[Method, str] = {"wmdd": "WMDD", "sre2l": "cross-entropy + global BN (SRe2L)"}


@dataclass(frozen=True)
class Cell:
    """A row of the table: a method at an ipc by one teacher."""

    dataset: str
    method: Method
    ipc: int
    curved: SqueezeConfig
    iterations: int
    options: Options
    seeds: int

    @property
    def recipes(self) -> tuple[DistillConfig, DistillConfig]:
        """The recipe as published and as it is best."""
        return variants(self.dataset, self.ipc, self.options)

    @property
    def squeeze(self) -> SqueezeConfig:
        """How the teacher is trained."""
        _, best = self.recipes
        if self.curved.curvature_weight == 0:
            return best.squeeze
        curved = replace(
            best.squeeze,
            curvature_weight=self.curved.curvature_weight,
            curvature_step=self.curved.curvature_step,
            curvature_form=self.curved.curvature_form,
            curvature_ipc_power=self.curved.curvature_ipc_power,
        )
        return curved.at_ipc(self.ipc)

    @property
    def about(self) -> dict[str, Any]:
        """What of the recipe the numbers depend on most, for the record."""
        _, best = self.recipes
        squeeze, student = best.squeeze, best.evaluate
        return {
            "network": student.network.arch,
            "width": student.network.width,
            "teacher_epochs": squeeze.epochs,
            "student_epochs": student.epochs,
            "tiles": best.recover.tiles,
            "bf16": squeeze.mixed_precision,
        }

    def students(self, place: Workplace) -> tuple[StudentUnit, ...]:
        """Return the units of the students, which hold all before them."""
        from jobs.benches.accuracy.work import units_of_row

        paper, best = self.recipes
        recover = best.recover
        if self.method == "sre2l":
            recover = replace(
                paper.recover,
                feature_term="cross_entropy",
                moments="global",
                iterations=self.iterations,
            )
        row = recovered(self.method, METHODS[self.method], replace(best, recover=recover))
        # A teacher's seed is of its name: plain and curved ones start from the same weights.
        recipe = replace(best, squeeze=self.squeeze)
        options = replace(self.options, distill_seeds=1, student_seeds=self.seeds)
        group = group_of(f"ipc {self.ipc}", self.ipc, recipe, (row,), options)
        return units_of_row(group, row, place).students["soft"]
