"""Encoded pictures to the network's square uint8 input, and back to PNG.

The picture is made upright (EXIF, unless told otherwise), brought to gray or RGB, resized and center-cropped with
torchvision's arithmetic, so that a teacher trained elsewhere sees the pixels that it was trained
on.

What a picture's mode becomes: 16-bit gray keeps its high byte (Pillow would clip at 255);
transparency is composited on white, the page that such pictures are drawn for (dropping the alpha
channel would show colors that nobody ever saw, and black would hide line drawings); palette, CMYK
and bilevel pictures are converted by Pillow.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import BadImageError

# Every decoder that Pillow may try is attack surface. These three cover the labelled sets in use;
# GIF, BMP and TIFF pictures are refused with a reason instead of being opened by the less-tested
# decoders.
_FORMATS = ("JPEG", "PNG", "WEBP")
# How GIF, BMP and TIFF begin.
_OTHERS = (b"GIF8", b"BM", b"II*\0", b"MM\0*")

# What Pillow raises for malformed content. OSError: truncated or unidentified; SyntaxError: broken
# chunk or marker structure; ValueError: limits and impossible headers; struct.error, IndexError,
# KeyError, TypeError, EOFError, OverflowError: Python-level header parsing past the end or on
# impossible values; zlib.error: broken PNG metadata; DecompressionBombError: Pillow's own pixel
# limit; Warning: Pillow's doubts where warnings are set to raise. MemoryError is left out on
# purpose: it tells about the machine, and must not turn a good image into a bad one.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
    OverflowError,
    zlib.error,
    Image.DecompressionBombError,
    Warning,
)

# What a picture may make Pillow do without a pixel to show for it. Real progressive JPEGs have ten scans of all
# pixels, and a hundred bytes make one more; text and application chunks cost a microsecond and 300 bytes each.
_MAX_SCANS = 16
_MAX_CHUNKS = 100_000
_SCAN = b"\xff\xda"
_CHUNK = re.compile(rb"\xff[\xe0-\xef\xfe]|[itz](?:TX|EX)t|fcTL")

_ORIENTATION = 0x0112
_TRANSPOSITION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes | np.ndarray, source: SourceConfig, where: str) -> np.ndarray:
    """Return the picture as (image_size, image_size, channels) uint8.

    Args:
        content: A JPEG, PNG or WebP file (of an animation the first frame), or pixels as uint8 HW,
        HW1 or HW3.
        source: Sizes, channels and the pixel limit.
        where: Name of the image for the error.

    Raises:
        BadImageError: Truncated, garbage, empty, or more pixels than `max_image_pixels`. Pillow's
            own limit of 179 million pixels stays in force above that. No other exception leaves
            this function for any content.
    """
    with decoding(content, where):
        picture = loaded(content, source.max_image_pixels)
        if source.exif_orientation:
            picture = upright(picture)
        pixels = np.asarray(_resize_and_crop(gray_or_rgb(picture, source.channels), source))
    return np.ascontiguousarray(
        pixels.reshape(source.image_size, source.image_size, source.channels)
    )


def encode_png(image_HWC: np.ndarray) -> bytes:
    """Return a uint8 image with 1 or 3 channels as a PNG file, lossless."""
    assert image_HWC.dtype == np.uint8, image_HWC.dtype
    assert image_HWC.ndim == 3 and image_HWC.shape[2] in (1, 3), image_HWC.shape
    squeezed = image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC
    sink = io.BytesIO()
    # A photograph of 224 px in 11 ms, where level 9 takes 30 for a hundredth of the bytes.
    Image.fromarray(squeezed).save(sink, format="PNG", compress_level=7)
    return sink.getvalue()


def decode_png(content: bytes, shape_HWC: tuple[int, int, int]) -> np.ndarray:
    """Return the pixels of a PNG file that `encode_png` wrote, uint8 HWC; its header alone decides whether they are decoded.

    Raises:
        BadImageError: It is none, or of another shape.
    """
    with decoding(content, "a distilled image"):
        if png_shape(content) != shape_HWC:
            raise ValueError(f"expected a PNG file of {shape_HWC} pixels, got {png_shape(content)}")
        picture = loaded(content, shape_HWC[0] * shape_HWC[1])
        return np.asarray(picture).reshape(shape_HWC)


def png_shape(content: bytes) -> tuple[int, int, int]:
    """Return (height, width, channels) of a PNG file by its header; a ValueError when it is none of those that we write."""
    if len(content) < 26 or content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR":
        raise ValueError(
            f"expected a PNG file, got {len(content)} bytes that start with {content[:8]!r}"
        )
    width, height, bits, color = struct.unpack(">IIBB", content[16:26])
    channels = {(8, 0): 1, (8, 2): 3}.get((bits, color))
    if channels is None:
        raise ValueError(
            f"expected a PNG file of gray or RGB in 8 bits, got type {color} in {bits} bits"
        )
    return height, width, channels


@contextlib.contextmanager
def decoding(content: bytes | np.ndarray, where: str) -> Iterator[None]:
    """Turn what Pillow raises for malformed content into a BadImageError; `where` names the image."""
    try:
        yield
    except UnidentifiedImageError as error:
        # Pillow's text holds a memory address, and a reason should be the same in every run.
        start = content[:8] if isinstance(content, bytes) else b""
        remedy = "; convert it to one of these" if start.startswith(_OTHERS) else ""
        raise BadImageError(
            f"{where}: expected a JPEG, PNG or WebP image, got {len(content)} bytes that "
            f"start with {start!r}{remedy}"
        ) from error
    except _DECODE_ERRORS as error:
        raise BadImageError(f"{where}: {type(error).__name__}: {error}") from error


def loaded(content: bytes | np.ndarray, max_pixels: int) -> Image.Image:
    """Return the loaded picture; the header alone decides whether it is loaded at all."""
    if isinstance(content, np.ndarray):
        plain = content[:, :, 0] if content.ndim == 3 and content.shape[2] == 1 else content
        if plain.dtype != np.uint8 or not (plain.ndim == 2 or plain.shape[2:] == (3,)):
            raise ValueError(f"expected uint8 HW, HW1 or HW3, got {content.dtype} {content.shape}")
        _check_size(plain.shape[1], plain.shape[0], max_pixels)
        return Image.fromarray(plain)
    if not content:
        raise ValueError("the file is empty")
    # A smaller file cannot hold enough of them to matter.
    if len(content) > 1 << 20 and sum(1 for _ in _CHUNK.finditer(content)) > _MAX_CHUNKS:
        raise ValueError(f"more than {_MAX_CHUNKS} chunks of metadata")
    picture = Image.open(io.BytesIO(content), formats=_FORMATS)
    _check_size(*picture.size, max_pixels)
    scans = content.count(_SCAN) if picture.format in ("JPEG", "MPO") else 0
    if scans * picture.width * picture.height > _MAX_SCANS * max_pixels:
        raise ValueError(f"{scans} scans of {picture.width} x {picture.height} pixels")
    picture.load()
    return picture


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"the picture has no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise ValueError(
            f"{width} x {height} pixels, more than --source.max-image-pixels {max_pixels}; refused "
            "by its header"
        )


def upright(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation."""
    transposition = _TRANSPOSITION.get(orientation_of(picture).get(_ORIENTATION, 1))
    return picture if transposition is None else picture.transpose(transposition)


