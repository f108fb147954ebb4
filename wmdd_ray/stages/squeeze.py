"""squeeze: a classifier trained on the real images with Ray Train, or one that is given; several where several label.

Whichever it is, its top-1 on held-out images is measured before anything is built on it, and a teacher at chance
level or with its classes in another order is refused.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from wmdd_ray.config import DistillConfig, SourceConfig
from wmdd_ray.core.batches import Batch, in_memory_batches, steps_of
from wmdd_ray.core.networks import build_network
from wmdd_ray.core.optimizer import State, load_training_state, make_optimizer, training_state
from wmdd_ray.core.training import train_classifier
from wmdd_ray.errors import WmddError
from wmdd_ray.options import fingerprint_options
from wmdd_ray.run import StageRun, Work, unit_seed
from wmdd_ray.stages import train_groups, workers
from wmdd_ray.stages.checkpoints import Checkpoints
from wmdd_ray.stages.cluster import width
from wmdd_ray.stages.features import check_listed
from wmdd_ray.stages.given_teacher import import_teacher
from wmdd_ray.stages.heap import keep_freed_memory
from wmdd_ray.stages.held_out import Listed
from wmdd_ray.stages.queue import UnitQueue
from wmdd_ray.stages.teacher import UNIT, commit_teacher, measure, units_of
from wmdd_ray.store.sources import Shard, Source, decoded_chunks

_STATE_EVERY_S = 20.0
_STREAM_CHUNK_IMAGES = 256
_SHUFFLE_IMAGES = 4096


def options(config: DistillConfig) -> dict[str, Any]:
    """Return the options that the teachers depend on; given ones do not depend on the training's."""
    several = {"teachers": config.num_teachers} if config.num_teachers > 1 else {}
    source = fingerprint_options(config.source)
    if config.teacher is not None:
        squeeze = fingerprint_options(config.squeeze)
        squeeze = {name: squeeze[name] for name in ("network", "min_top1")}
        return {"teacher": config.teacher, "source": source, "squeeze": squeeze, **several}
    # Where the curvature's weight comes from makes no difference to the teacher.
    squeeze = fingerprint_options(config.squeeze.at_ipc(config.ipc))
    about = {"teacher": None, "seed": config.seed, "source": source}
    return {**about, "squeeze": squeeze, **several}


def plan(stage: StageRun) -> Work:
    """Return a unit a teacher."""
    network = build_network(
        stage.config.squeeze.network,
        num_classes=len(stage.run.source("train").class_names),
        channels=stage.config.source.channels,
        image_size=stage.config.source.image_size,
    )
    units, size = units_of(stage.config), sum(4 * p.numel() for p in network.parameters())
    return Work(units=units, estimated_bytes=len(units) * size)


def work(stage: StageRun) -> dict[str, Any]:
    """Train or import each teacher, measure it, and commit it."""
    units, finished = units_of(stage.config), stage.room.finished()
    left = [unit for unit in units if unit not in finished]
    stage.progress.start(len(units), len(units) - len(left))
    if left and stage.config.teacher is None:
        source: Source = stage.run.source("train")
        check_listed(source.shards(stage.config.features.chunk_images), source, stage.config)
    for number, unit in enumerate(left, len(units) - len(left)):
        if stage.config.teacher is None:
            _train(stage, unit, number)
        else:
            import_teacher(stage, stage.config.teacher, unit)
    markers = stage.room.read_units(units)
    top1 = [markers[unit].metrics["top1"] for unit in units]
    stage.progress.update(len(units), f"top-1 {', '.join(f'{100 * t:.1f}' for t in top1)} %")
    # Whatever is made of the images is made by the first; the others label.
    return {**markers[UNIT].metrics, **({"teachers_top1": top1} if len(units) > 1 else {})}


