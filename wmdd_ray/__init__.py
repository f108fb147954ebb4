"""Dataset distillation by Wasserstein barycenters (WMDD, ICCV 2025) on Ray.

    run = wmdd_ray.distill(recipe="digits", ipc=10)
    dataset = wmdd_ray.load_dataset("runs/digits-ipc10/dataset")

Nothing is imported before it is asked for: `import wmdd_ray` costs nothing, and `load_dataset` needs neither Ray nor the
packages of `wmdd_ray[distill]`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wmdd_ray.api import Run, distill, evaluate, load_dataset, prepare

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "distill", "evaluate", "load_dataset", "prepare"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'wmdd_ray' has no attribute {name!r}")
    from wmdd_ray import api

    return getattr(api, name)
