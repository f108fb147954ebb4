"""A teacher trained by a group of Ray Train workers that share each batch, on images in memory or streamed by Ray Data."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.train
import ray.train.torch
import torch
from ray.train import RunConfig
from ray.train.torch import TorchConfig, TorchTrainer

from wmdd_ray.config import SourceConfig
from wmdd_ray.core.batches import Batch
from wmdd_ray.errors import WmddError
from wmdd_ray.executors import here, train_groups
from wmdd_ray.executors.cluster import width
from wmdd_ray.executors.heap import keep_freed_memory
from wmdd_ray.executors.queue import reporter
from wmdd_ray.executors.workers import device_of_worker
from wmdd_ray.spine.run import StageRun
from wmdd_ray.store.sources import Shard, Source, decoded_chunks
from wmdd_ray.units.teacher import CHUNK_IMAGES, SHUFFLED_IMAGES, Training, train_teacher


def train(stage: StageRun, training: Training, source: Source, num_finished: int) -> None:
    """Train a teacher on as many workers as the run's resources say; `num_finished` others are done."""
    wide = width(stage.resources)
    if wide.num_workers == 0:
        keep_freed_memory()
        here.train(stage, training, source, num_finished)
        return
    streamed = training.train is None
    datasets = {"train": _stream(source, stage.config.source)} if streamed else {}
    with train_groups.queue_actor(stage, [training.unit], num_finished) as queue:

        def fit(run_config: RunConfig) -> None:
            TorchTrainer(
                _worker_loop,
                train_loop_config={"training": training, "queue": queue, "cpus": wide.cpus},
                torch_config=TorchConfig(backend="nccl" if wide.gpus else "gloo"),
                scaling_config=train_groups.scaling(wide, wide.num_workers, elastic=False),
                run_config=run_config,
                datasets=datasets,
            ).fit()

        train_groups.fit_until_done(stage, queue, fit)


def _worker_loop(loop: dict[str, Any]) -> None:
    training: Training = loop["training"]
    unit, config = training.unit, training.config
    if unit in training.room.finished():
        return  # the group was started again after its last commit
    keep_freed_memory()
    torch.set_num_threads(loop["cpus"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    queue = train_groups.RemoteQueue(loop["queue"])
    streamed = None
    if training.train is None:
        share = max(1, config.squeeze.batch_size // world)
        streamed = partial(_streamed_batches, config.source, share, training.seed)
    if rank == 0:
        queue.join(rank, world, socket.gethostname())
        queue.take(rank)
    try:
        train_teacher(
            training,
            reporter(queue, unit),
            device=device_of_worker(),
            rank=rank,
            world=world,
            parallel=partial(ray.train.torch.prepare_model, move_to_device=False),
            streamed=streamed,
        )
    except WmddError as error:
        queue.fail(unit, error)
        return
    if rank == 0:
        queue.report(unit, 1.0, "")


def _streamed_batches(
    config: SourceConfig, batch_size: int, seed: int, epoch: int
) -> Iterator[Batch]:
    """Yield batches of the worker's part of the stream, shuffled in a buffer."""
    shape = (config.image_size, config.image_size, config.channels)
    stream = ray.train.get_dataset_shard("train")
    assert stream is not None
    batches = stream.iter_batches(
        batch_size=batch_size,
        batch_format="pyarrow",
        drop_last=True,
        local_shuffle_buffer_size=max(SHUFFLED_IMAGES, batch_size),
        local_shuffle_seed=(seed + epoch) % 2**32,
    )
    for batch in batches:
        pixels = b"".join(batch["pixels"].to_pylist())
        images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(-1, *shape)
        yield images, torch.tensor(batch["label"].to_numpy())


def _stream(source: Source, config: SourceConfig) -> ray.data.Dataset:
    """Return a Ray Data stream with an image a row; the shards come in another order every epoch."""
    shards = [{"shard": shard.written()} for shard in source.shards(CHUNK_IMAGES)]
    held = ray.put(source)

    def decode(batch: pa.Table) -> Iterator[pa.Table]:
        shard = Shard.read(batch["shard"][0].as_py())
        for chunk in decoded_chunks(ray.get(held), shard, config, CHUNK_IMAGES):
            pixels = [image.tobytes() for image in chunk.images_NHWC]
            yield pa.table({"pixels": pa.array(pixels, pa.binary()), "label": chunk.labels_N})

    rows = ray.data.from_items(shards, override_num_blocks=len(shards)).randomize_block_order()
    return rows.map_batches(decode, batch_size=1, batch_format="pyarrow")


def count_images(source: Source) -> int:
    """Return the number of images of a source that only reading tells, by one task a shard."""
    held = ray.put(source)

    @ray.remote
    def count(shard: Any) -> int:
        return sum(1 for _ in ray.get(held).read_shard(shard))

    return sum(ray.get([count.remote(shard) for shard in source.shards(CHUNK_IMAGES)]))
