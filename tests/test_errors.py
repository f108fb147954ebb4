from __future__ import annotations

import pickle

import pytest

from wmdd_ray import errors


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.WmddError, 1),
        (errors.ConfigError, 2),
        (errors.LostRaceError, 3),
        (errors.DataError, 4),
        (errors.BadImageError, 4),
        (errors.ArtifactError, 5),
    ],
)
def test_errors_cross_processes_with_their_message_and_exit_code(
    kind: type[errors.WmddError], code: int
) -> None:
    copy = pickle.loads(pickle.dumps(kind("class 7 has 6 images")))
    assert type(copy) is kind
    assert str(copy) == "class 7 has 6 images"
    assert copy.exit_code == code
