"""Label files of every option: their bytes, what is read back of them, and their bytes for 1000 synthetic classes.

Legend: N images, V views, Y classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from jobs.benches.labels.options import Option, options_of
from jobs.benches.reporting import Row
from wmdd_ray.config import DistillConfig, RelabelConfig, ViewConfig
from wmdd_ray.core.soft_labels import compress, decompress, label_views
from wmdd_ray.core.views import StoredImages, concatenate_views, draw_block
from wmdd_ray.dataset import cycled
from wmdd_ray.records import SoftLabelBlock, ViewDraw, Views
from wmdd_ray.store import codecs
from wmdd_ray.units.labels import draw_of, unlabeled_block

# Logits of the synthetic set: spread of the others, and how far the true class and the mixed-in one stand out.
_SPREAD, _PEAK = 2.5, 8.0
_SYNTHETIC_CLASSES, _SYNTHETIC_VIEWS, _SYNTHETIC_EPOCHS = 1000, 8192, 300


@dataclass(frozen=True, eq=False)
class Asked:
    """What a teacher says of all views: views and logits (float32 NY) by epoch, the same for all options."""

    draw: ViewDraw
    views: list[Views]
    logits: list[np.ndarray]


def ask(
    config: DistillConfig, network: torch.nn.Module, images: StoredImages, image_size: int
) -> Asked:
    """Draw the views of all epochs and ask the teacher."""
    index_N = np.arange(len(images), dtype=np.int32)
    draw = draw_of(config, index_N, image_size=image_size, name="0000")
    views = [draw_block(draw, range(e, e + 1)) for e in range(config.relabel.epochs)]
    batch_size = config.relabel.batch_size
    logits = [label_views(network, images, of_epoch, image_size, batch_size) for of_epoch in views]
    return Asked(draw, views, logits)


@dataclass(frozen=True, eq=False)
class Stored:
    """Bytes of an option's files, and epoch -> (views, logits) as they are read back."""

    size_bytes: int
    epoch: Callable[[int], tuple[Views, np.ndarray]]


def store(asked: Asked, option: Option) -> Stored:
    """Return an option's labels as they are stored."""
    relabel, epochs = option.relabel, len(asked.views)
    stored = epochs // option.shared
    size_bytes, blocks = 0, []
    for first in range(0, stored, relabel.epochs_per_unit):
        block = _block(asked, range(first, min(first + relabel.epochs_per_unit, stored)), relabel)
        content = codecs.encode_soft_labels(block)
        size_bytes += len(content)
        blocks.append(codecs.decode_soft_labels(content, draw_block))
    logits = asked.logits
    if relabel.labels != "online":
        logits = [
            part
            for block in blocks
            for part in np.split(decompress(block.labels), block.num_epochs)
        ]
    order = cycled(stored, epochs)
    return Stored(size_bytes, lambda epoch: (asked.views[order[epoch]], logits[order[epoch]]))


def _block(asked: Asked, epochs: range, relabel: RelabelConfig) -> SoftLabelBlock:
    draw = asked.draw if relabel.stored_views == "seed" else None
    if relabel.labels == "online":
        num_classes = asked.logits[0].shape[1]
        return replace(unlabeled_block(asked.draw, epochs, num_classes=num_classes), draw=draw)
    part = slice(epochs.start, epochs.stop)
    return SoftLabelBlock(
        first_epoch=epochs.start,
        num_epochs=len(epochs),
        views=concatenate_views(asked.views[part]),
        labels=compress(np.concatenate(asked.logits[part]), relabel),
        draw=draw,
    )


def synthetic_rows(step: float, shared: int, num_views: int = _SYNTHETIC_VIEWS) -> list[Row]:
    """Return the bytes of labels of 1000 classes at 10 images a class and 300 epochs, from a sample of the views.

    The logits are not a network's: normal, with a peak for the view's class and up to as high a one for its partner's.
    """
    classes = _SYNTHETIC_CLASSES
    rng = np.random.default_rng(0)
    logits_VY = (_SPREAD * rng.standard_normal((num_views, classes))).astype(np.float32)
    view_V = np.arange(num_views)
    views = ViewConfig()
    draw = ViewDraw(
        seed=0,
        image_size=224,
        index_N=view_V.astype(np.int32),
        crop_scale_min=views.crop_scale_min,
        flip=views.flip,
        mix=views.mix,
    )
    drawn = draw_block(draw, range(1))
    logits_VY[view_V, view_V % classes] += _PEAK * drawn.share_V
    logits_VY[view_V, drawn.partner_V % classes] += _PEAK * (1 - drawn.share_V)
    full = RelabelConfig(stored_views="rows")
    top = replace(full, compression="top_k", top_k=10, stored_views="seed")
    stepped = replace(top, precision="int8", step=step)
    options = [
        *options_of(full, (step,), (), 1)[:4],
        Option("top 10, fp16", top, "fkd"),
        Option(f"top 10, int8, steps of {step:g}", stepped, "coarse"),
        Option(
            f"top 10, int8, steps of {step:g}, 1/{shared} of the epochs",
            stepped,
            "shared",
            shared,
        ),
    ]
    rows: list[Row] = []
    for option in options:
        block = SoftLabelBlock(
            first_epoch=0,
            num_epochs=1,
            views=drawn,
            labels=compress(logits_VY, option.relabel),
            draw=draw if option.relabel.stored_views == "seed" else None,
        )
        bytes_a_view = len(codecs.encode_soft_labels(block)) / num_views
        label_epochs = _SYNTHETIC_EPOCHS // option.shared
        row: Row = {
            "ipc": 10,
            "images": "1000 synthetic classes",
            "labels": option.name,
            "label_epochs": label_epochs,
            "bytes": round(bytes_a_view * 10 * classes * label_epochs),
            "bytes_a_view": round(bytes_a_view, 1),
        }
        row["times_smaller"] = round((rows[0] if rows else row)["bytes"] / row["bytes"], 1)
        rows.append(row)
    return rows
