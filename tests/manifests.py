"""The manifest of a data set, as assemble writes it."""

from __future__ import annotations

from typing import Any


def manifest_of(**entries: Any) -> dict[str, Any]:
    """Return a manifest's metadata, of three classes of 8 x 8 pixels where `entries` do not say otherwise."""
    return {
        "class_names": ["cat", "dog", "emu"],
        "image_size": 8,
        "channels": 3,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "ipc": 1,
        "num_images": 3,
        "tiles": 1,
        "label_epochs": 1,
        "labels": {"labels": "stored", "batch_size": 256},
        "image_bytes": 10_000,
        "label_bytes": 5000,
        "teacher_bytes": 2000,
        "teacher_top1": 0.5,
        "source": {
            "uri": "s3://bucket/photos",
            "num_images": 999,
            "stored_bytes": 1_000_000,
            "bad_images": 0,
        },
        "provenance": {
            "recipe": "digits",
            "seed": 3,
            "versions": {"torch": "2.15.0"},
            "git_revision": "abc",
        },
        **entries,
    }
