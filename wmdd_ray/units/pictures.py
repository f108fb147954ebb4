"""Pictures of a run, by matplotlib."""

from __future__ import annotations

import io

import numpy as np

# Matplotlib brings this font along, so a preview is the same on every machine.
_FONT = "DejaVu Sans"
_CELL_INCHES = 0.55
# Of a cell, between its image and the next.
_GAP = 0.06
# A picture's side stays below matplotlib's limit of 2^16 pixels.
_MOST_PIXELS = 60_000


def preview(rows: list[tuple[int, str, np.ndarray]]) -> bytes:
    """Return a PNG grid: a class a row with its name, an image a column.

    Args:
        rows: (label, class name, images uint8 (K, H, W, C) with C 1 or 3) of each class, at least one. A name that
            the font has no letters for is shown as `class LABEL`.
    """
    from matplotlib.figure import Figure

    columns = max(len(images) for _, _, images in rows)
    names = _shown([(label, name) for label, name, _ in rows])
    margin = 0.15 + 0.085 * max(len(name) for name in names)
    width, height = _CELL_INCHES * columns + margin, _CELL_INCHES * len(rows)
    # A figure of its own, not pyplot's: nothing of the caller's matplotlib is changed.
    figure = Figure(figsize=(width, height), dpi=min(150.0, _MOST_PIXELS / max(width, height)))
    # One pair of axes in units of cells: a pair an image takes ten times as long.
    axes = figure.add_axes((margin / width, 0.01, 0.99 - margin / width, 0.98))
    for row, (name, (_, _, images_KHWC)) in enumerate(zip(names, rows, strict=True)):
        for column, image in enumerate(images_KHWC):
            left, top, right, bottom = column, row, column + 1 - _GAP, row + 1 - _GAP
            axes.imshow(
                image[:, :, 0] if image.shape[2] == 1 else image,
                extent=(left, right, bottom, top),
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
        axes.text(
            -0.15,
            row + 0.5,
            name,
            ha="right",
            va="center",
            fontsize=8,
            family=_FONT,
            parse_math=False,  # a name may hold dollar signs
        )
    axes.set(xlim=(0, columns - _GAP), ylim=(len(rows) - _GAP, 0), aspect="auto")
    axes.axis("off")
    sink = io.BytesIO()
    figure.savefig(sink, format="png", metadata={"Software": None})
    return sink.getvalue()


def _shown(classes: list[tuple[int, str]]) -> list[str]:
    """Return the text beside each row: the name, cut to 18 letters, or the label when the font lacks one of them."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    letters = FT2Font(findfont(_FONT)).get_charmap()
    texts = []
    for label, name in classes:
        text = " ".join(name.split())
        text = text if len(text) <= 18 else text[:17] + "…"
        readable = text and all(ord(letter) in letters for letter in text)
        texts.append(text if readable else f"class {label}")
    return texts
