"""Show clips side by side in one clip, over a plot of PSNR on which a marker moves with time."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from dma_diffusers.pipelines.captions import caption_font
from dma_diffusers.pipelines.picture import GAP, GREY, INK, PAPER, side_by_side

_MARK = (200, 40, 40)


def clips_side_by_side(
    panels: Sequence[np.ndarray], captions: Sequence[tuple[str, str]], decibels: Sequence[float | None]
) -> np.ndarray:
    """Return one clip, uint8 `[F, H', W', 3]` with even sides, that shows the panels in a row over their plot.

    Args:
        panels: clips, uint8 `[F, H, W, 3]` each, which are shown unchanged.
        captions: a title and a text for each panel, as for `side_by_side`.
        decibels: the PSNR of each frame; None stands for infinity and is drawn at the top.
    """
    frames, height, width, _ = panels[0].shape
    top = side_by_side([Image.fromarray(panel[0]) for panel in panels], captions)
    curve, points = _curve(decibels, top.width, max(48, height // 3), width)
    sheet = Image.new("RGB", [side + side % 2 for side in (top.width, top.height + curve.height)], PAPER)
    sheet.paste(top)
    sheet.paste(curve, (0, top.height))
    drawn = np.empty((frames, sheet.height, sheet.width, 3), np.uint8)
    font = caption_font(width)
    for i, (x, y) in enumerate(points):
        shown = sheet.copy()
        pen = ImageDraw.Draw(shown)
        y += top.height
        pen.line([(x, top.height), (x, top.height + curve.height)], fill=_MARK)
        pen.ellipse([x - 3, y - 3, x + 3, y + 3], fill=_MARK)
        label = f"frame {i + 1} of {frames}: {_decibels(decibels[i])}"
        pen.text((sheet.width - GAP, sheet.height - 2), label, fill=_MARK, font=font, anchor="rd")
        drawn[i] = np.asarray(shown)
        for j, panel in enumerate(panels):
            drawn[i, :height, j * (width + GAP) :][:, :width] = panel[i]
    return drawn


def _curve(
    decibels: Sequence[float | None], width: int, height: int, panel: int
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Draw the plot over time; return it with the (x, y) of each frame on it."""
    font = caption_font(panel)
    finite = [value for value in decibels if value is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    # The curve keeps this distance from the top and the bottom.
    above, below = font.size, round(1.6 * font.size)
    left = round(font.getlength("PSNR 00.0 dB ")) + GAP

    def point(i: int, value: float | None) -> tuple[int, int]:
        across = i / max(len(decibels) - 1, 1)
        up = 1.0 if value is None else (value - low) / ((high - low) or 1)
        return left + round(across * (width - left - GAP)), height - below - round(
            up * (height - above - below)
        )

    points = [point(i, value) for i, value in enumerate(decibels)]
    picture = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(picture)
    for value in {low, high} if finite else ():
        y = point(0, value)[1]
        pen.line([(left, y), (width - GAP, y)], fill=(215, 215, 210))
        pen.text((2, y), f"PSNR {value:.1f} dB", fill=GREY, font=font, anchor="lm")
    pen.line(points, fill=INK, width=2)
    return picture, points


def _decibels(value: float | None) -> str:
    return "identical" if value is None else f"{value:.1f} dB"
