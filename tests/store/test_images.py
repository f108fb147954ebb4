"""Every kind of picture becomes the network's input, and whatever is none becomes a BadImageError."""

from __future__ import annotations

import io
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import BadImageError
from wmdd_ray.store.images import decode_image, encode_png

RGB = SourceConfig(image_size=8, resize=8)
GRAY = SourceConfig(image_size=8, resize=8, channels=1, mean=(0.5,), std=(0.5,))


def encoded(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format=format, **options)
    return sink.getvalue()


def one_color(
    picture: Image.Image, config: SourceConfig, format: str = "PNG", **options: object
) -> Any:
    """Decode a picture of one color; return that color as a tuple."""
    pixels = decode_image(encoded(picture, format, **options), config, "x")
    assert pixels.shape == (8, 8, config.channels) and pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return tuple(pixels[0, 0].tolist())


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def quadrants() -> np.ndarray:
    """A picture of 8 x 16 with four gray levels: 10 and 60 above, 120 and 240 below."""
    return np.kron(np.array([[10, 60], [120, 240]], dtype=np.uint8), np.ones((4, 8), np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_of_the_right_size_reads_back_exactly(channels: int) -> None:
    image_HWC = noise(8, 8, channels)
    config = RGB if channels == 3 else GRAY
    assert_array_equal(decode_image(encode_png(image_HWC), config, "x"), image_HWC)


def test_equal_images_encode_to_equal_bytes() -> None:
    assert encode_png(noise(8, 8)) == encode_png(noise(8, 8))


@pytest.mark.parametrize(
    ("picture", "rgb", "gray"),
    [
        (Image.new("L", (8, 8), 77), (77, 77, 77), (77,)),
        (Image.new("RGB", (8, 8), (200, 100, 50)), (200, 100, 50), (124,)),
        (Image.new("1", (8, 8), 1), (255, 255, 255), (255,)),
        # Half-transparent black on white is gray; fully transparent colors are not seen.
        (Image.new("RGBA", (8, 8), (0, 0, 0, 128)), (127, 127, 127), (127,)),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), (255, 255, 255), (255,)),
        (Image.new("LA", (8, 8), (90, 255)), (90, 90, 90), (90,)),
        (Image.new("LA", (8, 8), (90, 0)), (255, 255, 255), (255,)),
        # 16 bits keep the high byte: clipped, both would be 255.
        (Image.fromarray(np.full((8, 8), 40000, np.uint16)), (156, 156, 156), (156,)),
        (Image.fromarray(np.full((8, 8), 300, np.uint16)), (1, 1, 1), (1,)),
    ],
    ids=["L", "RGB", "1", "RGBA-half", "RGBA-clear", "LA", "LA-clear", "I;16", "I;16-dark"],
)
def test_every_mode_becomes_the_asked_channels(
    picture: Image.Image, rgb: tuple[int, ...], gray: tuple[int, ...]
) -> None:
    assert one_color(picture, RGB) == rgb
    assert one_color(picture, GRAY) == gray


def test_palette_pictures_show_their_colors_and_their_transparency_as_white() -> None:
    picture = Image.new("P", (8, 8), 5)
    palette = [0] * 768
    palette[15:18] = [10, 200, 30]
    picture.putpalette(palette)
    assert one_color(picture, RGB) == (10, 200, 30)
    assert one_color(picture, RGB, transparency=5) == (255, 255, 255)
    assert one_color(picture, RGB, transparency=4) == (10, 200, 30)


def test_a_transparent_color_of_an_rgb_png_is_white() -> None:
    picture = Image.new("RGB", (8, 8), (1, 2, 3))
    assert one_color(picture, RGB, transparency=(1, 2, 3)) == (255, 255, 255)


def test_sixteen_bit_color_keeps_its_high_bytes() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 0x1234, 0xFEDC, 0x00FF) * 8 for _ in range(8))
    header = struct.pack(">2I5B", 8, 8, 16, 2, 0, 0, 0)
    pixels = decode_image(png_of(header, rows), RGB, "x")
    assert_array_equal(pixels[0, 0], [0x12, 0xFE, 0x00])


