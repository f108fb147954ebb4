"""Pictures small enough to lie in a page, and how many of them fit."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

# Up to this side, in pixels, a picture is stored as it is; above, WebP's losses do not show.
_LOSSLESS_SIDE = 64
_QUALITY = 80
_SIDES = (224, 160, 112, 80, 56)


def thumbnail(image_HWC: np.ndarray, side: int) -> str:
    """Return a uint8 image with 1 or 3 channels as a data URI, with a longer side of at most `side` pixels."""
    squeezed = image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
    picture = Image.fromarray(squeezed)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    sink = io.BytesIO()
    if max(picture.size) <= _LOSSLESS_SIDE:
        picture.save(sink, format="PNG", optimize=True)
        kind = "png"
    else:
        picture.save(sink, format="WEBP", quality=_QUALITY)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(sink.getvalue()).decode()}"


def fit(
    sample: list[np.ndarray], num_classes: int, most_images: int, budget_bytes: int
) -> tuple[int, int]:
    """Return (side in pixels, images of a class) such that all pictures take at most about `budget_bytes`.

    Pixels are given up before images, and images only down to one.

    Args:
        sample: the pictures that stand for one image (distilled, start, real), of those that compress worst.
        num_classes: classes shown.
        most_images: images of a class that are there to be shown.
        budget_bytes: for all of them, as they lie in the page.
    """

    def bytes_of(side: int) -> int:
        return sum(len(thumbnail(image, side)) for image in sample)

    side = _SIDES[-1]
    for candidate in _SIDES:
        if num_classes * most_images * bytes_of(candidate) <= budget_bytes:
            return candidate, most_images
    images = budget_bytes // max(1, num_classes * bytes_of(side))
    return side, max(1, min(most_images, images))
