"""What the barycenters stage takes of the teacher."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from torch import nn

from tests.stages import tiny
from wmdd_ray.stages import barycenters


@pytest.mark.parametrize("biased", [True, False])
def test_a_last_layer_without_biases_has_biases_of_zero(
    biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=biased))
    monkeypatch.setattr(barycenters, "read_teacher", lambda room: None)
    monkeypatch.setattr(barycenters, "network_of", lambda *_, **__: network)
    config = tiny.config("--barycenters.label-weight", "1", "--barycenters.solver", "lloyd")
    stage: Any = SimpleNamespace(config=config, run=SimpleNamespace(room=lambda name: None))
    last_layer = barycenters._last_layer(stage)
    assert last_layer is not None
    weights_YD, bias_Y = last_layer
    assert weights_YD.shape == (3, 4) and bias_Y.dtype == np.float32
    expected_Y = network[1].bias.detach().numpy() if biased else np.zeros(3)
    np.testing.assert_array_equal(bias_Y, expected_Y)
