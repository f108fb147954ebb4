"""Pictures of a run, by matplotlib."""

from __future__ import annotations

import io

import numpy as np


def preview(rows: list[tuple[str, np.ndarray]]) -> bytes:
    """Return a PNG grid: a class a row with its name, an image a column.

    Args:
        rows: (class name, images uint8 (K, H, W, C) with C 1 or 3) of each class, at least one.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(len(images) for _, images in rows)
    names = [name if len(name) <= 18 else name[:17] + "…" for name, _ in rows]
    cell, margin = 0.55, 0.15 + 0.085 * max(len(name) for name in names)
    width = cell * columns + margin
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(width, cell * len(rows)), squeeze=False, dpi=150
    )
    for axes_row, name, (_, images_KHWC) in zip(axes, names, rows, strict=True):
        for axis in axes_row:
            axis.axis("off")
        for axis, image in zip(axes_row, images_KHWC, strict=False):
            axis.imshow(image.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes_row[0].text(
            -0.15, 0.5, name, transform=axes_row[0].transAxes, ha="right", va="center", fontsize=8
        )
    figure.subplots_adjust(
        left=margin / width,
        right=0.99,
        top=0.99,
        bottom=0.01,
        wspace=0.06,
        hspace=0.06,
    )
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return sink.getvalue()
