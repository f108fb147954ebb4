"""What the beginning of a URI says of where it leads."""

from __future__ import annotations


def is_gcs(uri: str) -> bool:
    """Return whether `uri` lies in Google Cloud Storage, by either of fsspec's names for it."""
    return uri.startswith(("gs://", "gcs://"))