def _train(stage: StageRun, unit: str, found: int) -> None:
    """Train a teacher with Ray Train: DDP over the workers, or in the driver; `found` of them are finished."""
    wide = width(stage.resources)
    source: Source = stage.run.source("train")
    limit = int(stage.config.squeeze.memory_limit_gib * 2**30)
    image_bytes = stage.config.source.image_size**2 * stage.config.source.channels
    in_memory = source.num_images is not None and source.num_images * image_bytes <= limit
    datasets, num_images = {}, source.num_images
    if not in_memory:
        num_images = num_images or _count(source)
        datasets["train"] = _stream(source, stage.config.source)
    config: dict[str, Any] = {
        "room": stage.room,
        "unit": unit,
        "config": stage.config,
        "source": source,
        "listed": Listed.of(source, stage.config.source) if in_memory else None,
        "num_images": num_images,
        "val": Listed.of(stage.run.source("val"), stage.config.source),
        "cpus": wide.cpus,
    }

    def trainer(queue: Any, run_config: RunConfig | None) -> TorchTrainer:
        return TorchTrainer(
            _train_loop,
            train_loop_config={**config, "queue": queue},
            torch_config=TorchConfig(backend="nccl" if wide.gpus else "gloo"),
            scaling_config=train_groups.scaling(wide, wide.num_workers, elastic=False),
            run_config=run_config,
            datasets=datasets,
        )

    if wide.num_workers == 0:
        queue = UnitQueue(
            [unit], lambda done, note: stage.progress.update(found + done, note), stage.event
        )
        with train_groups.quiet_environment():
            trainer(queue, None).fit()
        error = queue.error()
        if error is not None:
            raise error
        return
    with train_groups.queue_actor(stage, [unit], found) as actor:
        train_groups.fit_until_done(
            stage, actor, lambda run_config: trainer(actor, run_config).fit()
        )


def _train_loop(config: dict[str, Any]) -> None:
    """Train on one worker. Rank 0 keeps the resumable state, measures the result and commits it."""
    if config["unit"] in config["room"].finished():
        return  # the group was started again after its last commit
    try:
        _train_on_worker(config)
    except WmddError as error:
        workers.call(config["queue"], "fail", config["unit"], error)


