"""Label files: how many bytes those of 1000 synthetic classes take."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from jobs.benches.labels.options import Option, options_of
from jobs.benches.reporting import Row
from wmdd_ray.config import RelabelConfig, ViewConfig
from wmdd_ray.core.soft_labels import compress
from wmdd_ray.core.views import draw_block
from wmdd_ray.records import SoftLabelBlock, ViewDraw
from wmdd_ray.store import codecs

# Logits of the synthetic set: spread of the others, and how far the true class and the mixed-in one stand out.
_SPREAD, _PEAK = 2.5, 8.0
_SYNTHETIC_CLASSES, _SYNTHETIC_VIEWS, _SYNTHETIC_EPOCHS = 1000, 8192, 300


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
        mix_alpha=views.mix_alpha,
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
