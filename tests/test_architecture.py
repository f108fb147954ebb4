"""The arrows of the house go down only, and nothing in it unpickles: read off the source, file by file.

jobs -> stages -> {core, store} -> {records, config, errors}; only jobs and stages know Ray; core is pure mathematics.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("wmdd_ray/**/*.py"), *ROOT.glob("jobs/**/*.py")])

# What a room must not import, by the longest prefix of its path.
FORBIDDEN = {
    "jobs/": (),
    "wmdd_ray/stages/": ("jobs",),
    "wmdd_ray/": ("jobs", "ray", "wmdd_ray.stages"),
    "wmdd_ray/store/": ("jobs", "ray", "torch", "torchvision", "wmdd_ray.core", "wmdd_ray.stages"),
}
# Where a list of what is allowed is shorter: third parties and ours. The standard library is free unless named below.
ALLOWED = {
    "wmdd_ray/core/": (
        *(
            "numpy",
            "ot",
            "safetensors",
            "scipy",
            "sklearn",
            "threadpoolctl",
            "torch",
            "torchvision",
        ),
        *("wmdd_ray.config", "wmdd_ray.core", "wmdd_ray.errors", "wmdd_ray.records"),
    ),
    "wmdd_ray/config.py": ("wmdd_ray.errors", "wmdd_ray.redaction"),
    "wmdd_ray/records.py": ("numpy", "wmdd_ray.errors"),
    "wmdd_ray/errors.py": ("wmdd_ray.redaction",),
    "wmdd_ray/redaction.py": (),
}
# Core reads no clock, touches no files, starts nothing, and takes its randomness as an argument.
IMPURE = (
    "datetime",
    "glob",
    "pathlib",
    "random",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "time",
)
GLOBAL_RNG_FREE = {
    "BitGenerator",
    "Generator",
    "PCG64",
    "Philox",
    "RandomState",
    "SeedSequence",
    "default_rng",
}
STANDARD_LIBRARY = sys.stdlib_module_names
UNPICKLERS = ("cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve")


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether `module` is one of `packages` or lies inside one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(tree: ast.AST, path: str) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, at its top or later, by statement or by name."""
    package = Path(path).with_suffix("").parts[:-1]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, level=level, names=names):
                base = ".".join(
                    [
                        *(package[: len(package) - level + 1] if level else ()),
                        *filter(None, [module]),
                    ]
                )
                # `from wmdd_ray import stages` imports wmdd_ray.stages.
                is_package = base.split(".")[0] in ("wmdd_ray", "jobs")
                yield from (
                    (node.lineno, f"{base}.{a.name}" if is_package else base) for a in names
                )
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case ast.Call(
                func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]
            ):
                yield node.lineno, name


def unsafe_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls that run code out of data, or would write such data."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
        if name == "torch.save":
            yield node.lineno, "torch.save( writes pickles; use safetensors"
        if name == "torch.load" and options.get("weights_only") is not True:
            yield node.lineno, "torch.load( without weights_only=True unpickles"
        if options.get("allow_pickle") is True or options.get("weights_only") is False:
            yield node.lineno, "allow_pickle=True and weights_only=False unpickle"
        if name in ("eval", "exec", "yaml.load") or options.get("shell") is True:
            yield node.lineno, f"{name}( runs code out of text"


def impure_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Calls by which core would depend on more than its arguments."""
    # Seeded for a while and put back after: the only way to seed torch's dropout.
    forks = [
        n
        for n in ast.walk(tree)
        if isinstance(n, ast.With) and "fork_rng(" in ast.unparse(n.items[0])
    ]
    forked = {id(node) for fork in forks for node in ast.walk(fork)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        prefix, _, last = name.rpartition(".")
        if name == "open":
            yield node.lineno, "core opens no files"
        if (name == "torch.manual_seed" and id(node) not in forked) or (
            prefix in ("np.random", "numpy.random") and last not in GLOBAL_RNG_FREE
        ):
            yield node.lineno, f"{name}( uses the global random state"


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the root) does against the house's rules, as `path:line: what`."""
    tree = ast.parse(source)
    forbidden = max((room for room in FORBIDDEN if path.startswith(room)), key=len)
    listed = [room for room in ALLOWED if path.startswith(room)]
    found: list[tuple[int, str]] = list(unsafe_calls(tree))
    for line, module in imports(tree, path):
        if within(module, FORBIDDEN[forbidden]) or within(module, UNPICKLERS):
            found.append((line, f"imports {module}"))
        foreign = module.split(".")[0] not in STANDARD_LIBRARY
        if any(foreign and not within(module, ALLOWED[room]) for room in listed):
            found.append((line, f"imports {module}"))
        if path.startswith("wmdd_ray/core/") and within(module, IMPURE):
            found.append((line, f"imports {module}"))
    if path.startswith("wmdd_ray/core/"):
        found += impure_calls(tree)
    return [f"{path}:{line}: {what}" for line, what in sorted(set(found))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_keeps_to_its_room(path: Path) -> None:
    assert violations(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("wmdd_ray/core/x.py", "import ray"),
        ("wmdd_ray/core/x.py", "from wmdd_ray.store.filesystem import Store"),
        ("wmdd_ray/core/x.py", "import fsspec"),
        ("wmdd_ray/core/x.py", "import time"),
        ("wmdd_ray/core/x.py", "content = open('a')"),
        ("wmdd_ray/core/x.py", "np.random.shuffle(index_N)"),
        ("wmdd_ray/core/x.py", "torch.manual_seed(0)"),
        ("wmdd_ray/store/x.py", "import torch.nn as nn"),
        ("wmdd_ray/store/x.py", "def f():\n    from wmdd_ray import core"),
        ("wmdd_ray/store/x.py", "from ..core import transport"),
        ("wmdd_ray/run.py", "import ray.data"),
        ("wmdd_ray/dataset.py", "importlib.import_module('ray')"),
        ("wmdd_ray/config.py", "from wmdd_ray.records import Teacher"),
        ("wmdd_ray/errors.py", "import numpy"),
        ("wmdd_ray/stages/x.py", "from jobs import distill"),
        ("wmdd_ray/stages/x.py", "import pickle"),
        ("wmdd_ray/stages/x.py", "torch.save(state, path)"),
        ("jobs/x.py", "torch.load(path)"),
        ("jobs/x.py", "torch.load(path, weights_only=False)"),
        ("jobs/x.py", "np.load(path, allow_pickle=True)"),
        ("jobs/x.py", "subprocess.run(command, shell=True)"),
    ],
)
def test_a_planted_violation_is_found(path: str, line: str) -> None:
    assert violations(path, f"x = 1\n{line}\n") != []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("wmdd_ray/stages/x.py", "import ray"),
        ("jobs/x.py", "import ray\nfrom wmdd_ray.stages import PIPELINE"),
        ("wmdd_ray/core/x.py", "import math\nimport ot\nfrom wmdd_ray.records import Views"),
        ("wmdd_ray/core/x.py", "with torch.random.fork_rng([]):\n    torch.manual_seed(0)"),
        (
            "wmdd_ray/core/x.py",
            "torch.load(content, weights_only=True)\nnp.random.Generator(bits)\nmodel.eval()",
        ),
        ("wmdd_ray/store/x.py", "import fsspec\nfrom wmdd_ray.records import Teacher"),
        ("wmdd_ray/x.py", "import rayon"),
    ],
)
def test_what_a_room_may_do_is_no_violation(path: str, line: str) -> None:
    assert violations(path, line) == []
