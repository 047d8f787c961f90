"""Write picture files, and show drawings and their difference side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dma_diffusers.pipelines.captions import caption_font, wrapped

GAP = 8  # pixels between panels
PAPER, INK, GREY = (250, 250, 247), (20, 20, 20), (95, 95, 95)


def picture_format(path: Path) -> str:
    """Return Pillow's name for the format of `path`; raises ValueError for an extension that it cannot write."""
    kind = Image.registered_extensions().get(path.suffix.lower(), "")
    try:
        encode(Image.new("RGB", (16, 16)), kind)  # some formats have no encoder, or none for colours
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(
            f"cannot write {path}: {path.suffix or 'no extension'} is no picture format; try .png"
        ) from error
    return kind


def encode(picture: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of a picture file in Pillow's format `kind`; options go to Pillow's `save`."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def animation(frames: Sequence[Image.Image], **options: Any) -> bytes:
    """Return the bytes of a .webp that loops over frames of equal size, 16 per second."""
    return encode(
        frames[0], "WEBP", save_all=True, append_images=frames[1:], duration=62, loop=0, method=0, **options
    )


def amplified_difference(picture: Image.Image, reference: Image.Image) -> tuple[Image.Image, int]:
    """Return |picture − reference| times a power of two ≤ 64, and that factor, as `amplified` does for arrays."""
    pixels, factor = amplified(np.asarray(picture), np.asarray(reference))
    return Image.fromarray(pixels), factor


def amplified(pixels: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, int]:
    """Return |pixels − reference| of uint8 arrays times a power of two ≤ 64, and that factor.

    The factor is the largest with which 999 of 1000 values stay below white.
    """
    difference = np.abs(pixels.astype(np.int16) - reference)
    brightest = max(np.quantile(difference, 0.999), 1)
    factor = 2 ** int(np.clip(np.log2(255 / brightest), 0, 6))
    return np.minimum(difference * factor, 255).astype(np.uint8), factor


def side_by_side(panels: Sequence[Image.Image], captions: Sequence[tuple[str, str]]) -> Image.Image:
    """Show pictures of equal size in a row, unchanged, each over a title and a text of up to two lines."""
    width, height = panels[0].size
    line = round(caption_font(width).size * 1.3)
    sheet = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height + 3 * line + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (panel, (title, text)) in enumerate(zip(panels, captions, strict=True)):
        left = i * (width + GAP)
        sheet.paste(panel, (left, 0))
        rows = []
        for words, lines in ((title, 1), (text, 2)):
            font = caption_font(width, words)
            rows += [(row, font) for row in wrapped(words, font, width - 4, lines)]
        for row, (words, font) in enumerate(rows):
            at = (left + 2, height + GAP // 2 + row * line)
            pen.text(at, words, fill=GREY if row else INK, font=font)
    return sheet
