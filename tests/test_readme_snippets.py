"""The README's Python runs as it stands there, and with the model that it names beside the first one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.stages.tiny import FinishedRun

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
EITHER = re.compile(
    r"^student = (?P<torchvision>torchvision\..*)\n# or: student = (?P<timm>timm\..*)$", re.M
)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:timm")
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_readme_s_python_trains_a_model_of_either_library_from_a_finished_run(
    library: str,
    finished_run: FinishedRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if library == "timm":
        pytest.importorskip("timm")
    assert len(SNIPPETS) == 1, "a new snippet needs a test of its own"
    (code,) = SNIPPETS
    (named,) = EITHER.finditer(code)
    code = f"import {library}\n" + EITHER.sub(f"student = {named[library]}\nbefore = state()", code)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-ipc10").symlink_to(finished_run.out)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    found["state"] = lambda: {k: p.detach().clone() for k, p in found["student"].named_parameters()}
    torch.manual_seed(0)
    exec(code, found)
    assert re.fullmatch(r"top-1 \d+\.\d % of held-out real images\n", capsys.readouterr().out)
    student: nn.Module = found["student"]
    assert type(student).__module__.startswith(library)
    assert torch.isfinite(found["loss"])
    dataset = found["dataset"]
    steps = dataset.epochs * len(dataset.batches(25))
    counts = [m.num_batches_tracked for m in student.modules() if isinstance(m, nn.BatchNorm2d)]
    assert counts and all(count == steps for count in counts)
    assert all(not torch.equal(p, found["before"][k]) for k, p in student.named_parameters())
