"""Test that pictures of every depth are read as what they show, over white where they are transparent."""

import numpy as np
import pytest
from PIL import Image

from dma_diffusers.pipelines.reading import to_rgb
from dma_diffusers.pipelines.video import read_image

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def read(path, values, **options) -> np.ndarray:
    """The first channel of what is read from a file of these values; all three are the same."""
    Image.fromarray(values).save(path, **options)
    channels = np.asarray(read_image(path))
    assert channels.dtype == np.uint8 and (channels == channels[..., :1]).all()
    return channels[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_are_the_nearest_8(tmp_path, name):
    assert np.array_equal(read(tmp_path / name, RAMP.astype(np.uint16) * 257), RAMP)
    assert read(tmp_path / name, np.full((2, 2), 257 * 100 + 129, np.uint16))[0, 0] == 101  # nearer than 100


def test_floats_from_0_to_1_are_the_nearest_levels(tmp_path):
    assert np.array_equal(read(tmp_path / "a.tif", (RAMP / 255).astype(np.float32)), RAMP)


@pytest.mark.parametrize(("values", "words"), [
    (np.full((2, 2), 1.5, np.float32), "its numbers go from 1.5 to 1.5: floats have to be from 0 to 1"),
    (np.full((2, 2), -0.1, np.float32), "its numbers go from -0.1 to -0.1"),
    (np.full((2, 2), np.nan, np.float32), "its numbers go from nan to nan"),
    (np.full((2, 2), 7, np.int32), "it has integers of 32 bits: save it with 8 or 16 bits a channel"),
])  # fmt: skip
def test_numbers_without_a_known_white_are_refused(tmp_path, values, words):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(OSError, match=f"cannot read .*a.tif: {words}"):
        read_image(tmp_path / "a.tif")


def test_transparency_lies_over_white(tmp_path):
    pixels = np.zeros((1, 3, 4), np.uint8)  # black, and more and more of it
    pixels[..., 3] = 0, 128, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [127] * 3, [0] * 3]
    grey = Image.fromarray(np.zeros((1, 1), np.uint8))
    grey.putalpha(0)
    assert to_rgb(grey).getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour(tmp_path):
    picture = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.save(tmp_path / "a.png", transparency=1)
    assert np.asarray(read_image(tmp_path / "a.png"))[0].tolist() == [[10, 20, 30], [255] * 3]


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA"])
def test_opaque_pictures_are_what_pillow_reads(mode):
    picture = Image.fromarray(RAMP).convert("RGB").convert(mode)
    assert np.array_equal(np.asarray(to_rgb(picture)), np.asarray(picture.convert("RGB")))
