"""Define the prompts and which of them are held out from training, and write the held-out ones to a file.

python -m dma_diffusers.pipelines.demo_video_training.prompts pipelines/demo_video
"""

import argparse
import json
from pathlib import Path
from random import Random

from dma_diffusers.pipelines.demo_training.concepts import with_article
from dma_diffusers.pipelines.demo_video_training.concepts import BACKGROUNDS, CONCEPTS
from dma_diffusers.pipelines.demo_video_training.motions import MOTIONS

_SEED = 2026


def prompt(concept: str, motion: str, background: str) -> str:
    """Return the prompt of a clip; there is only one sentence for it."""
    return f"{with_article(concept)} {motion} on {with_article(background)} background"


def is_held_out(concept: str, motion: str) -> bool:
    """Return True if training never shows `concept` in `motion`; every concept has one such motion."""
    return (list(CONCEPTS).index(concept) * 3 + MOTIONS.index(motion)) % len(MOTIONS) == 0


def held_out_clips() -> list[tuple[str, str, str]]:
    """Return every held-out pair as (concept, motion, background) with a random background; the motions take turns."""
    rng = Random(_SEED)
    by_motion = [[c for c in CONCEPTS if is_held_out(c, motion)] for motion in MOTIONS]
    rounds = zip(*(rng.sample(concepts, len(concepts)) for concepts in by_motion), strict=True)
    return [
        (concept, motion, rng.choice(list(BACKGROUNDS)))
        for concepts in rounds
        for concept, motion in zip(concepts, MOTIONS, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder for prompts.jsonl")
    args = parser.parse_args()
    lines = [json.dumps({"prompt": prompt(*clip), "category": clip[1]}) for clip in held_out_clips()]
    (args.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
