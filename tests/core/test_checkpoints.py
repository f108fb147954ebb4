from __future__ import annotations

import argparse
import io
import pickle
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from tests.store.hostile import Canary
from wmdd_ray.core.checkpoints import read_checkpoint
from wmdd_ray.core.networks import load_weights
from wmdd_ray.errors import DataError

STATE = {"fc.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.ones(2)}


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def prefixed(prefix: str, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{prefix}{k}": v for k, v in STATE.items()} | more


COUNTED = STATE | {
    "total_ops": torch.ones(1),
    "fc.total_ops": torch.ones(1),
    "fc.total_params": torch.ones(1),
}
OPTIONS = argparse.Namespace(arch="resnet18", lr=0.1, betas=(0.9, 0.999), resume=None)
LIGHTNING = {
    "pytorch-lightning_version": "2.4.0",
    "state_dict": prefixed("model."),
    "hyper_parameters": {"lr": 0.1},
    "callbacks": {},
}
AVERAGED = AveragedModel(nn.Linear(1, 1)).state_dict() | {
    "n_averaged": torch.tensor(3),
    "module.fc.weight": STATE["fc.weight"],
    "module.fc.bias": STATE["fc.bias"],
}
del AVERAGED["module.weight"], AVERAGED["module.bias"]


@pytest.mark.parametrize(
    "content",
    [
        safetensors.torch.save(STATE),
        saved(STATE),
        saved({"state_dict": STATE, "epoch": 3}),
        saved({"model": STATE, "optimizer": {"lr": 0.1}}),
        saved(prefixed("module.")),
        saved({"model_state_dict": prefixed("module._orig_mod.")}),
        saved(prefixed("_orig_mod.module.")),
        saved(prefixed("module.model._orig_mod.module.")),
        saved({"net": prefixed("module."), "acc": 91.2, "epoch": 3}),
        saved({"state_dict": {"model": STATE}}),
        saved({"state_dict_ema": STATE, "epoch": 3}),
        saved({"model_ema": AVERAGED, "args": OPTIONS}),
        saved({"ema": prefixed("module."), "step": 3}),
        saved({"state_dict": STATE, "state_dict_ema": {"fc.weight": torch.zeros(2, 3)}}),
        saved(LIGHTNING),
        saved(AVERAGED),
        saved(prefixed("module.module.") | {"module.n_averaged": torch.tensor(2)}),
        saved(COUNTED),
        saved({"model": STATE, "args": OPTIONS, "epoch": 3}),
    ],
    ids=[
        *("safetensors", "plain", "state_dict", "model", "data parallel", "compiled"),
        *("compiled data parallel", "four times", "net", "nested twice", "timm ema only"),
        *("torchvision ema", "ema", "weights before their average", "Lightning", "averaged"),
        *("averaged data parallel", "thop", "torchvision options"),
    ],
)
def test_every_usual_way_to_save_weights_is_read(content: bytes) -> None:
    state = read_checkpoint(content, "a file")
    assert sorted(state) == sorted(STATE)
    for name, tensor in STATE.items():
        assert torch.equal(state[name], tensor)


@pytest.mark.parametrize("as_torch_file", [False, True])
@pytest.mark.parametrize("in_options", [False, True])
def test_a_pickle_with_code_is_refused_and_never_run(
    tmp_path: Path, as_torch_file: bool, in_options: bool
) -> None:
    canary: Any = Canary(tmp_path / "canary")
    extra = argparse.Namespace(path=canary) if in_options else canary
    canary = tmp_path / "canary"
    content = {"state_dict": STATE, "extra": extra}
    data = saved(content) if as_torch_file else pickle.dumps(content)
    with pytest.raises(
        DataError, match="checkpoint evil.pt: expected safetensors, or a torch file"
    ):
        read_checkpoint(data, "evil.pt")
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists(), "the canary itself must sing"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a checkpoint",
        saved(STATE)[:-200],
        safetensors.torch.save(STATE)[:-4],
        b"\xff" * 7 + b"\x7f{",
    ],
    ids=["empty", "text", "cut torch file", "cut safetensors", "absurd header length"],
)
def test_damaged_bytes_are_a_data_error(content: bytes) -> None:
    with pytest.raises(DataError, match="cannot be read as such"):
        read_checkpoint(content, "a file")


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([torch.ones(1)], "got list"),
        ({}, "an empty mapping"),
        ({"a": torch.ones(1), "epoch": 3}, "a mapping with 'epoch': int"),
    ],
)
def test_files_without_weights_are_a_data_error(content: object, got: str) -> None:
    with pytest.raises(DataError, match=re.escape(got)):
        read_checkpoint(saved(content), "a file")


def test_a_mapping_that_holds_itself_is_a_data_error() -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    with pytest.raises(DataError, match="a mapping with 'model': dict"):
        read_checkpoint(saved(content), "a file")


def test_a_prefix_is_kept_when_only_some_names_have_it() -> None:
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert list(read_checkpoint(saved(state), "a file")) == ["module.a", "b"]


def test_a_network_whose_own_names_begin_with_a_prefix_takes_its_own_file() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.ModuleDict({"fc": nn.Linear(3, 2)})

    network = Wrapped()
    for content in (prefixed("model."), prefixed("module.model."), STATE):
        nn.init.zeros_(network.get_parameter("model.fc.weight"))
        load_weights(network, read_checkpoint(saved(content), "a file"), "a file")
        assert torch.equal(network.get_parameter("model.fc.weight"), STATE["fc.weight"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refused_pickle_is_refused_for_the_class_that_it_wants(zipped: bool) -> None:
    sink = io.BytesIO()
    torch.save({"a": Fraction(1, 2)}, sink, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError) as refused:
        read_checkpoint(sink.getvalue(), "a file")
    assert "GLOBAL fractions.Fraction was not an allowed global by default)" in str(refused.value)
    assert "two options" not in str(refused.value) and "\x1b" not in str(refused.value)
