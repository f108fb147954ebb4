"""Measure this machine: `python jobs/bench.py barycenter|recover|features|orchestration [--out FILE.json]`.

Each benchmark prints a table and writes the same numbers with hardware, versions, settings, n, min, median and max. What
is compared is measured in the same run, taking turns. With one computing thread processor seconds are counted, which
other work on the machine changes least; otherwise wall-clock seconds.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import tyro

from wmdd_ray.config import BarycenterConfig, NetworkConfig, RecoverConfig
from wmdd_ray.provenance import hardware, versions
from wmdd_ray.recipes import recipe_of

if TYPE_CHECKING:
    import torch

ROOMS = ("teacher", "features", "barycenters", "images", "labels", "dataset", "evaluation")
Solver = Literal["lloyd", "uniform", "emd", "sinkhorn", "sliced"]
Spread = dict[str, float]


def main(arguments: list[str]) -> None:
    """Run the benchmark that the command line names."""
    benchmarks: dict[str, Callable[..., Any]] = {
        f.__name__: f for f in (barycenter, recover, features, orchestration)
    }
    tyro.extras.subcommand_cli_from_dict(benchmarks, args=arguments, description=__doc__)


def spread(values: Sequence[float]) -> Spread:
    """Return n, min, median and max."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {"n": len(values), **{name: float(f"{value:.5g}") for name, value in found.items()}}


def report(rows: list[dict[str, Any]], settings: dict[str, Any], out: str | None) -> None:
    """Print the rows (a spread as `median (min-max)`) and write them to `out` with all that they depend on."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['median']:.4g} ({value['min']:.4g}-{value['max']:.4g})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *([text(row.get(name, "-")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print(f"{hardware()}; {settings}")
    if out is not None:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"date": date, "hardware": hardware(), **versions()}
        record |= {"settings": settings, "rows": rows}
        Path(out).write_text(json.dumps(record, indent=2) + "\n")


# barycenter -------------------------------------------------------------------------------------


def barycenter(
    ipc: tuple[int, ...] = (10, 50, 100),
    solvers: tuple[Solver, ...] = ("lloyd", "uniform", "emd", "sinkhorn", "sliced"),
    repeats: int = 3,
    reference: bool = True,
    out: str | None = None,
) -> None:
    """Solvers on a synthetic class, 1300 x 512: processor seconds on one thread, and exact W2^2.

    Args:
        ipc: Numbers of atoms.
        solvers: Solvers to measure.
        repeats: Classes, each with its own seed; every solver solves each once.
        reference: Also measure the alternation as WMDD's reference runs it with learned weights.
        out: JSON file to write.
    """
    from wmdd_ray.core.barycenter import solve_barycenter
    from wmdd_ray.core.transport import exact_cost, one_thread

    def solve(solver: str, features_ND: np.ndarray, k: int, seed: int) -> tuple[np.ndarray, ...]:
        if solver == "reference":
            with one_thread():
                return reference_alternation(features_ND, k, np.random.default_rng(seed))
        config = BarycenterConfig(solver=cast(Solver, solver))
        found = solve_barycenter(features_ND, k, config, seed=seed)
        return found.atoms_KD, found.weights_K

    solve("uniform", synthetic_class(0)[:100], 5, 0)
    names = [*(["reference"] if reference else []), *solvers]
    classes = [synthetic_class(seed) for seed in range(repeats)]
    rows: list[dict[str, Any]] = []
    for k in ipc:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for seed, features_ND in enumerate(classes):
            for name in names:
                started = time.process_time()
                atoms_KD, weights_K = solve(name, features_ND, k, seed)
                spent = time.process_time() - started
                found[name].append((spent, exact_cost(atoms_KD, weights_K, features_ND)))
        base_s, base_cost = np.median(found[names[0]], axis=0).tolist()
        for name in names:
            seconds, costs = np.array(found[name]).T.tolist()
            row = {"ipc": k, "solver": name, "cpu_s": spread(seconds), "w2_squared": spread(costs)}
            row[f"times_faster_than_{names[0]}"] = base_s / statistics.median(seconds)
            row["cost_ratio"] = statistics.median(costs) / base_cost
            rows.append(row)
    report(rows, {"num_images": 1300, "width": 512, "modes": 20, "threads": 1}, out)


def synthetic_class(seed: int) -> np.ndarray:
    """Return (1300, 512) non-negative features in 20 clusters, norms about 27 to 32: like those of a ResNet-18."""
    rng = np.random.default_rng(seed)
    centers = 0.4 + 0.655 * rng.gamma(1.0, size=(20, 512))
    cluster_N = rng.choice(20, size=1300, p=rng.dirichlet(np.full(20, 5.0)))
    noise = rng.normal(scale=0.41, size=(1300, 512))
    return np.maximum(centers[cluster_N] + noise, 0).astype(np.float32)


def reference_alternation(
    features_ND: np.ndarray, ipc: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return atoms and weights by WMDD's reference with learned weights, written anew from a description of it.

    From standard normal atoms, ten rounds: weights by at most 100 mirror steps of rate 10 from uniform, along the dual
    potentials of the exact plan for costs divided by their maximum; then 0.2 of the way to POT's free-support barycenter
    for these weights. Distances come from a matrix product, faster than the reference's broadcasting.
    """
    import ot

    x_ND = features_ND.astype(np.float64)
    share_N = np.full(len(x_ND), 1 / len(x_ND))
    atoms_KD = rng.standard_normal((ipc, x_ND.shape[1]))
    weights_K = np.full(ipc, 1 / ipc)
    for _ in range(10):
        costs_KN = ot.dist(atoms_KD, x_ND)
        costs_KN /= costs_KN.max()
        learned_K = np.full(ipc, 1 / ipc)
        for _ in range(100):
            _, log = ot.emd(learned_K, share_N, costs_KN, log=True)
            before_K, learned_K = learned_K, learned_K * np.exp(-10 * log["u"])
            learned_K /= learned_K.sum()
            if np.abs(learned_K - before_K).sum() < 1e-9:
                break
        moved, weights_K = float(np.linalg.norm(learned_K - weights_K)), learned_K
        if moved < 1e-6:
            break
        target_KD = ot.lp.free_support_barycenter([x_ND], [share_N], atoms_KD, b=weights_K)
        atoms_KD = 0.8 * atoms_KD + 0.2 * target_KD
    return atoms_KD, weights_K