def _train_on_worker(loop: dict[str, Any]) -> None:
    started = time.perf_counter()
    keep_freed_memory()
    config: DistillConfig = loop["config"]
    unit: str = loop["unit"]
    source: Source = loop["source"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(loop["cpus"])
    device = workers.device_of_worker()
    seed = unit_seed(config.seed, "squeeze", unit)
    torch.manual_seed(seed)
    network = build_network(
        config.squeeze.network,
        num_classes=len(source.class_names),
        channels=config.source.channels,
        image_size=config.source.image_size,
    ).to(device)
    network.to(memory_format=torch.channels_last)
    squeeze = config.squeeze.at_ipc(config.ipc)
    optimizer = make_optimizer(
        network, "sgd", learning_rate=squeeze.learning_rate, weight_decay=squeeze.weight_decay, momentum=squeeze.momentum
    )  # fmt: skip
    keep = Checkpoints(loop["room"], unit, _STATE_EVERY_S)
    first, losses, curvatures = _resume(keep, network, optimizer, rank, world)
    attempt = None
    if rank == 0:
        workers.call(loop["queue"], "join", rank, world, socket.gethostname())
        workers.call(loop["queue"], "take", rank)
        attempt = loop["room"].begin_unit(unit)
    parallel = ray.train.torch.prepare_model(network, move_to_device=False)
    report = workers.reporter(loop["queue"], unit)

    def get_state(epoch: int) -> State:
        state = training_state(network, optimizer)
        state |= {"epoch": np.array(epoch), "losses": np.array(losses)}
        return state | ({"curvatures": np.array(curvatures)} if curvatures else {})

    told = "" if unit == UNIT else f"{unit}, "

    def on_curvature(epoch: int, term: float) -> None:
        curvatures.append(round(term, 4))

    def on_epoch(epoch: int, loss: float) -> None:
        losses.append(round(loss, 4))
        if rank == 0:
            bent = f", curvature {curvatures[-1]:.3f}" if curvatures else ""
            report(
                (epoch + 1) / (squeeze.epochs + 1),
                f"{told}epoch {epoch + 1}/{squeeze.epochs}, loss {loss:.3f}{bent}",
                epoch=epoch + 1,
                loss=loss,
            )
            keep.maybe(lambda: get_state(epoch + 1))

    train_classifier(
        parallel,
        optimizer,
        _epoch_batches(loop, rank, world, seed),
        squeeze,
        steps_per_epoch=steps_of(loop["num_images"], squeeze.batch_size),
        mean_C=config.source.mean,
        std_C=config.source.std,
        seed=seed,
        rank=rank,
        start_epoch=first,
        on_epoch=on_epoch,
        on_curvature=on_curvature,
    )
    if attempt is not None:
        network.eval()
        top1 = measure(network, loop["val"], config, f"the trained {unit}", device)
        extra: dict[str, Any] = {"losses": losses}
        if curvatures:
            extra |= {"curvatures": curvatures, "curvature_weight": squeeze.curvature_weight}
        commit_teacher(
            loop["room"],
            config,
            squeeze.network,
            network,
            source.class_names,
            top1,
            started,
            extra,
            attempt=attempt,
            unit=unit,
        )
        keep.clear()
        workers.call(loop["queue"], "report", unit, 1.0, "")


def _resume(
    keep: Checkpoints,
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rank: int,
    world: int,
) -> tuple[int, list[float], list[float]]:
    """Load the state of an interrupted training; return (first epoch, losses so far, curvature terms so far)."""
    held = [keep.load() if rank == 0 else None]
    if world > 1:
        # Read once, because two readings of a store can find two states, and all workers have to begin at one.
        device = next(network.parameters()).device
        torch.distributed.broadcast_object_list(held, src=0, device=device)
    state = held[0]
    if state is None:
        return 0, [], []
    epoch, losses = int(state.pop("epoch")), state.pop("losses").tolist()
    curvatures = state.pop("curvatures", np.zeros(0)).tolist()
    load_training_state(network, optimizer, state)
    return epoch, losses, curvatures


def _epoch_batches(loop: dict[str, Any], rank: int, world: int, seed: int) -> Any:
    """Return epoch -> batches of this rank: of images in memory, or streamed by Ray Data."""
    config: DistillConfig = loop["config"]
    batch_size = config.squeeze.batch_size
    if loop["listed"] is None:
        share = max(1, batch_size // world)
        return lambda epoch: _streamed_batches(config.source, share, seed + epoch)
    loaded = loop["listed"].load(1 << 62)
    images_NHWC, labels_N = loaded
    return lambda epoch: in_memory_batches(
        images_NHWC, labels_N, batch_size=batch_size, seed=seed, epoch=epoch, rank=rank, world=world
    )


def _streamed_batches(config: SourceConfig, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield batches of the worker's part of the stream, shuffled in a buffer."""
    shape = (config.image_size, config.image_size, config.channels)
    stream = ray.train.get_dataset_shard("train")
    assert stream is not None
    batches = stream.iter_batches(
        batch_size=batch_size,
        batch_format="pyarrow",
        drop_last=True,
        local_shuffle_buffer_size=max(_SHUFFLE_IMAGES, batch_size),
        local_shuffle_seed=seed % 2**32,
    )
    for batch in batches:
        pixels = b"".join(batch["pixels"].to_pylist())
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(-1, *shape)
        yield images, torch.tensor(batch["label"].to_numpy())


def _stream(source: Source, config: SourceConfig) -> ray.data.Dataset:
    """Return a Ray Data stream with an image a row; the shards come in another order every epoch."""
    shards = [{"shard": shard.written()} for shard in source.shards(_STREAM_CHUNK_IMAGES)]
    held = ray.put(source)

    def decode(batch: pa.Table) -> Iterator[pa.Table]:
        shard = Shard.read(batch["shard"][0].as_py())
        for chunk in decoded_chunks(ray.get(held), shard, config, _STREAM_CHUNK_IMAGES):
            pixels = [image.tobytes() for image in chunk.images_NHWC]
            yield pa.table({"pixels": pa.array(pixels, pa.binary()), "label": chunk.labels_N})

    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).randomize_block_order()
    return rows.map_batches(decode, batch_size=1, batch_format="pyarrow")


def _count(source: Source) -> int:
    """Return the number of images of a source that only reading tells, by one task a shard."""
    held = ray.put(source)

    @ray.remote
    def count(shard: Any) -> int:
        return sum(1 for _ in ray.get(held).read_shard(shard))

    return sum(ray.get([count.remote(shard) for shard in source.shards(_STREAM_CHUNK_IMAGES)]))
