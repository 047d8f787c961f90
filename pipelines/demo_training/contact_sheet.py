"""Draw the first 64 prompts of a file, and lay the pictures out on one sheet, each above its prompt.

python -m dma_diffusers.pipelines.demo_training.contact_sheet \
    pipelines/demo/flux pipelines/demo/prompts.jsonl pipelines/demo/contact_sheet.webp
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from dma_diffusers.pipelines.demo_training.drawing import draw

_PICTURES, _COLUMNS, _CELL, _CAPTION, _MARGIN = 64, 8, 176, 46, 8


def lay_out(pictures: np.ndarray, captions: list[str]) -> Image.Image:
    """Put pictures, float ``[N, H, W, 3]`` in [0, 1], on one sheet above their captions."""
    rows = -(-len(captions) // _COLUMNS)
    width, height = _CELL + _MARGIN, _CELL + _CAPTION + _MARGIN
    sheet = Image.new("RGB", (_COLUMNS * width + _MARGIN, rows * height + _MARGIN), "#f4f4f4")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = _corner(i)
        image = Image.fromarray((picture * 255).round().astype(np.uint8))
        sheet.paste(image.resize((_CELL, _CELL), Image.Resampling.LANCZOS), (x, y))
        pen.text(
            (x, y + _CELL + 2), "\n".join(textwrap.wrap(caption, 30)), fill="black", font=font, spacing=2
        )
    return sheet


def cells(sheet: Image.Image, count: int) -> torch.Tensor:
    """Cut the first ``count`` pictures out of a sheet; returns uint8 ``[count, 3, 176, 176]``."""
    pixels = torch.from_numpy(np.array(sheet.convert("RGB"))).permute(2, 0, 1)
    corners = map(_corner, range(count))
    return torch.stack([pixels[:, y : y + _CELL, x : x + _CELL] for x, y in corners])


def _corner(i: int) -> tuple[int, int]:
    row, column = divmod(i, _COLUMNS)
    return _MARGIN + column * (_CELL + _MARGIN), _MARGIN + row * (_CELL + _CAPTION + _MARGIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("prompts", type=Path, help="file of JSON lines, each with a prompt")
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    prompts = [json.loads(line)["prompt"] for line in args.prompts.read_text().splitlines()[:_PICTURES]]
    sheet = lay_out(draw(args.pipeline, prompts), prompts)
    sheet.quantize(256, dither=Image.Dither.NONE).convert("RGB").save(args.output, lossless=True, method=6)


if __name__ == "__main__":
    main()
