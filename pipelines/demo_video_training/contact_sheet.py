"""Draw the held-out prompts, lay the clips out on one sheet, and score how often they show what the prompt says.

python -m dma_diffusers.pipelines.demo_video_training.contact_sheet \
    pipelines/demo_video/wan pipelines/demo_video/contact_sheet.webp --sprites .demo/animated.npz

The sheet has a row for each prompt, with nine frames from left to right. For the score, clips with every object are
drawn from the sprites, with everything else as the prompt says. The object is right if the nearest of them to the
model's clip is the one with the prompt's object. Motions and backgrounds are scored in the same way.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from dma_diffusers.pipelines.demo_video_training.clips import HEIGHT, ClipRenderer, Clips
from dma_diffusers.pipelines.demo_video_training.concepts import BACKGROUNDS, CONCEPTS
from dma_diffusers.pipelines.demo_video_training.drawing import draw_clips
from dma_diffusers.pipelines.demo_video_training.motions import FRAMES, MOTIONS
from dma_diffusers.pipelines.demo_video_training.prompts import held_out_clips, prompt
from dma_diffusers.pipelines.demo_video_training.sprites import load_sprites

_WORDS = (tuple(CONCEPTS), MOTIONS, tuple(BACKGROUNDS))
_COLUMNS, _MARGIN, _CAPTION = 9, 4, 16
_SCORED_HEIGHT = 32


def lay_out(clips: np.ndarray, captions: list[str]) -> Image.Image:
    """Put nine frames of each clip, uint8 ``[N, F, H, W, 3]``, on one sheet under its caption."""
    chosen = np.linspace(0, clips.shape[1] - 1, _COLUMNS).round().astype(int)
    height, width = clips.shape[2] + _CAPTION + _MARGIN, clips.shape[3] + _MARGIN
    sheet = Image.new("RGB", (_COLUMNS * width + _MARGIN, len(clips) * height + _MARGIN), "#f4f4f4")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        y = _MARGIN + row * height
        pen.text((_MARGIN, y), caption, fill="black", font=font)
        for column, frame in enumerate(clip[chosen]):
            sheet.paste(Image.fromarray(frame), (_MARGIN + column * width, y + _CAPTION))
    return sheet


def recognise(clip: np.ndarray, said: tuple[str, str, str], render: ClipRenderer) -> list[bool]:
    """Tell for object, motion and background of a clip, uint8 ``[F, H, W, 3]``, if they are as the prompt says."""
    height, stride = clip.shape[1], (FRAMES - 1) // (len(clip) - 1)
    pixels = torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1
    seen = F.avg_pool3d(pixels, (1, height // _SCORED_HEIGHT, height // _SCORED_HEIGHT))
    right = []
    for part, words in enumerate(_WORDS):
        index = [
            torch.full((len(words),), names.index(word)) for names, word in zip(_WORDS, said, strict=True)
        ]
        index[part] = torch.arange(len(words))
        clips = Clips(
            *(i.to(render.poses.device) for i in index),
            torch.zeros(len(words), 3, device=render.poses.device),
        )
        drawn = render(clips, range(0, FRAMES, stride), _SCORED_HEIGHT).cpu()
        right.append(words[(drawn - seen).pow(2).flatten(1).sum(1).argmin()] == said[part])
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pipeline", type=Path)
    parser.add_argument("output", type=Path, help="picture to write; the score goes beside it as .json")
    parser.add_argument("--sprites", type=Path, required=True)
    parser.add_argument("--count", type=int, default=40, help="number of prompts")
    parser.add_argument("--height", type=int, default=HEIGHT, help="height of the training clips")
    parser.add_argument("--frame-stride", type=int, default=1, help="frame stride of the training clips")
    args = parser.parse_args()

    chosen = held_out_clips()[: args.count]
    captions = [prompt(*clip) for clip in chosen]
    clips = draw_clips(args.pipeline, captions, args.height, args.frame_stride)
    lay_out(clips, captions).save(args.output, quality=75, method=6)
    render = ClipRenderer(
        load_sprites(args.sprites), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    right = np.array([recognise(clip, said, render) for clip, said in zip(clips, chosen, strict=True)])
    score = dict(zip(("objects", "motions", "backgrounds"), right.sum(0).tolist(), strict=True)) | {
        "of": len(right)
    }
    wrong = [f"{caption}: {r.tolist()}" for caption, r in zip(captions, right, strict=True) if not r.all()]
    args.output.with_suffix(".json").write_text(
        json.dumps(score | {"not recognised": wrong}, indent=2) + "\n"
    )
    print(json.dumps(score))


if __name__ == "__main__":
    main()