def orientation_of(picture: Image.Image) -> Image.Exif:
    """Return the EXIF orientation alone; empty where it turns nothing, or is broken, as the pixels may well be good."""
    kept = Image.Exif()
    try:
        orientation = picture.getexif().get(_ORIENTATION)
    except _DECODE_ERRORS:
        return kept
    if isinstance(orientation, int) and orientation in _TRANSPOSITION:
        kept[_ORIENTATION] = orientation
    return kept


def gray_or_rgb(picture: Image.Image, channels: int) -> Image.Image:
    """Return the picture in mode L (1 channel) or RGB (3 channels)."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        high_byte = np.clip(np.asarray(picture).astype(np.int32) >> 8, 0, 255)
        picture = Image.fromarray(high_byte.astype(np.uint8))
    elif picture.mode == "F":
        picture = Image.fromarray(np.clip(np.rint(np.asarray(picture)), 0, 255).astype(np.uint8))
    elif picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    if channels == 1:
        return picture if picture.mode == "L" else picture.convert("RGB").convert("L")
    return picture.convert("RGB")


def _resize_and_crop(picture: Image.Image, source: SourceConfig) -> Image.Image:
    """Bring the shorter side to `resize` and cut the center, rounding as torchvision does."""
    width, height = picture.size
    scaled = source.resize * max(width, height) // min(width, height)
    if source.resize * scaled > max(source.max_image_pixels, source.resize**2):
        raise ValueError(
            f"{width} x {height} pixels: with a shorter side of {source.resize} it would have more "
            f"than --source.max-image-pixels {source.max_image_pixels}"
        )
    size = (source.resize, scaled) if width <= height else (scaled, source.resize)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling[source.interpolation.upper()])
    left, top = (round((side - source.image_size) / 2) for side in size)
    box = (left, top, left + source.image_size, top + source.image_size)
    return picture if box == (0, 0, *size) else picture.crop(box)
