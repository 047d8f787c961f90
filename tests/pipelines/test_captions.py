"""Test that captions are in a font that has their letters, and fit under their pictures."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from dma_diffusers.pipelines import captions
from dma_diffusers.pipelines.captions import caption_font, without_letters, wrapped
from dma_diffusers.pipelines.picture import side_by_side


def drawn(font: ImageFont.FreeTypeFont, letter: str) -> bytes:
    return bytes(font.getmask(letter))


@pytest.mark.parametrize(
    "text", ["a red cat", "красная кошка", "κόκκινη γάτα", "חתול אדום", "قطة حمراء", "un café"]
)
def test_each_letter_is_drawn_as_itself(text):
    """matplotlib brings a font for these scripts."""
    font = caption_font(320, text)
    letters = sorted(set(text) - {" "})
    assert len({drawn(font, letter) for letter in letters}) > len(letters) / 2
    assert all(drawn(font, letter) != drawn(font, "\uffff") for letter in letters)
    assert font.size == 16 and not without_letters(text)


def test_the_font_of_latin_letters_is_always_the_same():
    assert (
        caption_font(320).getname()
        == caption_font(320, "cat").getname()
        != caption_font(320, "кот").getname()
    )


def test_letters_that_no_font_has_are_named(monkeypatch):
    monkeypatch.setattr(captions, "_files", lambda: iter(()))
    captions._best_file.cache_clear()
    try:
        (note,) = without_letters("a кот")
        assert note == "no font here has all letters of the caption (кот): install one, such as Noto"
    finally:
        captions._best_file.cache_clear()


def test_a_damaged_font_is_passed_over(monkeypatch, tmp_path):
    good = next(captions._files())
    damaged = tmp_path / "a.ttf"
    damaged.write_bytes(b"no font")
    monkeypatch.setattr(captions, "_files", lambda: iter((damaged, good)))
    captions._best_file.cache_clear()
    assert drawn(caption_font(320, "к"), "к") != drawn(caption_font(320, "к"), "\uffff")


@pytest.mark.parametrize(
    "text", ["a red apple left of a cat on a yellow background " * 3, "красная кошка " * 9, "x" * 200]
)
@pytest.mark.parametrize("lines", [1, 2])
def test_lines_fit_and_the_last_says_that_there_is_more(text, lines):
    font = caption_font(200, text)
    found = wrapped(text, font, 150, lines)
    assert len(found) == lines and found[-1].endswith("…")
    assert all(font.getlength(line) <= 150 for line in found)
    assert text.startswith(found[0].rstrip("…"))


def test_what_fits_is_whole_and_breaks_between_words():
    font = caption_font(200)
    assert wrapped("a cat", font, 150, 1) == ["a cat"] and wrapped("", font, 150, 2) == []
    text = "a red apple left of a cat"
    assert " ".join(wrapped(text, font, 100, 9)) == text


def test_captions_stay_under_their_panels():
    panels = [Image.new("RGB", (64, 64))] * 2
    sheet = np.asarray(side_by_side(panels, [("ж" * 99, "ж" * 99), ("", "")]))
    assert (sheet[64:, :64] != sheet[-1, -1]).any() and (sheet[64:, 64:] == sheet[-1, -1]).all()
