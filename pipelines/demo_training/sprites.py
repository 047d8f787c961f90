"""Render the icons of the concepts to one file of sprites.

npm pack @iconify/json@2.2.535 && tar xf iconify-json-2.2.535.tgz
python -m dma_diffusers.pipelines.demo_training.sprites package .demo/sprites.npz
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from dma_diffusers.pipelines.demo_training.concepts import SEEN

ICON_SET = "fluent-emoji-flat"
SPRITE_SIZE = 192


def render_icon(icons: dict, name: str, size: int = SPRITE_SIZE) -> np.ndarray:
    """Draw one icon of an iconify set; returns uint8 ``[size, size, 4]`` with straight alpha.

    Raises ``KeyError`` if the set has no icon of that name.
    """
    import resvg_py  # no other script needs this package

    width, height = icons["width"], icons["height"]
    body = icons["icons"][name]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{body}</svg>'
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size)
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))


def load_sprites(path: Path, concepts: list[str]) -> np.ndarray:
    """Load the sprites of ``concepts`` in that order, uint8 ``[N, SPRITE_SIZE, SPRITE_SIZE, 4]``."""
    with np.load(path) as sprites:
        return np.stack([sprites[concept] for concept in concepts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="unpacked npm package @iconify/json 2.2.535")
    parser.add_argument("output", type=Path, help=".npz file to write, with one RGBA picture per concept")
    args = parser.parse_args()

    icons = json.loads((args.package / "json" / f"{ICON_SET}.json").read_text())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.output, **{word: render_icon(icons, icon) for word, icon in SEEN.items()})


if __name__ == "__main__":
    main()
