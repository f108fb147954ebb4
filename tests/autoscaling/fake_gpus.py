"""What is given a "GPU" of the fake cloud, which is a number, computes on its CPU: torch can use none, and the product says so."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

DEVICE = "wmdd_ray.core.device"


class _Patched(MetaPathFinder):
    """Patches the module when it is imported, for torch behind it takes each idle process of Ray seconds."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        if name != DEVICE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            load(module)
            device_for = module.device_for
            module.device_for = lambda gpus: device_for(0)  # type: ignore[attr-defined]

        spec.loader.exec_module = exec_module
        return spec


def compute_on_the_cpu() -> None:
    """Run first of all in a process of Ray."""
    sys.meta_path.insert(0, _Patched())
