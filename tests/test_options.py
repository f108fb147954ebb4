from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Literal

import pytest

from wmdd_ray import config
from wmdd_ray.errors import ConfigError
from wmdd_ray.options import check, fingerprint_options, option


@dataclass(frozen=True, kw_only=True)
class Inner:
    share: float = option(0.5, gt=0, le=1)
    shares: tuple[float, ...] = option((0.5,), ge=0)


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int = option(3, ge=1)
    kinds: tuple[Literal["a", "b"], ...] = ("a",)
    limit: float | None = option(None, ge=0, absent_at=None)
    weight: float = option(0.0, ge=0, absent_at=0)
    form: str = option("x", only_with="weight")
    inner: Inner = option(Inner(), only_with="weight")
    threads: int = option(1, in_fingerprint=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Outer(steps=0), "--job.steps: expected >= 1, got 0"),
        (Outer(kinds=("a", "c")), "--job.kinds: expected one of a, b, got ('a', 'c')"),
        (Outer(limit=-1.0), "--job.limit: expected >= 0, got -1.0"),
        (Outer(weight=float("inf")), "--job.weight: expected a finite number >= 0, got inf"),
        (Outer(weight=float("nan")), "--job.weight: expected a finite number >= 0, got nan"),
        (Outer(inner=Inner(share=0.0)), "--job.inner.share: expected in (0, 1], got 0.0"),
        (Outer(inner=Inner(share=1.5)), "--job.inner.share: expected in (0, 1], got 1.5"),
        (Outer(inner=Inner(shares=(1, -1))), "--job.inner.shares: expected >= 0, got (1, -1)"),
    ],
)
def test_the_first_value_out_of_bounds_is_named_by_its_place(wrong: Outer, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check(wrong, "job.")
    assert str(refused.value) == message


def test_values_at_closed_bounds_and_absent_numbers_are_allowed() -> None:
    check(Outer(steps=1, limit=0.0, inner=Inner(share=1.0, shares=(0.0, 7.0))))
    check(Outer(limit=None, kinds=("a", "b")))


def test_an_absent_option_leaves_the_fingerprint_with_those_that_count_only_with_it() -> None:
    assert fingerprint_options(Outer(form="y", threads=4)) == {"steps": 3, "kinds": ("a",)}
    assert fingerprint_options(Outer(limit=0.0, weight=0.5, form="y", threads=4)) == {
        **{"steps": 3, "kinds": ("a",), "limit": 0.0, "weight": 0.5, "form": "y"},
        "inner": {"share": 0.5, "shares": (0.5,)},
    }
    assert fingerprint_options(Outer(threads=4), with_absent=True) == {
        **{"steps": 3, "kinds": ("a",), "limit": None, "weight": 0.0, "form": "x"},
        "inner": {"share": 0.5, "shares": (0.5,)},
    }


def test_what_counts_only_with_an_option_names_one_that_can_be_absent() -> None:
    dependent = 0
    for section in vars(config).values():
        if not (isinstance(section, type) and is_dataclass(section)):
            continue
        declared = {field.name: field.metadata for field in fields(section)}
        for about in declared.values():
            if about.get("only_with"):
                dependent += 1
                assert "absent_at" in declared[about["only_with"]]
    assert dependent >= 7
