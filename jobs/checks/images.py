"""The doctor's look at the input: the real images, and the teacher on a sample of the held-out ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from wmdd_ray.errors import BadImageError
from wmdd_ray.product.tables import size
from wmdd_ray.store.images import decode_image
from wmdd_ray.store.sources import Shard, Source
from wmdd_ray.store.sources.passed import left_out
from wmdd_ray.units.own_data import class_counts, doubts, sample, shape_of

from ..own_data import told_network
from .report import Finding, Visit, many

_SHARDS = 8
_RECORDS = 32
_SHOWN = 3
_HELD_OUT_CLASSES = 100
_HELD_OUT_PER_CLASS = 20
_HELD_OUT_IMAGES = 2000


def check_data(visit: Visit) -> Iterator[Finding]:
    """Open both splits, count every class where that is cheap, and decode a sample."""
    ipc, atoms = visit.job.config.ipc, visit.job.config.num_atoms
    for split in ("train", "val"):
        source: Source = visit.run.source(split)
        shards = source.shards(_RECORDS)
        names = source.class_names
        counts = class_counts(source, shards)
        titles = zip(names, source.titles, strict=False)
        called = [f"{name} ({title.partition(',')[0]})" for name, title in titles] or names
        total = sum(counts.values()) if counts else source.num_images
        each = (
            f"{_span(counts.values())} of each" if counts else "how many of each only reading tells"
        )
        passed = left_out(source.passed_over)
        yield Finding(
            "ok",
            f"{split}: {'an unknown number of' if total is None else total} images ({source.format}, "
            f"{size(source.total_bytes)}) of {len(names)} classes ({_shown(called)}), {each}"
            + (f"; {passed}" if passed else ""),
        )
        absent = [
            k
            for k in range(len(names))
            if counts and counts[k] < (atoms if split == "train" else 1)
        ]
        classes = _shown(
            [f'class {k} ("{names[k]}") has {counts[k]} images' for k in absent if counts]
        )
        if absent and split == "train":
            yield Finding(
                "FAIL",
                f"train: {classes}, but ipc is {ipc}"
                + (f" of {atoms // ipc} tiles" if atoms > ipc else ""),
                "lower --ipc, or drop the class"
                if counts and all(counts[k] for k in absent)
                else "take classes without an image out of the class names (classes.txt, the names that the files declare)",
            )
        elif absent:
            yield Finding(
                "warning", f"val: {classes}", "how well they are told apart stays unknown"
            )
        yield from _sample(visit, split, source, shards)


def _sample(visit: Visit, split: str, source: Source, shards: Sequence[Shard]) -> Iterator[Finding]:
    """Decode the first images of a few shards."""
    config = visit.job.config.source
    records = sample(source, shards, _SHARDS, _SHARDS * _RECORDS)
    bad: list[str] = []
    for record in records:
        try:
            if record.problem:
                raise BadImageError(f"{record.key}: {record.problem}")
            decode_image(record.content, config, record.key)
        except BadImageError as error:
            bad.append(str(error))
    if not records:
        yield Finding(
            "FAIL",
            f"{split}: no image in {many(min(len(shards), _SHARDS), 'shard')}",
            "check --data",
        )
    elif bad:
        lost = len(bad) > config.max_bad_images or len(bad) == len(records)
        yield Finding(
            "FAIL" if lost else "warning",
            f"{split}: {len(bad)} of {len(records)} sampled images are bad, first {bad[0]}",
            f"restore them; a run stops at more than --source.max-bad-images {config.max_bad_images}",
        )
    good = [shape for record in records if (shape := shape_of(record)) is not None]
    if good:
        sides, colors = zip(*good, strict=True)
        kinds = f"{sum(colors)} in color" if any(colors) else "gray"
        target = f"{config.image_size} px {'gray' if config.channels == 1 else 'color'}"
        yield Finding(
            "ok",
            f"{split}: {len(records) - len(bad)} of {len(records)} sampled images decode: {_span(sides)} px, {kinds}; "
            f"the run makes {target}",
        )
        if split == "train" and visit.job.config.data != "digits":
            for doubt, advice in doubts(good, config):
                yield Finding("warning", f"{split}: {doubt}", advice)


def check_teacher(visit: Visit) -> Iterator[Finding]:
    """Measure the teacher that is given or committed on a sample of the held-out images."""
    from wmdd_ray.core import networks, teacher_check
    from wmdd_ray.core.device import device_for
    from wmdd_ray.units.given_teacher import check_names, given_network
    from wmdd_ray.units.held_out import Listed
    from wmdd_ray.units.teacher import measure, read_teacher

    config, run = visit.job.config, visit.run
    names = run.source("train").class_names
    device = device_for(-1)
    room = run.room("teacher")
    if config.teacher is not None:
        where = f"--teacher {config.teacher}"
        network_config, network = given_network(config, config.teacher, names)
        teacher_check.check_teacher(network, needs_norms=config.needs_norms, **config.source.shape)
        arch = network_config.arch
        network = network.to(device).eval()
    elif "storage" not in visit.failed and room.read_commit() is not None:
        teacher = read_teacher(room)
        where, arch = room.store.uri, teacher.arch
        check_names(teacher.class_names, names, where)
        network = networks.network_of(teacher, device, own_code=True)
    else:
        squeeze = config.squeeze
        yield Finding(
            "ok",
            f"none given: squeeze trains a {told_network(squeeze.network)} for {many(squeeze.epochs, 'epoch')}",
        )
        return
    val: Source = run.source("val")
    listed = Listed(source=val, shards=held_out_sample(val), config=config.source)
    check_order = config.teacher is not None and config.squeeze.check_class_order
    top1 = measure(network, listed, config, where, device, check_order=check_order)
    yield Finding(
        "ok",
        f"{where}: {arch}, the data's {len(names)} classes in their order, top-1 {100 * top1:.1f} % on a sample of the "
        f"held-out images (chance {100 / len(names):.1f} %)",
    )


def held_out_sample(source: Source) -> list[Shard]:
    """Return shards with some images of many classes, or, where files mix the classes, a few files."""
    shards = source.shards(_HELD_OUT_PER_CLASS)
    if all(shard.labels is not None for shard in shards):
        first = {shard.labels: shard for shard in reversed(shards)}
        return _spread(list(first.values()), _HELD_OUT_CLASSES)
    chosen: list[Shard] = []
    num_images = 0
    for shard in _spread(shards, _SHARDS):
        if num_images < _HELD_OUT_IMAGES:
            chosen.append(shard)
            num_images += shard.num_images or _HELD_OUT_IMAGES // 2
    return chosen


def _spread(shards: Sequence[Shard], count: int) -> list[Shard]:
    """Return at most `count` shards, evenly spread from the first on."""
    step = max(1, -(-len(shards) // count))
    return list(shards[::step])


def _span(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]}" if ordered[0] == ordered[-1] else f"{ordered[0]} to {ordered[-1]}"


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
