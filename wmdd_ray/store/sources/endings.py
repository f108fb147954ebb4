"""Which files are images: by their endings, and where these tell nothing by how they begin."""

from __future__ import annotations

# Also what is not decoded: such files are counted as bad images, so that they do not vanish without a word.
IMAGE_ENDINGS = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".jpf", ".avif", ".heic", ".heif", ".jxl", ".tga",
})  # fmt: skip
# Files with these are not looked into, which on an object store costs a request each.
_OTHER_ENDINGS = frozenset({
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".html", ".md", ".rst", ".yaml", ".yml", ".toml", ".ini", ".cfg",
    ".log", ".py", ".sh", ".ipynb", ".pdf", ".mat", ".npy", ".npz", ".pkl", ".pickle", ".pt", ".pth", ".safetensors",
    ".parquet", ".arrow", ".h5", ".hdf5", ".lmdb", ".db", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z",
    ".rar", ".mp4", ".avi", ".mov", ".mkv", ".wav", ".mp3",
})  # fmt: skip
_SYSTEM_NAMES = frozenset(
    ("@eadir", "__macosx", "thumbs.db", "desktop.ini", "#recycle", "$recycle.bin", "lost+found", "__pycache__")
)  # fmt: skip
START_BYTES = 16


def ending_of(name: str) -> str:
    """Return the ending of a file's name, lower case, with its dot; empty when it has none."""
    stem, _, ending = name.rpartition("/")[2].rpartition(".")
    return f".{ending.lower()}" if stem and ending else ""


def is_image_name(name: str) -> bool:
    """Return whether a file is an image by its ending."""
    return ending_of(name) in IMAGE_ENDINGS


def tells_nothing(name: str) -> bool:
    """Return whether only the content of a file says if it is an image."""
    ending = ending_of(name)
    return ending not in IMAGE_ENDINGS and ending not in _OTHER_ENDINGS


def is_image_start(start: bytes) -> bool:
    """Return whether a file that begins with these bytes is an image, of a format that is decoded or not."""
    return (
        start.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*"))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"heic", b"heix", b"mif1"))
        or start.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"\0\0\0\x0cJXL "))
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
    )  # fmt: skip


def is_system_name(part: str) -> bool:
    """Return whether a file or folder is hidden (`.DS_Store`, `._x.jpg`), or a system's: thumbnails, forks, bins."""
    return (part.startswith(".") and part not in (".", "..")) or part.lower() in _SYSTEM_NAMES
