"""Captions in any script that a font of this machine has, wrapped to a width."""

import os
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from PIL import ImageFont

_FOLDERS = (
    "~/.local/share/fonts", "~/.fonts", "~/Library/Fonts", "/usr/local/share/fonts", "/usr/share/fonts",
    "/Library/Fonts", "/System/Library/Fonts",
)  # fmt: skip
_SUFFIXES = {".otf", ".ttc", ".ttf"}
_NO_LETTER = "\uffff"  # no font has this, and all draw the same in its place as in that of a letter they lack


def caption_font(width: int, text: str = "") -> ImageFont.FreeTypeFont:
    """Return the font for captions under pictures of this width in pixels.

    It is Pillow's own where that has all letters of the text, or else the first font of this machine that has the most.
    """
    size = max(10, width // 20)
    letters = frozenset(text) - frozenset(" \n\t")
    default = cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))
    if _letters_of(default, letters) == len(letters):
        return default
    file = _best_file(letters)
    return ImageFont.truetype(file, size) if file else default


def without_letters(text: str) -> list[str]:
    """Say in one line which letters of a text no font of this machine has; nothing where there are none."""
    font = caption_font(0, text)
    missing = [
        letter
        for letter in dict.fromkeys(text)
        if letter.strip() and not _letters_of(font, frozenset(letter))
    ]
    if not missing:
        return []
    return [
        f"no font here has all letters of the caption ({''.join(missing[:9])}): install one, such as Noto"
    ]


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """Break a text into at most so many lines of this width in pixels; an ellipsis ends a text that is longer.

    Lines end between words, or within one that is wider than a line, as where a script has no spaces.
    """
    found: list[str] = []
    rest = " ".join(text.split())
    while rest and len(found) < lines:
        line = _fitting(rest, font, width)
        found.append(line.strip())
        rest = rest[len(line) :].strip()
    if rest:
        last = found.pop()
        while last and font.getlength(last + "…") > width:
            last = last[:-1].rstrip()
        found.append(last + "…")
    return found


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return as much of the beginning of a text as fits, up to the end of a word if one fits; at least one letter."""
    least, most = 1, len(text)
    while least < most:  # the longest that fits lies between these
        middle = (least + most + 1) // 2
        least, most = (middle, most) if font.getlength(text[:middle]) <= width else (least, middle - 1)
    if least == len(text) or text[least] == " ":
        return text[:least]
    space = text.rfind(" ", 0, least)
    return text[:space] if space > 0 else text[:least]


@cache
def _best_file(letters: frozenset[str]) -> str | None:
    """Return the first font file that has all these letters, or else the one that has the most."""
    best, most = None, 0
    for path in _files():
        try:
            count = _letters_of(ImageFont.truetype(path, 12), letters)
        except (OSError, ValueError):
            continue  # it is damaged, or of a kind that Pillow does not read
        if count > most:
            best, most = str(path), count
        if most == len(letters):
            break
    return best


def _files() -> Iterator[Path]:
    """Yield the font files of this machine; those of matplotlib, which the reports need anyway, are first."""
    if found := find_spec("matplotlib"):
        yield from [Path(cast(str, found.origin)).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"]
    for folder in map(os.path.expanduser, _FOLDERS):
        yield from sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in _SUFFIXES)


def _letters_of(font: ImageFont.FreeTypeFont, letters: frozenset[str]) -> int:
    """Count the letters that a font has."""
    missing = _drawn(font, _NO_LETTER)
    return sum(_drawn(font, letter) != missing for letter in letters)


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)
