"""The arrows of the house go down only, nothing goes in circles, nothing unpickles or grows long: read off the source."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*ROOT.glob("wmdd_ray/**/*.py"), *ROOT.glob("jobs/**/*.py")])

# From the bottom up: a room may import what stands before its own row, its own files, and nothing else of the project.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("wmdd_ray.__version__", "wmdd_ray.redaction"),
    ("wmdd_ray.errors",),
    ("wmdd_ray.options",),
    ("wmdd_ray.config", "wmdd_ray.records"),
    ("wmdd_ray.recipes",),
    ("wmdd_ray.core", "wmdd_ray.store"),
    ("wmdd_ray.spine", "wmdd_ray.dataset"),
    ("wmdd_ray.diffusion",),
    ("wmdd_ray.units",),
    ("wmdd_ray.robustness", "wmdd_ray.telling"),
    ("wmdd_ray.product",),
    ("wmdd_ray.executors",),
    ("wmdd_ray.stages",),
    ("jobs",),
    ("wmdd_ray.api",),
    ("wmdd_ray",),  # its __init__ and __main__
)
KNOW_RAY = ("wmdd_ray.executors", "jobs")
FORBIDDEN = {"wmdd_ray.store": ("torch", "torchvision")}
# Where a list of what is allowed is shorter: third parties and ours. The standard library is free unless named below.
ALLOWED = {
    "wmdd_ray.core": (
        *(
            "numpy",
            "ot",
            "safetensors",
            "scipy",
            "sklearn",
            "threadpoolctl",
            "timm",  # where a network or weights of it are asked for
            "torch",
            "torchvision",
        ),
        *("wmdd_ray.config", "wmdd_ray.core", "wmdd_ray.errors", "wmdd_ray.records"),
    ),
    "wmdd_ray.config": ("wmdd_ray.errors", "wmdd_ray.options", "wmdd_ray.redaction"),
    "wmdd_ray.options": ("wmdd_ray.errors", "wmdd_ray.redaction"),
    "wmdd_ray.records": ("numpy", "wmdd_ray.errors"),
    "wmdd_ray.errors": ("wmdd_ray.redaction",),
    "wmdd_ray.redaction": (),
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
MAX_FUNCTION_LINES = 80
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


def long_functions(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Functions in which a second thing moved in, signature and docstring counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            num_lines = node.end_lineno - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name}( has {num_lines} lines, expected at most 80"


def layer_of(module: str) -> tuple[int, str]:
    """Return the row of a module of the project, and its room there."""
    for row, rooms in enumerate(LAYERS):
        for room in rooms:
            if within(module, (room,)):
                return row, room
    return -1, module  # the package itself


def is_above(module: str, other: str) -> bool:
    """Whether `module` must not import `other`, both of the project."""
    (row, room), (other_row, other_room) = layer_of(module), layer_of(other)
    return other_row > row or (other_row == row and other_room != room)


def module_of(path: str) -> str:
    """Return the dotted name of a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def violations(path: str, source: str) -> list[str]:
    """What the file at `path` (relative to the root) does against the house's rules, as `path:line: what`."""
    tree, module = ast.parse(source), module_of(path)
    room = layer_of(module)[1]
    wrong: list[tuple[int, str]] = [*unsafe_calls(tree), *long_functions(path, tree)]
    absolute_jobs = {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").partition(".")[0] == "jobs"
        and not node.level
    }
    for line, other in imports(tree, path):
        ours = other.split(".")[0] in ("wmdd_ray", "jobs")
        foreign = other.split(".")[0] not in STANDARD_LIBRARY
        if (
            (ours and other != "wmdd_ray" and is_above(module, other))
            or (within(other, ("ray",)) and not within(module, KNOW_RAY))
            or within(other, (*FORBIDDEN.get(room, ()), *UNPICKLERS))
            or (room in ALLOWED and foreign and not within(other, ALLOWED[room]))
            # Installed, the jobs lie in wmdd_ray.jobs: they name each other from where they are.
            or (room == "jobs" and line in absolute_jobs)
            or (room == "wmdd_ray.core" and within(other, IMPURE))
        ):
            wrong.append((line, f"imports {other}"))
    if room == "wmdd_ray.core":
        wrong += impure_calls(tree)
    return [f"{path}:{line}: {what}" for line, what in sorted(set(wrong))]


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Return module -> modules of the project that it imports, at its top or later."""
    names = {module_of(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        module = module_of(path)
        graph[module] = set()
        for _, other in imports(ast.parse(source), path):
            target = other if other in names else other.rpartition(".")[0]
            if target in names and target != module:
                graph[module].add(target)
    return graph


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
        ("wmdd_ray/spine/run.py", "import ray.data"),
        ("wmdd_ray/units/x.py", "import ray"),
        ("wmdd_ray/units/x.py", "from wmdd_ray.executors import here"),
        ("wmdd_ray/units/x.py", "from wmdd_ray.product.tables import size"),
        ("wmdd_ray/executors/x.py", "from wmdd_ray.stages import recover"),
        ("wmdd_ray/diffusion/x.py", "from wmdd_ray.units.images import ClassImagesReader"),
        ("wmdd_ray/telling/x.py", "from wmdd_ray.product.tables import size"),
        ("wmdd_ray/dataset.py", "importlib.import_module('ray')"),
        ("wmdd_ray/config.py", "from wmdd_ray.records import Teacher"),
        ("wmdd_ray/errors.py", "import numpy"),
        ("wmdd_ray/stages/x.py", "import ray"),
        ("wmdd_ray/stages/x.py", "from jobs import distill"),
        ("wmdd_ray/stages/x.py", "import pickle"),
        ("wmdd_ray/stages/x.py", "torch.save(state, path)"),
        ("jobs/x.py", "from wmdd_ray.api import distill"),
        ("jobs/x.py", "from jobs import command_line"),
        ("jobs/x.py", "torch.load(path)"),
        ("jobs/x.py", "torch.load(path, weights_only=False)"),
        ("jobs/x.py", "np.load(path, allow_pickle=True)"),
        ("jobs/x.py", "subprocess.run(command, shell=True)"),
        ("jobs/x.py", "def f():\n" + 80 * "    g()\n"),
    ],
)
def test_a_planted_violation_is_found(path: str, line: str) -> None:
    assert violations(path, f"x = 1\n{line}\n") != []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("wmdd_ray/executors/x.py", "import ray"),
        ("jobs/x.py", "import ray\nfrom wmdd_ray.stages import PIPELINE"),
        ("wmdd_ray/core/x.py", "import math\nimport ot\nfrom wmdd_ray.records import Views"),
        ("wmdd_ray/core/x.py", "with torch.random.fork_rng([]):\n    torch.manual_seed(0)"),
        (
            "wmdd_ray/core/x.py",
            "torch.load(content, weights_only=True)\nnp.random.Generator(bits)\nmodel.eval()",
        ),
        ("wmdd_ray/store/x.py", "import fsspec\nfrom wmdd_ray.records import Teacher"),
        ("wmdd_ray/spine/x.py", "import rayon"),
        ("wmdd_ray/executors/x.py", "import ray\nfrom wmdd_ray.units import images"),
        ("jobs/x.py", "def f():\n" + 79 * "    g()\n"),
    ],
)
def test_what_a_room_may_do_is_no_violation(path: str, line: str) -> None:
    assert violations(path, line) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in SOURCES}
    graph = import_graph(sources)
    # A package that imports its own files, as it does to show them, is no circle of theirs.
    packages = {m for m in graph if any(other.startswith(m + ".") for other in graph)}
    plain = {m: graph[m] - packages for m in graph.keys() - packages}
    tuple(graphlib.TopologicalSorter(plain).static_order())


def test_a_planted_circle_is_found() -> None:
    sources = {
        "wmdd_ray/store/a.py": "from wmdd_ray.store import b",
        "wmdd_ray/store/b.py": "def f():\n    from wmdd_ray.store.a import g",
    }
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(import_graph(sources)).static_order())
