"""A teacher trained by a group of Ray Train workers that share the parts of each batch, on images in memory or streamed."""

from __future__ import annotations

import logging
import os
import socket
import sys
import tempfile
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import RunConfig
from ray.train.backend import Backend
from ray.train.torch import TorchConfig, TorchTrainer

from wmdd_ray.config import SourceConfig
from wmdd_ray.core.device import device_for
from wmdd_ray.errors import WmddError
from wmdd_ray.executors import here, train_groups
from wmdd_ray.executors.causes import root_cause
from wmdd_ray.executors.cluster import Width, await_room, is_one_machine, width
from wmdd_ray.executors.heap import keep_freed_memory
from wmdd_ray.executors.queue import reporter
from wmdd_ray.executors.workers import device_of_worker
from wmdd_ray.spine.run import StageRun
from wmdd_ray.store.sources import Shard, Source
from wmdd_ray.store.sources.chunks import DecodedChunk, decoded_shards
from wmdd_ray.units.teacher import CHUNK_IMAGES, Training, shuffled_stream, train_teacher

logger = logging.getLogger(__name__)


def train(stage: StageRun, training: Training, source: Source, num_finished: int) -> None:
    """Train a teacher on as many workers as the run's resources say; `num_finished` others are done."""
    wide = width(stage.resources)
    if wide.num_workers == 0:
        keep_freed_memory()
        here.train(stage, training, source, num_finished)
        return
    num_parts = stage.config.squeeze.batch_parts
    num_workers = max(n for n in range(1, wide.num_workers + 1) if num_parts % n == 0)
    if wide.gpus % 1 and num_workers > 1:
        logger.warning(
            "1 worker trains: several need a whole GPU each for NCCL, and --gpus-per-worker is %g",
            wide.gpus,
        )
        num_workers = 1
    elif num_workers < wide.num_workers:
        logger.warning(
            "%d of %d workers train: --squeeze.batch-parts %d lets all of them share each batch, and makes another teacher",
            num_workers,
            wide.num_workers,
            wide.num_workers,
        )
    wide = replace(wide, num_workers=num_workers)
    await_room(stage, wide, num_needed=num_workers)
    if wide.gpus:
        _try_gpu(wide)
    loop: dict[str, Any] = {"training": training, "gpus": wide.gpus}
    if training.train is None:
        spare = int(ray.cluster_resources().get("CPU", 0)) - num_workers * wide.cpus
        loop |= {
            "source": source,
            "shards": source.shards(CHUNK_IMAGES),
            "num_tasks": -(-spare // num_parts),
        }
    backend = "nccl" if wide.gpus else "gloo"
    with (
        train_groups.queue_actor(stage, [training.unit], num_finished) as queue,
        tempfile.TemporaryDirectory() as folder,
    ):
        torch_config = TorchConfig(backend=backend)
        if is_one_machine():
            torch_config = LoopbackConfig(backend=backend, folder=folder)

        def fit(run_config: RunConfig) -> None:
            TorchTrainer(
                _worker_loop,
                train_loop_config={**loop, "queue": queue},
                torch_config=torch_config,
                scaling_config=train_groups.scaling(wide, num_workers, elastic=False),
                run_config=run_config,
            ).fit()

        train_groups.fit_until_done(stage, queue, fit)


def _try_gpu(wide: Width) -> None:
    """Raise the ConfigError of a GPU that torch cannot use: NCCL would fail again and again, and not say why."""
    try:
        ray.get(ray.remote(num_cpus=1, num_gpus=wide.gpus)(device_for).remote(wide.gpus))
    except RayError as error:
        raise root_cause(error) from error


@dataclass
class LoopbackConfig(TorchConfig):
    """A process group of workers of one machine. torch's own store would listen on every interface, and ask for no token."""

    folder: str = ""
    """Where the workers meet; nobody else may write there."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Loopback


class _Loopback(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: LoopbackConfig) -> None:
        meeting = f"{backend_config.folder}/{uuid.uuid4().hex}"  # another one for each attempt
        num_workers = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(
                    rank, _meet, backend_config.backend, rank, num_workers, meeting
                )
                for rank in range(num_workers)
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: LoopbackConfig) -> None:
        worker_group.execute_async(_part)


def _meet(backend: str, rank: int, num_workers: int, meeting: str) -> None:
    """Enter the process group of `num_workers`, by a file, with sockets on the loopback interface only."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    dist.init_process_group(
        backend=backend,
        store=dist.FileStore(meeting, num_workers),
        rank=rank,
        world_size=num_workers,
        timeout=timedelta(minutes=30),
    )


def _part() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _worker_loop(loop: dict[str, Any]) -> None:
    training: Training = loop["training"]
    unit = training.unit
    if unit in training.room.finished():
        return  # the group was started again after its last commit
    keep_freed_memory()
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    queue = train_groups.RemoteQueue(loop["queue"])
    if queue.error() is not None:
        return  # the group was started again after it, as Ray Train does after any
    if rank == 0:
        queue.join(rank, world, socket.gethostname())
        queue.take(rank)
    try:
        streamed = None
        if training.train is None:
            source, num_tasks = loop["source"], loop["num_tasks"]
            decode = None
            if num_tasks > 0:
                config = training.config.source
                decode = partial(_decoded_by_tasks, ray.put(source), config, num_tasks)
            streamed = shuffled_stream(training, source, loop["shards"], decode)
        train_teacher(
            training,
            reporter(queue, unit),
            device=device_of_worker(loop["gpus"]),
            rank=rank,
            world=world,
            streamed=streamed,
        )
    except Exception as error:
        cause = root_cause(error)  # what tasks that decode raise is ours and Ray's at once
        if not isinstance(cause, WmddError):
            raise
        queue.fail(unit, cause)
        if world > 1:
            raise cause from error  # the others would wait for this one in their next collective
        return
    if rank == 0:
        queue.report(unit, 1.0, "")


def _decoded_by_tasks(
    source: ray.ObjectRef[Source], config: SourceConfig, num_tasks: int, shards: Sequence[Shard]
) -> Iterator[DecodedChunk]:
    """Yield the images of shards in their order, decoded by some tasks at a time wherever a CPU is free.

    Ray Data keeps this order too (`preserve_order`) and bounds its memory, but begins an execution for every epoch and part in
    every worker: 40 shards of 4 chunks took 78 and 96 s by it, 22 and 13 s so (two busy cores, each in turn, 2026-11-30). Its
    streams to several workers (`streaming_split`) hand blocks to whoever asks, so that parts would depend on timing.
    """
    decode = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(decoded_shards)
    decode = decode.options(num_returns="streaming", _generator_backpressure_num_objects=2)
    tasks = (decode.remote(source, config, CHUNK_IMAGES, [shard]) for shard in shards)
    under_way = deque(islice(tasks, num_tasks))
    while under_way:
        for chunk in under_way.popleft():
            yield ray.get(chunk)
        under_way += islice(tasks, 1)


def count_images(source: Source) -> int:
    """Return the number of images of a source that only reading tells, by one task a shard."""
    held = ray.put(source)

    @ray.remote
    def count(shard: Any) -> int:
        return sum(1 for _ in ray.get(held).read_shard(shard))

    try:
        return sum(ray.get([count.remote(shard) for shard in source.shards(CHUNK_IMAGES)]))
    except RayError as error:
        raise root_cause(error) from error
