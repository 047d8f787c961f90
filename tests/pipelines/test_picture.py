"""Test panels side by side, and picture formats."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dma_diffusers.pipelines.picture import amplified_difference, encode, picture_format, side_by_side


@pytest.fixture
def pictures():
    noise = np.random.default_rng(0)
    first = noise.integers(0, 256, (64, 96, 3))
    second = np.clip(first + noise.integers(-5, 6, first.shape), 0, 255)
    return [Image.fromarray(values.astype(np.uint8)) for values in (first, second)]


def test_panels_are_untouched_and_captioned(pictures):
    first, second = pictures
    sheet = side_by_side([first, second, first], [("one", ""), ("two", "words that need a line"), ("", "")])
    values = np.asarray(sheet)
    assert sheet.width == 3 * 96 + 2 * 8
    for left, panel in ((0, first), (104, second), (208, first)):
        assert np.array_equal(values[:64, left : left + 96], np.asarray(panel))
    captions = values[64:]
    paper = captions[-1, -1]
    assert (captions[:, :96] != paper).any()
    assert (captions[:, 104:200] != paper).any()
    assert (captions[:, 208:] == paper).all()


def test_difference_is_amplified_by_the_factor(pictures):
    first, second = (np.asarray(picture, int) for picture in pictures)
    difference, factor = amplified_difference(pictures[1], pictures[0])
    assert factor == 32  # 5 × 32 = 160 stays below white, 5 × 64 does not
    assert np.array_equal(np.asarray(difference), abs(second - first) * factor)


def test_identical_pictures_have_a_black_difference(pictures):
    difference, factor = amplified_difference(pictures[0], pictures[0])
    assert factor == 64
    assert not np.asarray(difference).any()


def test_encodes_what_it_is_given(pictures):
    decoded = Image.open(io.BytesIO(encode(pictures[0], picture_format(Path("out.PNG")))))
    assert np.array_equal(np.asarray(decoded), np.asarray(pictures[0]))


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.psd", "out.h5", "out.xbm"])
def test_unknown_formats_are_refused(name):
    with pytest.raises(ValueError, match="no picture format"):
        picture_format(Path(name))
