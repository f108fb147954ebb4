"""Label files: what is stored of views and logits comes back, other views are refused, and files are small."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from wmdd_ray.config import RelabelConfig, ViewConfig
from wmdd_ray.core.soft_labels import compress, decompress
from wmdd_ray.core.views import draw_block
from wmdd_ray.errors import ArtifactError
from wmdd_ray.records import SoftLabelBlock, SoftLabels, ViewDraw, Views
from wmdd_ray.store import codecs

EPOCHS = range(4, 7)
CONFIGS = {
    "fp16": RelabelConfig(),
    "int8": RelabelConfig(precision="int8"),
    "top-k fp16": RelabelConfig(compression="top_k", top_k=3),
    "top-k int8": RelabelConfig(compression="top_k", top_k=3, precision="int8", step=1.0),
}


def draw(num_images: int = 50, first: int = 200) -> ViewDraw:
    """Return a draw of images in two runs, as of whole classes that are no neighbors."""
    half = num_images // 2
    index_N = np.r_[first : first + half, 2 * first : 2 * first + num_images - half]
    views = ViewConfig()
    return ViewDraw(
        seed=2**63 - 1,
        image_size=28,
        index_N=index_N.astype(np.int32),
        crop_scale_min=views.crop_scale_min,
        flip=views.flip,
        mix=views.mix,
    )


def block(
    config: RelabelConfig = CONFIGS["fp16"], *, by_seed: bool = True, num_images: int = 50
) -> SoftLabelBlock:
    drawn = draw(num_images)
    views = draw_block(drawn, EPOCHS)
    logits_VY = 3 * np.random.default_rng(0).standard_normal((len(views), 10))
    return SoftLabelBlock(
        first_epoch=EPOCHS.start,
        num_epochs=len(EPOCHS),
        views=views,
        labels=compress(logits_VY, config),
        draw=drawn if by_seed else None,
    )


def assert_same(found: object, expected: object) -> None:
    assert vars(found).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        if isinstance(value, np.ndarray):
            got = getattr(found, name)
            assert got.dtype == value.dtype, name
            np.testing.assert_array_equal(got, value, err_msg=name)
        else:
            assert getattr(found, name) == value, name


@pytest.mark.parametrize("by_seed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_views_and_logits_come_back_to_the_bit(name: str, by_seed: bool) -> None:
    written = block(CONFIGS[name], by_seed=by_seed)
    found = codecs.decode_soft_labels(codecs.encode_soft_labels(written), draw_block)
    assert (found.first_epoch, found.num_epochs) == (4, 3)
    assert_same(found.views, written.views)
    assert_same(found.labels, written.labels)
    assert (found.draw is None) == (not by_seed)
    if found.draw is not None and written.draw is not None:
        assert_same(found.draw, written.draw)


@pytest.mark.parametrize("by_seed", [True, False])
def test_a_file_without_logits_says_which_views_there_are(by_seed: bool) -> None:
    written = block(by_seed=by_seed)
    labels = SoftLabels(num_classes=10, values_VK=np.empty((150, 0), np.float16))
    content = codecs.encode_soft_labels(replace(written, labels=labels))
    found = codecs.decode_soft_labels(content, draw_block)
    assert_same(found.views, written.views)
    assert found.labels.values_VK.shape == (150, 0) and found.labels.num_classes == 10
    assert len(content) < 1500 or not by_seed


def test_views_that_come_out_differently_are_refused() -> None:
    def other_machine(drawn: ViewDraw, epochs: range) -> Views:
        views = draw_block(drawn, epochs)
        crop_V4 = views.crop_V4.copy()
        crop_V4[-1, 0] = np.nextafter(crop_V4[-1, 0], np.float32(1))
        return replace(views, crop_V4=crop_V4)

    content = codecs.encode_soft_labels(block())
    with pytest.raises(ArtifactError, match="very views.*drew others.*--relabel.stored-views rows"):
        codecs.decode_soft_labels(content, other_machine)
    with pytest.raises(ArtifactError, match="need core.views.draw_block"):
        codecs.decode_soft_labels(content)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_byte_is_an_error_or_changes_nothing(name: str) -> None:
    written = block(CONFIGS[name], num_images=4)
    content = codecs.encode_soft_labels(written)
    expected = decompress(written.labels)
    for position in range(4, len(content) - 8):
        changed = bytearray(content)
        changed[position] ^= 0x10
        try:
            found = codecs.decode_soft_labels(bytes(changed), draw_block)
        except ArtifactError:
            continue
        assert_same(found.views, written.views)
        np.testing.assert_array_equal(decompress(found.labels), expected)


def test_a_file_of_an_earlier_version_is_refused_with_what_to_do() -> None:
    meta = {b"wmdd": json.dumps({"first_epoch": 0, "num_epochs": 1, "num_classes": 3}).encode()}
    table = pa.table({"image": [0]}).replace_schema_metadata(meta)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_page_checksum=True)
    with pytest.raises(ArtifactError, match="format 2, found one that an earlier.*run relabel"):
        codecs.decode_soft_labels(sink.getvalue().to_pybytes(), draw_block)


@pytest.mark.parametrize("by_seed", [True, False])
def test_mixup_of_an_earlier_version_is_refused_with_what_to_do(by_seed: bool) -> None:
    written = block(by_seed=by_seed)
    if written.draw is not None:
        written = replace(written, draw=replace(written.draw, mix="mixup"))
    else:
        blended = replace(written.views, mix_box_V4=np.zeros_like(written.views.mix_box_V4))
        written = replace(written, views=blended)
    with pytest.raises(ArtifactError, match="found MixUp's.*; run relabel and assemble again"):
        codecs.decode_soft_labels(codecs.encode_soft_labels(written), draw_block)


def test_shares_of_any_distribution_are_read_as_they_were_stored() -> None:
    # Earlier versions could draw CutMix by other shares than uniform ones, and stored the boxes then.
    written = block(by_seed=False)
    one_pixel_V4 = np.tile(np.array([[3, 4, 4, 5]], np.int16), (len(written.views), 1))
    share_V = np.full(len(written.views), 1 - 1 / 28**2, np.float32)
    written = replace(
        written, views=replace(written.views, mix_box_V4=one_pixel_V4, share_V=share_V)
    )
    found = codecs.decode_soft_labels(codecs.encode_soft_labels(written), draw_block)
    assert_same(found.views, written.views)


def test_bytes_a_view_are_those_of_the_entropy_not_of_the_arrays() -> None:
    size = {
        (name, by_seed): len(
            codecs.encode_soft_labels(block(CONFIGS[name], by_seed=by_seed, num_images=1000))
        )
        / 3000
        for name in ("fp16", "int8")
        for by_seed in (True, False)
    }
    coarse = codecs.encode_soft_labels(
        block(RelabelConfig(precision="int8", step=1.0), num_images=1000)
    )
    # Ten normal logits of deviation 3 below their largest, rounded to 1, have 3.6 bits each at most.
    assert len(coarse) / 3000 < 5.2
    assert size["int8", True] < 9.5 and size["fp16", True] < 20.5
    assert size["fp16", False] - size["fp16", True] > 25