def png_of(header: bytes, rows: bytes) -> bytes:
    """Return a PNG by hand, with valid checksums whatever it says."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )


def test_cmyk_jpeg_becomes_rgb() -> None:
    red, green, blue = one_color(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), RGB, "JPEG")
    assert red > 250 and green < 5 and blue < 5


def test_webp_is_read_and_of_an_animation_the_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    config = {"save_all": True, "append_images": frames[1:], "lossless": True}
    assert one_color(frames[0], RGB, "WEBP", **config) == (255, 0, 0)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    as_stored = quadrants()
    upright = {
        1: as_stored,
        2: as_stored[:, ::-1],
        3: as_stored[::-1, ::-1],
        4: as_stored[::-1],
        5: as_stored.T,
        6: np.rot90(as_stored, -1),
        7: as_stored[::-1, ::-1].T,
        8: np.rot90(as_stored),
    }[orientation]
    content = encoded(Image.fromarray(as_stored).convert("RGB"), format, exif=exif, quality=100)
    pixels = decode_image(content, GRAY, "x")[:, :, 0]
    expected = decode_image(np.ascontiguousarray(upright), GRAY, "x")[:, :, 0]
    np.testing.assert_allclose(pixels.astype(int), expected, atol=6)


def test_the_orientation_may_be_left_as_it_is_stored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.fromarray(quadrants()).convert("RGB"), exif=exif)
    pixels = decode_image(content, replace(GRAY, exif_orientation=False), "x")
    assert_array_equal(pixels, decode_image(quadrants(), GRAY, "x"))


def test_broken_exif_leaves_a_good_picture_as_it_is() -> None:
    picture = Image.fromarray(noise(8, 8))
    content = encoded(picture, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert_array_equal(decode_image(content, RGB, "x"), noise(8, 8))


@pytest.mark.parametrize("size", [(100, 37), (37, 100), (9, 9), (8, 61), (5, 3), (33, 32)])
@pytest.mark.parametrize("resize", [8, 11, 20])
@pytest.mark.parametrize("filter", ["bilinear", "bicubic"])
def test_resize_and_crop_are_those_of_torchvision(
    size: tuple[int, int], resize: int, filter: Any
) -> None:
    picture = Image.fromarray(noise(*size))
    reference = np.asarray(CenterCrop(8)(Resize(resize, InterpolationMode(filter))(picture)))
    config = SourceConfig(image_size=8, resize=resize, interpolation=filter)
    assert_array_equal(decode_image(encoded(picture), config, "x"), reference)


def test_arrays_take_the_same_path_as_files() -> None:
    pixels = noise(20, 31)
    assert_array_equal(
        decode_image(pixels, RGB, "x"), decode_image(encoded(Image.fromarray(pixels)), RGB, "x")
    )
    gray = decode_image(pixels[:, :, :1], GRAY, "x")
    assert_array_equal(decode_image(pixels[:, :, 0], GRAY, "x"), gray)
    assert_array_equal(decode_image(pixels[:, :, 0], RGB, "x"), gray.repeat(3, axis=2))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), np.float32),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8), np.uint8),
        np.zeros(8, np.uint8),
    ],
    ids=["float", "4-channels", "no-rows", "1-dimension"],
)
def test_arrays_that_are_no_pictures_are_bad_images(array: np.ndarray) -> None:
    with pytest.raises(BadImageError, match="^digit 3: "):
        decode_image(array, RGB, "digit 3")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"hello, world", "expected a JPEG, PNG or WebP image, got 12 bytes"),
        (encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-200], "truncated"),
        (encoded(Image.fromarray(noise(64, 64)))[:-200], "truncated|IEND|broken"),
        (encoded(Image.new("RGB", (8, 8)), "GIF"), "expected a JPEG, PNG or WebP"),
        (encoded(Image.new("RGB", (8, 8)), "TIFF"), "expected a JPEG, PNG or WebP"),
        (encoded(Image.new("RGB", (8, 8)), "BMP"), "expected a JPEG, PNG or WebP"),
    ],
    ids=["empty", "text", "cut-jpeg", "cut-png", "gif", "tiff", "bmp"],
)
def test_bad_content_is_named_with_its_reason(content: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=rf"^n01/cat\.jpg: .*({reason})"):
        decode_image(content, RGB, "n01/cat.jpg")


def test_the_reason_is_the_same_in_every_run() -> None:
    def reason() -> str:
        with pytest.raises(BadImageError) as caught:
            decode_image(b"garbage", RGB, "x")
        return str(caught.value)

    assert reason() == reason() and " at 0x" not in reason()


def test_a_bomb_is_refused_by_its_header_without_taking_memory() -> None:
    # 60 million pixels of three bytes, and no pixel data at all: only a header check answers with the size.
    bomb = png_of(struct.pack(">2I5B", 10_000, 6_000, 8, 2, 0, 0, 0), b"")
    config = SourceConfig(image_size=8, resize=8, max_image_pixels=59_999_999)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImageError, match="10000 x 6000 pixels, more than .* 59999999"):
        decode_image(bomb, config, "x")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 50_000


def test_a_bomb_beyond_pillows_own_limit_is_a_bad_image_too() -> None:
    for side in (10_000, 14_000, 60_000):
        with pytest.raises(BadImageError, match="^x: "):
            decode_image(png_of(struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0), b""), RGB, "x")


def test_a_thin_picture_does_not_explode_when_it_is_resized() -> None:
    thin = np.zeros((1, 1_000_000), np.uint8)
    config = SourceConfig(image_size=8, resize=256)
    with pytest.raises(BadImageError, match="with a shorter side of 256 it would have more"):
        decode_image(thin, config, "x")


def packed_zeros(size_bytes: int) -> bytes:
    """A zlib stream of zeros, without packing each of them: a mebibyte's piece stands for all."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = deflate.compress(bytes(1 << 20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = deflate.compress(bytes(size_bytes % (1 << 20))) + deflate.flush()
    adler = struct.pack(">I", size_bytes % 65_521 << 16 | 1)
    return b"\x78\xda" + piece * (size_bytes >> 20) + rest + adler


def bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that would take gigabytes or minutes, and why each is refused (nothing: it is read, and cheap)."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    def riff(*chunks: tuple[bytes, bytes]) -> bytes:
        body = b"WEBP" + b"".join(n + struct.pack("<I", len(c)) + c for n, c in chunks)
        return b"RIFF" + struct.pack("<I", len(body)) + body

    def canvas(width: int, height: int, frames: int) -> bytes:
        def side(pixels: int) -> bytes:
            return struct.pack("<I", pixels - 1)[:3]

        frame = encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)[12:]
        return riff(
            (b"VP8X", struct.pack("<I", 2) + side(width) + side(height)),
            (b"ANIM", bytes(6)),
            *[(b"ANMF", bytes(6) + side(8) + side(8) + bytes(4) + frame)] * frames,
        )

    def png(side: int, *chunks: tuple[bytes, bytes]) -> bytes:
        """A black square, its rows well packed, and other chunks before them."""
        rows = packed_zeros(side * (1 + side * 3))
        header = struct.pack(">2I5B", side, side, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", header), *chunks, (b"IDAT", rows), (b"IEND", b"")]
        return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, body) for name, body in parts)

    def jpeg(width: int, height: int) -> bytes:
        content = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">2H", height, width)
        return bytes(content)

    gibibyte = packed_zeros(1 << 30)
    progressive = encoded(Image.new("RGB", (1000, 1000)), "JPEG", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xc4") : -2]
    mebibyte = packed_zeros(1 << 20)
    small = encoded(Image.new("RGB", (8, 8)), "JPEG")
    return {
        "png 9k": (png(9000), "9000 x 9000 pixels, more than"),
        "png 14k": (png(14_000), "DecompressionBombError"),
        "jpeg 65k": (jpeg(65_500, 65_500), "DecompressionBombError"),
        "jpeg 9k": (jpeg(9000, 9000), "9000 x 9000 pixels, more than"),
        "jpeg scans": (progressive[:-2] + scan * 5000 + b"\xff\xd9", "scans of 1000 x 1000 pixels"),
        "jpeg segments": (small[:2] + b"\xff\xfe\0\2" * 300_000 + small[2:], "chunks of metadata"),
        "webp canvas": (canvas(65_535, 65_535, 1), "DecompressionBombError"),
        "webp wide": (canvas(1 << 22, 1000, 1), "DecompressionBombError"),
        "webp frames": (canvas(16, 16, 20_000), ""),
        "png zTXt": (png(8, (b"zTXt", b"k\0\0" + gibibyte)), "too large"),
        "png iTXt": (png(8, (b"iTXt", b"k\0\1\0\0\0" + gibibyte)), "too large"),
        "png iCCP": (png(8, (b"iCCP", b"k\0\0" + gibibyte)), "too large"),
        "png texts": (png(8, *[(b"zTXt", b"k%d\0\0" % i + mebibyte) for i in range(100)]), "Too much memory"),
        "png many": (png(8, *[(b"tEXt", b"k\0x")] * 200_000), "chunks of metadata"),
        "png pixels": (png(8).replace(chunk(b"IEND", b""), chunk(b"IDAT", gibibyte)), ""),
    }  # fmt: skip


MEASURE = """
import re, sys, time
from pathlib import Path
from wmdd_ray.config import SourceConfig
from wmdd_ray.errors import BadImageError
from wmdd_ray.store.images import decode_image

def peak_kib():  # getrusage tells the peak of the process that started this one, if that is higher
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

for path in sorted(Path(sys.argv[1]).iterdir()):
    content = path.read_bytes()
    before_kib, started = peak_kib(), time.process_time()
    try:
        decode_image(content, SourceConfig(image_size=8, resize=8), path.name)
        reason = ""
    except BadImageError as error:
        reason = str(error)
    print(path.name, peak_kib() - before_kib, time.process_time() - started, reason, sep="|")
"""


def test_bombs_are_refused_or_cheap_in_memory_and_time(tmp_path: Path) -> None:
    assert zlib.decompress(packed_zeros(3_000_000)) == bytes(3_000_000)
    planted = bombs()
    for name, (content, _) in planted.items():
        assert len(content) < 6 << 20, name
        (tmp_path / name).write_bytes(content)
    # A process of its own: this one has used more memory before.
    ended = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    lines = [line.split("|", 3) for line in ended.stdout.splitlines()]
    assert [name for name, *_ in lines] == sorted(planted)
    for name, more_kib, seconds, reason in lines:
        expected = planted[name][1]
        assert (expected in reason) if expected else not reason, (name, reason)
        # Pillow keeps up to 64 MiB of text.
        assert int(more_kib) < 100_000 and float(seconds) < 1, (name, more_kib, seconds)


def test_a_progressive_photograph_is_no_bomb() -> None:
    photograph = Image.fromarray(noise(600, 800))
    config = SourceConfig(image_size=8, resize=8, max_image_pixels=480_000)
    pixels = decode_image(encoded(photograph, "JPEG", progressive=True), config, "x")
    assert pixels.shape == (8, 8, 3)