# recover ----------------------------------------------------------------------------------------


def recover(
    archs: tuple[Literal["convnet3", "resnet18"], ...] = ("convnet3", "resnet18"),
    width: int = 128,
    num_images: int = 100,
    iterations: int = 8,
    threads: int = 1,
    out: str | None = None,
) -> None:
    """Images a second of a recover step, against the network's forward and backward pass alone; 32 x 32 pixels.

    A bare pass runs after every step, in the same process on as many images; the first of each is not counted. Measured
    are one class of `num_images` images, and `num_images` classes of one image.

    Args:
        archs: Teachers, untrained (ResNet-18 with the small stem).
        width: Channels of a ConvNet-3 block.
        num_images: Images of a forward pass.
        iterations: Recover steps.
        threads: Computing threads.
        out: JSON file to write.
    """
    import torch

    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    for arch in archs:
        network = untrained(NetworkConfig(arch=arch, width=width, small_stem=True), num_images)
        for ipc in (1, num_images):
            step_s, bare_s = recover_seconds(network, num_images, ipc, iterations, threads)
            row: dict[str, Any] = {"arch": arch, "ipc": ipc}
            for name, seconds in (("recover", step_s[1:]), ("bare", bare_s[1:])):
                row[f"{name}_images_per_s"] = spread([num_images / s for s in seconds])
            row["share_of_bare"] = statistics.median(bare_s[1:]) / statistics.median(step_s[1:])
            rows.append({**row, "first_step_s": step_s[0]})
    settings = {"image_size": 32, "convnet3_width": width, "num_images": num_images}
    report(rows, {**settings, "threads": threads}, out)


def untrained(config: NetworkConfig, num_classes: int) -> torch.nn.Module:
    """Return a random frozen network for 32 x 32 RGB whose BatchNorm layers have seen noise once."""
    import torch

    from wmdd_ray.core.networks import batch_norms, build_network

    torch.manual_seed(0)
    network = build_network(config, num_classes=num_classes, channels=3, image_size=32)
    for norm in batch_norms(network):
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(64, 3, 32, 32))
    return network.eval().requires_grad_(False)


