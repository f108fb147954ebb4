"""A real image as it is kept: checked by decoding it, made smaller where it is large, measured."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from wmdd_ray.store import images

# Visually lossless, without chroma subsampling: what is distilled from it has been through JPEG twice.
_JPEG_QUALITY = 95
_GRAY_MODES = ("1", "L", "LA", "La", "I", "F")


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptImage:
    """An image file and, over its pixels in [0, 1] as RGB, the mean and the mean square of each channel.

    Of an image that was made smaller, before JPEG rounds them again: a difference below 1e-4.
    """

    content: bytes
    is_gray: bool
    mean_C: tuple[float, ...]
    mean_square_C: tuple[float, ...]


def kept_image(
    content: bytes | np.ndarray, *, max_side: int, max_pixels: int, where: str
) -> KeptImage:
    """Return an image with a shorter side of at most `max_side` pixels; a file that has that is kept byte for byte.

    A larger one is made gray or RGB, and resized as `images.decode_image` resizes (antialiased triangle filter, torchvision's
    rounding), so that a network that resizes to the same side sees the same pixels. It lies as it lay and keeps its EXIF
    orientation, so that --source.exif-orientation decides of all images alike when they are read. JPEG stays JPEG (quality 95,
    full chroma), everything else becomes PNG.

    Args:
        content: An image file, or pixels as uint8 HW, HW1 or HW3, which become PNG.
        max_side: Largest shorter side, pixels.
        max_pixels: Largest width x height that is decoded.
        where: Name of the image for the error.

    Raises:
        BadImageError: As `images.decode_image`.
    """
    with images.decoding(content, where):
        picture = images.loaded(content, max_pixels)
        kind = picture.format
        is_gray = picture.mode in _GRAY_MODES or picture.mode.startswith("I;16")
        plain = images.gray_or_rgb(picture, 1 if is_gray else 3)
        size = _smaller(plain.size, max_side)
        if size != plain.size:
            plain = plain.resize(size, Image.Resampling.BILINEAR)
            exif = images.orientation_of(picture)
            content = _encoded(plain, "JPEG" if kind in ("JPEG", "MPO") else "PNG", exif)
        elif isinstance(content, np.ndarray):
            content = _encoded(plain, "PNG", Image.Exif())
        pixels_PC = np.asarray(plain).reshape(-1, 1 if is_gray else 3)
    counts_CV = [np.bincount(pixels_PC[:, c], minlength=256) for c in range(pixels_PC.shape[1])]
    values_V, num_pixels = np.arange(256), len(pixels_PC)
    # Whole numbers up to the division: the same on every machine.
    mean = [int(counts_V @ values_V) / (255 * num_pixels) for counts_V in counts_CV]
    square = [int(counts_V @ values_V**2) / (255**2 * num_pixels) for counts_V in counts_CV]
    return KeptImage(
        content=content,
        is_gray=is_gray,
        mean_C=tuple(mean * 3 if is_gray else mean),
        mean_square_C=tuple(square * 3 if is_gray else square),
    )


def _smaller(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    if min(size) <= max_side:
        return size
    scaled = max_side * max(size) // min(size)
    return (max_side, scaled) if width <= height else (scaled, max_side)


def _encoded(picture: Image.Image, kind: str, exif: Image.Exif) -> bytes:
    sink = io.BytesIO()
    options: dict[str, Any] = {"exif": exif} if exif else {}
    if kind == "JPEG":
        options |= {"quality": _JPEG_QUALITY, "subsampling": 0}
    picture.save(sink, format=kind, **options)
    return sink.getvalue()
