"""Write the held-out prompts and the held-out concepts.

python -m dma_diffusers.pipelines.demo_training.prompts pipelines/demo
"""

import argparse
import json
from pathlib import Path
from random import Random

from dma_diffusers.pipelines.demo_training.concepts import HELD_OUT
from dma_diffusers.pipelines.demo_training.scenes import Scene, sample_scene

_SEED = 2026
_PROMPTS = 200


def held_out_scenes(count: int, seed: int = _SEED) -> list[Scene]:
    """Return scenes that training never draws, each with a different prompt."""
    rng = Random(seed)
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_scene(rng)
        if scene.is_held_out():
            scenes[scene.prompt] = scene
    return list(scenes.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder for prompts.jsonl and held_out_concepts.txt")
    args = parser.parse_args()
    lines = [
        json.dumps({"prompt": scene.prompt, "category": scene.arrangement})
        for scene in held_out_scenes(_PROMPTS)
    ]
    (args.folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (args.folder / "held_out_concepts.txt").write_text("\n".join(HELD_OUT) + "\n")


if __name__ == "__main__":
    main()