def recover_seconds(
    network: torch.nn.Module, num_images: int, ipc: int, iterations: int, threads: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of every recover step, and of the bare pass after it."""
    import torch

    from wmdd_ray.core.embedding import features_and_moments
    from wmdd_ray.core.moments import variance_S
    from wmdd_ray.core.synthesis import ClassTarget, recover_group
    from wmdd_ray.core.views import to_input

    color: dict[str, Any] = {"mean_C": (0.5,) * 3, "std_C": (0.25,) * 3}
    shape = (num_images, 32, 32, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = to_input(pixels, **color, device="cpu")
    label_N = np.repeat(np.arange(num_images // ipc), ipc)
    features_ND, moments = features_and_moments(network, images, label_N, batch_size=64)
    targets = [
        ClassTarget(
            label=label,
            atoms_KD=features_ND[label_N == label],
            weights_K=np.full(ipc, 1 / ipc),
            mean_S=moments[label].mean_S,
            var_S=variance_S(moments[label]),
            start_KHWC=pixels[::-1][label_N == label],
        )
        for label in moments
    ]
    # The network is tapped while it recovers; the bare pass gets one that is not.
    plain = copy.deepcopy(network)
    clock = time.process_time if threads == 1 else time.perf_counter
    step_s: list[float] = []
    bare_s: list[float] = []
    started = clock()

    def bare(_: int, __: Any) -> None:
        nonlocal started
        step_s.append(clock() - started)
        started = clock()
        leaf = images.detach().clone().requires_grad_(True)
        torch.autograd.grad(plain(leaf).sum(), leaf)
        bare_s.append(clock() - started)
        started = clock()

    config = RecoverConfig(iterations=iterations)
    recover_group(
        network,
        targets,
        config,
        image_size=32,
        channels=3,
        **color,
        seed=0,
        device="cpu",
        on_step=bare,
    )
    return step_s, bare_s


# Stages on Ray ----------------------------------------------------------------------------------


def features(data: str, bare_chunks: int = 20, out: str | None = None) -> None:
    """Images a second of the features stage, against a bare loop over the same decoding and teacher in one process.

    The teacher is a ConvNet-3 after one epoch. The stage has a fixed start (processes, imports); its marginal rate counts
    from the first committed chunk to the last. Bare loops use one thread, as each embedding actor does.

    Args:
        data: Folder of IDX files (Fashion-MNIST).
        bare_chunks: Chunks that each bare loop runs over.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = ("--recipe", "fashion_mnist", "--data", data, "--until", "features")
        distill(folder, *options, "--squeeze.epochs", "1")
        stage = read_stage(folder, "features")
        bare_rates = bare_loops(folder, data, bare_chunks)
        units = Path(folder) / "features" / "units"
        finished = sorted(
            ((units / f"{unit}.json").stat().st_mtime, marker["metrics"])
            for unit, marker in stage["units"].items()
        )
    images = [metrics["num_images"] for _, metrics in finished]
    in_core = [metrics["num_images"] / metrics["seconds_in_core"] for _, metrics in finished]
    rates = {
        "whole stage": [sum(images) / stage["seconds"]],
        "stage, first to last chunk": [sum(images[1:]) / (finished[-1][0] - finished[0][0])],
        "core in the stage, by chunk": in_core,
        **bare_rates,
    }
    base = statistics.median(bare_rates["bare loop: decode + network"])
    rows = [
        {"what": name, "images_per_s": spread(found), "of_bare": statistics.median(found) / base}
        for name, found in rates.items()
    ]
    report(rows, {"num_images": sum(images), "threads": 1}, out)


def bare_loops(run: str, data: str, num_chunks: int) -> dict[str, list[float]]:
    """Return images per wall-clock second of every chunk, for loops in one process that take turns."""
    import torch

    from wmdd_ray.core.embedding import features_and_moments
    from wmdd_ray.core.networks import network_of
    from wmdd_ray.core.views import to_input
    from wmdd_ray.store.codecs import decode_teacher
    from wmdd_ray.store.sources import decoded_chunks, open_source

    torch.set_num_threads(1)
    config = recipe_of("fashion_mnist", 10)
    teacher = decode_teacher((Path(run) / "teacher" / "teacher.safetensors").read_bytes())
    network = network_of(teacher)
    channels_last = copy.deepcopy(network).to(memory_format=torch.channels_last)
    source = open_source(data, config.source, split="train")
    chunk_images, batch_size = config.features.chunk_images, config.features.batch_size
    rates: dict[str, list[float]] = {}
    for shard in source.shards(chunk_images)[:num_chunks]:
        started = time.perf_counter()
        for chunk in decoded_chunks(source, shard, config.source, chunk_images):
            images = to_input(chunk.images_NHWC, teacher.mean_C, teacher.std_C, "cpu")
            marks = [started, time.perf_counter()]
            for module in (network, channels_last):
                with torch.no_grad():
                    for batch in images.split(batch_size):
                        module(batch)
                marks.append(time.perf_counter())
            features_and_moments(channels_last, images, chunk.labels_N, batch_size=batch_size)
            marks.append(time.perf_counter())
            decode_s, *work_s = np.diff(marks).tolist()
            names = ("network", "network in channels-last", "the stage's core function")
            for name, seconds in zip(names, work_s, strict=True):
                rate = len(images) / (decode_s + seconds)
                rates.setdefault(f"bare loop: decode + {name}", []).append(rate)
            started = time.perf_counter()
    return rates


def orchestration(ipc: int = 10, out: str | None = None) -> None:
    """Where the time of the embedded digits run goes: wall-clock, inside core functions, and the difference.

    Args:
        ipc: Images per class.
        out: JSON file to write.
    """
    with tempfile.TemporaryDirectory() as folder:
        total = distill(folder, "--recipe", "digits", "--ipc", str(ipc))
        stages = [read_stage(folder, room) for room in ROOMS]
    times = [(s["stage"], s["seconds"], s["metrics"].get("seconds_in_core", 0.0)) for s in stages]
    times.append(("start, end", total - sum(wall for _, wall, _ in times), 0.0))
    times.append(("total", total, sum(core for _, _, core in times)))
    rows = [
        {"stage": stage, "wall_s": wall, "core_s": core, "difference_s": wall - core}
        for stage, wall, core in times
    ]
    report(rows, {"recipe": "digits", "ipc": ipc, "n": 1}, out)


def distill(out: str, *options: str) -> float:
    """Run jobs/distill.py into `out` and return its wall-clock seconds."""
    started = time.monotonic()
    job = str(ROOT / "jobs" / "distill.py")
    subprocess.run([sys.executable, job, "--out", out, *options], check=True, stdout=sys.stderr)
    return time.monotonic() - started


def read_stage(out: str, room: str) -> Any:
    """Return what the stage.json of a room says."""
    return json.loads((Path(out) / room / "stage.json").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
